"""Every public op of latents behind one call, so that what all of them promise is written once: here and in tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rollout import shifted_once
from advflow_ext.losses import LOSSES
from advflow_ext.testing.layouts import arrange

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]

FORWARD = tuple(name for name, loss in LOSSES.items() if loss.family == "forward")
REVERSE = tuple(name for name, loss in LOSSES.items() if loss.family == "reverse")
LATENTS: dict[str, tuple[str, ...]] = {
    **{name: LOSSES[name].latents for name in FORWARD},
    "awm_log_prob": ("v", "x0", "noise"),
    **{name: LOSSES[name].latents for name in REVERSE},
    "distillation_loss": ("v", "v_teacher"),
    "sde_step": ("v", "x", "noise"),
    "transition_log_prob": ("v", "x", "x_next"),
    "transition_noise": ("v_old", "x", "x_next"),
    "from_means": ("means", "x", "x_next"),
    "gaussian_kl": ("mean1", "mean2"),
    "gaussian_kl_from_velocity": ("v", "v_old"),
}
NAMES = tuple(LATENTS)
TABLE = af.StepTable(shifted_once(10), noise_level=0.7)
OF_STEPS = ("sde_step", "transition_log_prob", "transition_noise", "from_means")
RESULTS = {"sde_step": ("x_next", "eps", "log_prob"), "from_means": ("v_old", "eps")}  # of the ops with several

# Limits that random batches stay clear of, on either side.
OPTIONS: dict[str, Inputs] = {
    "awm_loss": {"kl_weight": 0.5},
    "flow_awr_loss": {"kl_weight": 0.5},
    "flow_grpo_loss": {"clip": 0.2, "kl_weight": 0.04},
    "grpo_guard_loss": {"clip": 0.2, "kl_weight": 0.04},
    "flow_cps_loss": {"clip": 0.2, "kl_weight": 0.04},
    "flow_dppo_loss": {"threshold": 1e-6, "kl_weight": 0.04},
}


@dataclass(frozen=True)
class Drawing:
    """How to draw an op's inputs; the same seed gives the same numbers, whatever their layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    layout: str = "contiguous"
    seed: int = 0

    def inputs(self, name: str) -> Inputs:
        """Keyword arguments, tensors all; those that take a gradient are leaves that require it."""
        random = torch.Generator(self.device).manual_seed(self.seed)
        batch = self.shape[0]

        def latent() -> Tensor:
            # Without float32 on the way, so that a batch of 2^31 elements has room.
            return torch.empty(self.shape, dtype=self.dtype, device=self.device).normal_(generator=random)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(batch, generator=random, device=self.device)

        given: Inputs = {key: latent() for key in LATENTS[name]}
        if name in FORWARD or name == "awm_log_prob":
            given["t"] = uniform(0.1, 1.0)
        if name in FORWARD:
            given["rewards" if name == "reward_weighted_loss" else "advantages"] = uniform(-1.0, 1.0)
        if name == "advantage_flow_loss":
            given["gamma"] = uniform(1.1, 2.0)
        if name == "awm_loss":
            log_prob = af.awm_log_prob(*(given[key] for key in ("v", "x0", "noise", "t")))
            given["log_prob_old"] = log_prob + uniform(-0.5, 0.5)
        if name in (*REVERSE, "distillation_loss", "gaussian_kl_from_velocity", *OF_STEPS):
            given["table"] = TABLE
            steps = torch.tensor(TABLE.stochastic_steps, device=self.device)
            given["index"] = steps[torch.randint(len(steps), (batch,), generator=random, device=self.device)]
        if name in REVERSE:
            given["v"].mul_(0.1).add_(given["v_old"])
            given["advantages"] = uniform(-1.0, 1.0)
        if name == "gaussian_kl":
            given |= {"std1": uniform(0.2, 1.0), "std2": uniform(0.2, 1.0)}
        given |= {key: arrange(given[key], self.layout) for key in LATENTS[name]}
        return given | {key: given[key].detach().requires_grad_() for key in leaves(name)}


def leaves(name: str) -> tuple[str, ...]:
    if name in ("sde_step", "transition_noise", "from_means"):
        return ()
    return ("mean1", "mean2") if name == "gaussian_kl" else ("v",)


def run(name: str, inputs: Inputs, space: Any = af, op: Callable[..., Any] | None = None) -> Outputs:
    """One call and, where there is one, its backward; losses a sample, so that a row can be seen alone."""
    op = op or getattr(space, name)
    if name in RESULTS:
        return dict(zip(RESULTS[name], op(**inputs), strict=True))
    if not leaves(name):
        return {"values": op(**inputs)}
    outputs: Outputs = {}
    if name.endswith("_loss"):
        out = op(**inputs, **OPTIONS.get(name, {}), reduction="none")
        values, outputs["metrics"] = out.loss, out.metrics.values
    else:
        values = op(**inputs)
    keys = leaves(name)
    grads = torch.autograd.grad(values.sum(), [inputs[key] for key in keys])
    return {
        "values": values.detach(),
        **outputs,
        **{f"grad_{key}": grad for key, grad in zip(keys, grads, strict=True)},
    }


def mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Every tensor changed, leaves made anew."""

    def of(value: Any) -> Any:
        return change(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

    return {key: of(value) for key, value in inputs.items()}


def truth(name: str, inputs: Inputs) -> Outputs:
    """The float64 reference of the same rounded inputs, on the CPU."""
    wide = mapped(inputs, lambda tensor: tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu())
    return run(name, wide, af.reference)
