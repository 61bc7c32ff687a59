"""What passes between sampler, algorithm and optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import advflow_ext as af
from advflow.autoregressive.token_model import Hidden
from advflow.samplers.sampling import Conditioning


@dataclass(frozen=True)
class Transitions:
    """The stochastic sampler steps of N images that are learnt from, S of each.

    x, v_old, eps: [N, S, C, H, W], x being the latent before the step; index: [N, S], the steps' rows in `table`.
    """

    x: torch.Tensor
    v_old: torch.Tensor
    eps: torch.Tensor
    index: torch.Tensor
    table: af.StepTable


@dataclass(frozen=True)
class Experience:
    """This process's images of one iteration, group after group: x0 [N, C, H, W], or their tokens [N, T], rewards and
    advantages [N], what the policies were told.

    They are `rows` of the iteration's `images`; a group may lie in two processes. `in_step` are the rows of those that
    make as many passes as this one. `transitions` is there for methods of the reverse process alone, `more_advantages`
    [N] each for those of tokens, beside the others.
    """

    x0: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    conditioning: Conditioning
    images_per_prompt: int
    rows: slice
    images: int
    in_step: Sequence[slice]
    transitions: Transitions | None = None
    more_advantages: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class WeightedLoss:
    """The loss of one micro-batch and its share of the optimiser step: 0 for one that keeps the processes in step."""

    out: af.LossOutput
    weight: float


@dataclass(frozen=True)
class Needs:
    """Which frozen policies' velocities a loss reads, so that no forward pass is made for nothing."""

    old: bool
    reference: bool


@dataclass(frozen=True)
class ForwardBatch:
    """Images [B, C, H, W] met at (t, noise). `v` alone carries gradients. t, rewards, advantages: [B].

    `group_size` is how many images a prompt has, `reference_scale` multiplies the weight that the settings give to the
    reference, `rollout_weight` is that of the rollout policy where the settings leave it to the run (None: its first).
    """

    v: torch.Tensor
    v_old: torch.Tensor | None
    v_ref: torch.Tensor | None
    x0: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    group_size: int
    reference_scale: float
    rollout_weight: float | None = None


@dataclass(frozen=True)
class ReverseBatch:
    """Sampler steps: velocities and eps [N, C, H, W], index [N] into `table`, advantages [N] of the steps' images."""

    v: torch.Tensor
    v_old: torch.Tensor
    v_ref: torch.Tensor | None
    eps: torch.Tensor
    table: af.StepTable
    index: torch.Tensor
    advantages: torch.Tensor

    @property
    def arguments(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, af.StepTable, torch.Tensor, torch.Tensor]:
        """What every loss of the reverse process takes first, in that order."""
        return self.v, self.v_old, self.eps, self.table, self.index, self.advantages


@dataclass(frozen=True)
class TokenBatch:
    """Images of T tokens: states and heads of policies, tokens and log_prob_old [B, T], advantages [B] of each kind.

    `policy` alone carries gradients. `reference` is there where the method needs it.
    """

    policy: Hidden
    reference: Hidden | None
    tokens: torch.Tensor
    log_prob_old: torch.Tensor
    advantages: tuple[torch.Tensor, ...]
    entropy_weight: float
