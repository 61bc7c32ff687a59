"""A row: one quantity of one trainer, by our call and by its own formula; and the random numbers behind every row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af

TRANSITIONS, SHAPE, GROUP = 18, (4, 8, 8), 8
STEPS = torch.arange(TRANSITIONS)
AGREEING_DIGITS = 9.0  # a log-ratio of 1e-4 out of float64 log-probabilities of 1 keeps about 11
SOURCES = {
    "flow_grpo": "yifan123/flow_grpo @9745241",
    "FlowCPS": "IamCreateAI/FlowCPS @b402c7a",
    "DanceGRPO": "XueZeyue/DanceGRPO @15cc71d",
    "MixGRPO": "Tencent-Hunyuan/MixGRPO @e5cdd6a",
    "GRPO-Guard (flow_grpo)": "yifan123/flow_grpo @9745241",
    "GRPO-Guard (Flow-Factory)": "X-GenGroup/Flow-Factory @b30dc00",
    "GRPO-Guard (Flow-Factory), earlier": "X-GenGroup/Flow-Factory @a0b2bc5",
    "Flow-Factory": "X-GenGroup/Flow-Factory @a0b2bc5",
    "UniRL Flow-DPPO": "Tencent-Hunyuan/UniRL @0c97cfb",
    "UniRL Flow-DPPO, earlier": "Tencent-Hunyuan/UniRL @1a7b501",
    "Flow-DPPO paper": "arXiv 2606.11025",
    "verl-omni": "verl-project/verl-omni @a1139ba",
    "DiffusionNFT": "NVlabs/DiffusionNFT @24af555",
    "DiffusionNFT paper": "arXiv 2509.16117",
    "UniRL DiffusionNFT": "Tencent-Hunyuan/UniRL @02f9a4b",
    "AWM": "scxue/advantage_weighted_matching @be51372",
    "FlowAWR": "Fuzm7/FlowAWR @05e993a",
    "FlowAWR paper": "arXiv 2606.30376",
    "AdaGRPO": "Bujiazi/GRPO-Series @d0ddaa4",
    "ORW-CFM": "markerthu/orw-cfm @de9c766",
    "AdvantageFlow": "arXiv 2605.26013",
    "MeanFlowAdvantage": "arXiv 2609.37670",
    "ar-policy-tuning": "bugrabaran/ar-policy-tuning @fac5b31",
}
Loss = Callable[..., af.LossOutput]


@dataclass(frozen=True)
class Row:
    """One quantity of one trainer: by our call, and by the trainer's formula."""

    trainer: str
    quantity: str
    call: str
    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]
    departs: str = ""  # how the trainer departs from what the call computes, where it does

    @property
    def commit(self) -> str:
        """Of the code read: repository and commit, or the paper."""
        return SOURCES.get(self.trainer, "")

    @property
    def digits(self) -> float:
        """Leading digits that agree: of the worst element, relative to the largest one of its tensor; at most 16."""
        pairs = zip(self.ours, self.theirs, strict=True)
        errors = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
        if not all(map(math.isfinite, errors)):  # also where all of theirs is 0: such a row would compare nothing
            return 0.0
        return min(16.0, -math.log10(max(*errors, 1e-16)))

    @property
    def agrees(self) -> bool:
        return self.digits >= AGREEING_DIGITS

    def to_json(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer,
            "commit": self.commit,
            "quantity": self.quantity,
            "call": self.call,
            "ours": float(self.ours[0].flatten()[0]),
            "theirs": float(self.theirs[0].flatten()[0]),
            "digits": round(self.digits, 1),
            "agrees": self.agrees,
            "departs": self.departs,
        }


class Inputs:
    """The random numbers behind every row."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        latents = (TRANSITIONS, *SHAPE)
        self.x0, self.noise, self.x, self.step_noise = normal(4, *latents)
        self.u: Tensor = self.noise - self.x0
        self.v_old = self.u + 0.3 * normal(*latents)
        self.v, self.v_ref, self.v_ema = self.v_old + 0.02 * normal(3, *latents)
        self.t = torch.linspace(0.1, 1, TRANSITIONS, dtype=torch.float64)
        self.x_t = self.x0 + column(self.t, self.u) * self.u
        self.A = normal(TRANSITIONS)
        self.rewards = 0.5 + 0.1 * normal(6, 1) + 0.1 * normal(6, GROUP)
        self.rewards[0, 3] += 5  # beyond five standard deviations, so that the clips have something to do
        self.rewards[5] = 0.5  # and a group that agrees, for the floors

    @property
    def centred(self) -> Tensor:
        return self.rewards - self.rewards.mean(1, keepdim=True)

    def forward(self, A: Tensor) -> tuple[Tensor, ...]:
        """What every forward-process loss takes first."""
        return self.v, self.x0, self.noise, self.t, A


def shown(op: Callable[..., Any], options: dict[str, Any]) -> str:
    words = [f"{name}={name if isinstance(value, Tensor) else repr(value)}" for name, value in options.items()]
    return f"{op.__name__}({', '.join(['...', *words])})"


def metric(out: af.LossOutput, name: str) -> Tensor:
    value: Tensor = out.metrics.values[out.metrics.names.index(name)]
    return value


def with_gradient(loss: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
    leaf = v.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def mean(values: Tensor) -> Tensor:
    """Over everything but the batch."""
    return values.flatten(1).mean(1)


def column(values: Tensor, like: Tensor) -> Tensor:
    """One value a sample, to be broadcast over the elements of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def widened(values: Tensor) -> Tensor:
    """What trainers mean by ``.float()``: half precision becomes fp32, and fp64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def loss_row(
    trainer: str,
    quantity: str,
    op: Loss,
    arguments: tuple[Any, ...],
    theirs: Callable[[Tensor], Tensor],
    departs: str = "",
    **options: Any,
) -> Row:
    """Compares the gradient with respect to v, the first of ``arguments``, as well as the loss."""
    v, *others = arguments
    ours = with_gradient(lambda leaf: op(leaf, *others, **options).loss, v)
    return Row(trainer, quantity, shown(op, options), ours, with_gradient(theirs, v), departs)


def advantage_row(
    trainer: str, inputs: Inputs, theirs: Tensor, departs: str = "", quantity: str = "advantages", **options: Any
) -> Row:
    ours = af.group_advantages(inputs.rewards.flatten(), GROUP, **options)
    return Row(trainer, quantity, shown(af.group_advantages, options), (ours,), (theirs.flatten(),), departs)
