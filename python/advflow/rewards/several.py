"""The rewards of a run: each scores every image, a column each, and one number an image is made of the columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch

import advflow_ext as af
from advflow.data.prompt import Prompt
from advflow.rewards import Begun, CheckedReward, Scores, load_reward
from advflow.settings.data import DataConfig

Rule: TypeAlias = Literal["weighted_sum", "gdpo", "worst_first"]


class Rewards:
    """Rewards by name, with their weights."""

    def __init__(self, rewards: Mapping[str, CheckedReward], weights: Mapping[str, float]) -> None:
        self._rewards, self._weights = dict(rewards), dict(weights)

    @property
    def names(self) -> list[str]:
        return list(self._rewards)

    def learnt(self) -> Rewards:
        """Those that are learnt from; the others have no weight, and nothing to do with training."""
        return Rewards({name: each for name, each in self._rewards.items() if self._weights[name]}, self._weights)

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        """Rewards and scores, fp32 [B, R] on the CPU, in the order of `names`."""
        return in_columns(self.begin(images, prompts))

    def begin(self, images: torch.Tensor, prompts: list[Prompt]) -> list[Begun]:
        """What each is asked for, in the order of `names`; those that score elsewhere begin before the others."""
        begun = {
            name: reward.begin(images, prompts)
            for name, reward in sorted(self._rewards.items(), key=lambda item: not item[1].elsewhere)
        }
        return [begun[name] for name in self._rewards]

    def expect(self, prompts: list[Prompt]) -> None:
        """Says which prompts will be checked, one by one."""
        for reward in self._rewards.values():
            reward.expect(prompts)

    def check(self, prompt: Prompt) -> None:
        """Raises UnknownPrompt for one that a reward cannot score."""
        for reward in self._rewards.values():
            reward.check(prompt)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted sum of columns, [N] of [N, R]; NaN where one that has a weight is not finite."""
        return self._combined(values.double())

    def combine(self, rewards: torch.Tensor, group_size: int, rule: Rule) -> torch.Tensor:
        """What is learnt from, fp32 [N] of the rewards [N, R] of the whole batch: `group_size` images a prompt.

        An image without a finite number in a column that has a weight is NaN, and counts in no mean or deviation.
        """
        if rule == "weighted_sum":
            return self.total(rewards)
        usable = self.total(rewards).isfinite()
        columns = [
            af.group_advantages(column, group_size, norm="group_std", clip=None).masked_fill(~usable, torch.nan)
            for column in rewards.double().masked_fill(~usable[:, None], torch.nan).unbind(1)
        ]
        return self._combined(torch.stack(columns, 1), smallest=rule == "worst_first")

    def _combined(self, columns: torch.Tensor, smallest: bool = False) -> torch.Tensor:
        # A column without a weight is left out, not multiplied by it: its NaN would stay.
        chosen = [(column, self._weights[name]) for name, column in zip(self.names, columns.unbind(1), strict=True)]
        weighted = torch.stack([column * weight for column, weight in chosen if weight], 1)
        combined = weighted.amin(1) if smallest else weighted.sum(1)
        return combined.masked_fill(~combined.isfinite(), torch.nan).float()

    def means(self, rewards: torch.Tensor, broken: torch.Tensor) -> dict[str, float]:
        """Of several rewards [N, R], the mean of each over its finite numbers, and how many images it left unscored.

        The `broken` [N] images are not counted, whose rewards are NaN whatever they got.
        """
        if len(self.names) == 1:
            return {}
        row: dict[str, float] = {}
        for name, column in zip(self.names, rewards.unbind(1), strict=True):
            finite = column.isfinite()
            row |= {f"reward/{name}": column[finite].mean().item(), f"unscored/{name}": int((~finite & ~broken).sum())}
        return row


def in_columns(begun: list[Begun]) -> Scores:
    """The scores of several rewards, [B, R], when they are there."""
    each = [part.result() for part in begun]
    return Scores(torch.stack([part.reward for part in each], 1), torch.stack([part.score for part in each], 1))


def load_rewards(data: DataConfig, section: Callable[[str], Any]) -> Rewards:
    """The rewards that the settings name; `section` gives the section of a reward that has one.

    Raises ValueError for one that cannot be made.
    """
    made = {
        name: load_reward(
            each.reward,
            each.args,
            section(each.reward),
            batch=each.batch,
            place=each.place,
            arguments_place=each.arguments,
        )
        for name, each in data.rewards.items()
    }
    return Rewards(made, {name: each.weight for name, each in data.rewards.items()})
