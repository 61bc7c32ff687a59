"""Every number a setting holds is finite, of its type and in range, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from advflow.algorithms import check_settings
from advflow.settings.config import TrainConfig
from advflow.settings.registry import METHODS
from advflow.world.settings import FlowStage, PretrainSettings

ZERO_IS_FINE = {
    "seed",
    "optim.warmup",
    "optim.betas",
    "optim.weight_decay",
    "rollout.guidance",
    "draws.guidance",
    "evaluation.guidance",
    "rollout_policy.rate",
    "rollout_policy.start",
    "rollout_policy.maximum",
    "runtime.merged_gigabytes",
    "capability.decay",
    "capability.weight",
    "entropy.weight",
    "entropy.least",
    "entropy.deadband",
    "entropy.gain",
    "loo_fid.weight",
    "loo_fid.beta",
    "advantage_flow.gamma",
    "advantage_flow.lam",
    "advantage_flow.offset",
    "diffusion_nft.kl_weight",
    "awm.ema_weight",
    "awm.kl_weight",
    "flow_awr.kl_weight",
    "reward_weighted.kl_weight",
    "flow_grpo.clip",
    "flow_grpo.kl_weight",
    "grpo_guard.clip",
    "grpo_guard.kl_weight",
    "flow_cps.clip",
    "flow_cps.kl_weight",
    "flow_dppo.kl_weight",
    "flow_dppo.threshold",
    "token_grpo.clip",
    "token_grpo.kl_weight",
}


def _numbers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[type]]]:
    """The path of every setting that holds a number, and the types it may have."""
    hints = get_type_hints(type(config))
    for each in fields(config):
        value, hint = getattr(config, each.name), hints[each.name]
        types = {hint, *get_args(hint)} & {int, float, bool}
        if is_dataclass(value):
            yield from _numbers(value, (*path, each.name))
        elif types and bool not in types and get_origin(hint) not in (list, dict):
            yield (*path, each.name), types


def _with(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """`config` with the setting at `path` set, as its classes see it."""
    name, *rest = path
    if rest:
        value = _with(getattr(config, name), tuple(rest), value)
    elif isinstance(getattr(config, name), tuple):
        value = (value, 0.9)
    return replace(config, **{name: value})


def _checked(path: tuple[str, ...], value: Any) -> None:
    """The setting at `path` as a run's: of a method's own section the method's op has the word."""
    config = _with(TrainConfig(), path, value)
    if path[0] in METHODS:
        check_settings(path[0], getattr(config, path[0]), config.rollout.images_per_prompt)


SETTINGS = dict(_numbers(TrainConfig()))


def test_the_walk_finds_them() -> None:
    assert len(SETTINGS) > 50
    assert {("optim", "lr"), ("optim", "betas"), ("sde", "within"), ("iterations",)} <= SETTINGS.keys()


@pytest.mark.parametrize("path", SETTINGS, ids=".".join)
def test_a_number_that_is_none_is_refused(path: tuple[str, ...]) -> None:
    name = ".".join(path)
    wrong = [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, True, False, -1]
    if float not in SETTINGS[path]:
        wrong.append(1.5)
    if name not in ZERO_IS_FINE:
        wrong.append(0)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"{name} is .*accepted"):
            _checked(path, value)


@pytest.mark.parametrize("name", sorted(ZERO_IS_FINE))
def test_zero_is_a_number(name: str) -> None:
    _checked(tuple(name.split(".")), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, True, -1, 0])
def test_pretraining_is_asked_for_in_numbers_too(value: Any) -> None:
    for name in ("scenes", "vae_steps", "vae_lr", "batch"):
        with pytest.raises(ValueError, match=rf"{name} is .*accepted"):
            PretrainSettings(**{name: value})
    for name in ("steps", "lr"):
        with pytest.raises(ValueError, match=rf"flow_stages.{name} is .*accepted"):
            FlowStage(**({"steps": 1, "lr": 1e-3, "caption_noise": 0.0} | {name: value}))
    with pytest.raises(ValueError, match=r"flow_stages.caption_noise is .*accepted"):
        FlowStage(1, 1e-3, 1.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "flow_grpo", "sde.steps": 10}, "sde.steps is 10; with rollout.steps=10 at most 9 is accepted"),
        ({"algorithm": "flow_grpo", "sde.within": 10, "sde.steps": 1}, "sde.within is 10; with rollout.steps=10"),
        ({"algorithm": "awm", "draws.per_image": 11, "draws.timesteps": "sampler_grid"}, "draws.per_image is 11"),
    ],
)
def test_what_needs_several_sections_is_seen_without_a_model(changes: dict[str, Any], message: str) -> None:
    def build() -> TrainConfig:
        sections = {
            name: replace(
                getattr(TrainConfig(), name),
                **{key.split(".")[1]: v for key, v in changes.items() if key.startswith(f"{name}.")},
            )
            for name in ("sde", "draws")
        }
        return TrainConfig(algorithm=changes["algorithm"], **sections)

    with pytest.raises(ValueError, match=message):
        build()
