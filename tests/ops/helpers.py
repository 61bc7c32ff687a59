"""One deterministic batch and the two ways to compute it, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.testing.strategies import Batch

NATIVE = af.advantage_flow_loss
REFERENCE = af.reference.advantage_flow_loss
BOTH = {"native": NATIVE, "reference": REFERENCE}


def draw_batch(
    batch: int = 4,
    shape: tuple[int, ...] = (3, 5, 7),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    v, x0, noise, o, p = torch.randn(5, batch, *shape, generator=generator).to(device, dtype).unbind()
    t, uniform = torch.rand(2, batch, generator=generator).to(device).unbind()
    return Batch(
        v.clone().requires_grad_(), x0, noise, 0.05 + 0.95 * t, 2 * uniform - 1, {"v_old": o, "v_ref": p, **options}
    )


def value_and_grad(batch: Batch, loss: Callable[..., af.LossOutput] = NATIVE) -> tuple[af.LossOutput, Tensor]:
    out = loss(*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss.sum(), batch.v)
    return out, grad


def truth(batch: Batch) -> tuple[af.LossOutput, Tensor]:
    """The float64 reference of the same rounded inputs."""
    return value_and_grad(batch.to(torch.float64), REFERENCE)


def select(batch: Batch, rows: Any) -> Batch:
    """The same samples, some of them, in another order."""

    def pick(value: Any) -> Any:
        return value.detach()[rows].clone() if isinstance(value, Tensor) else value

    options = {name: pick(value) for name, value in batch.options.items()}
    v, x0, noise, t, advantages = (pick(value) for value in batch.arguments())
    return Batch(v.requires_grad_(), x0, noise, t, advantages, options)
