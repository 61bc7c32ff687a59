"""What `data.reward` may hold: one reward by its name, or several by names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from advflow.settings.numbers import WrongSetting, require
from advflow.settings.suggest import did_you_mean

_PLACE = "data.reward"


@dataclass(frozen=True)
class RewardConfig:
    """One reward of a run. `place` is where it is named in the settings, `arguments` where what it is made with stands.

    Args:
        reward: as `data.reward` names one.
        weight: of it in what is learnt from; at 0 it is reported by evaluation alone.
        batch: at most so many images are scored at a time; None is what the reward says itself.
        args: what its class is made with.
    """

    reward: str
    weight: float = 1.0
    batch: int | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default=_PLACE, compare=False)
    arguments: str = field(default=f"{_PLACE}_args", compare=False)

    def whatever_server(self) -> RewardConfig:
        """The same without what a remote reward is told of its servers: all but which of their rewards it is."""
        if self.reward != "remote":
            return self
        return replace(self, args={name: value for name, value in self.args.items() if name == "reward"})


def scored_alike(one: Mapping[str, RewardConfig], other: Mapping[str, RewardConfig]) -> bool:
    """Whether these are the same rewards, wherever the servers of those are that are scored elsewhere."""
    return {name: each.whatever_server() for name, each in one.items()} == {
        name: each.whatever_server() for name, each in other.items()
    }


_SETTINGS = tuple(each.name for each in fields(RewardConfig) if each.name not in ("place", "arguments"))


def read_rewards(
    reward: str | Mapping[str, Any], arguments: Mapping[str, Any], place: str = _PLACE
) -> dict[str, RewardConfig]:
    """The rewards of a run by name. `arguments` are those of one that is named alone, `place` is the setting's name.

    Raises WrongSetting for what is none, and where none has a weight.
    """
    if isinstance(reward, str):
        braced = reward.lstrip().startswith("{")  # YAML reads "{a:1}" as a text
        require(not braced, place, reward, 'a name, or several, with a space behind each colon: "{a: 1, b: 0.5}"')
        return {reward: RewardConfig(reward, args=arguments, place=place, arguments=f"{place}_args")}
    require(not arguments, f"{place}_args", arguments, f"none where {place} names several, whose args stand in each")
    require(len(reward) > 0, place, reward, "a name, or one reward or more by their names")
    rewards = {name: _read(name, value, place) for name, value in reward.items()}
    learnt = any(each.weight for each in rewards.values())
    require(learnt, place, reward, "one reward or more whose weight is not 0, to learn from")
    return rewards


def _read(name: object, value: object, home: str) -> RewardConfig:
    """One of several: its settings, or its weight alone."""
    named = isinstance(name, str) and name.isidentifier()
    require(named, home, name, "names of letters, digits and underscores; a class of yours stands under its `reward`")
    place = f"{home}.{name}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"weight": value}
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise WrongSetting(f"{place} is {value!r}; accepted: a weight, or a mapping of {', '.join(_SETTINGS)}")
    for each in value:
        if each not in _SETTINGS:
            near = did_you_mean(str(each), _SETTINGS)
            raise WrongSetting(f"there is no setting {place}.{each}{near or ';'} {place} has {', '.join(_SETTINGS)}")
    named_in = f"{place}.reward" if "reward" in value else place
    config = RewardConfig(**({"reward": name} | dict(value)), place=named_in, arguments=f"{place}.args")
    require(isinstance(config.reward, str), f"{place}.reward", config.reward, "a name, as data.reward takes alone")
    finite = _is_number(config.weight, float) and abs(config.weight) <= 3.4e38
    require(finite, f"{place}.weight", config.weight, "a finite number")
    whole = config.batch is None or (_is_number(config.batch, int) and config.batch >= 1)
    require(whole, f"{place}.batch", config.batch, "1 or more, or null")
    mapping = isinstance(config.args, Mapping) and all(isinstance(each, str) for each in config.args)
    require(mapping, config.arguments, config.args, "a mapping of what its class is made with")
    return config


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)
