"""Comparing a fused op with the modules it replaces, once for each kind of call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

Op = Callable[..., tuple[Tensor, ...]]


class Verifier:
    """Trusts an op for given dtypes and shapes once it was seen to be no worse than the stock modules.

    The first sample of the first such call is computed three times, with the gradients it is asked for: fused, by the
    forwards of the modules it stands for, and by those in float64. Fused results and gradients may be 1.5 times as far
    from float64 as the stock ones, plus `slack`. This waits for the device, so it is left out inside torch.compile and
    CUDA graph capture, and for shapes without numbers.
    """

    slack = 1e-5

    def __init__(self) -> None:
        self._verdicts: dict[Any, bool] = {}

    def trusts(self, op: str, fused: Op, stock: Op, tensors: tuple[Tensor, ...]) -> bool:
        if torch.compiler.is_compiling() or is_fake(tensors[0]):
            return True
        # Weights [D] have no batch; of everything else the first dimension is that.
        trained = torch.is_grad_enabled()
        key = (op, *((t.dtype, t.shape[t.dim() > 1 :], trained and t.requires_grad) for t in tensors))
        if key not in self._verdicts:
            if tensors[0].shape[0] == 0 or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
                return True
            if not all(bool(tensor.detach()[:1].isfinite().all()) for tensor in tensors):
                return True  # bad data says nothing about an op; the next call is looked at
            self._verdicts[key] = self._agrees(op, fused, stock, tensors)
        return self._verdicts[key]

    def _agrees(self, op: str, fused: Op, stock: Op, tensors: tuple[Tensor, ...]) -> bool:
        trained = torch.is_grad_enabled()
        sample = [
            (tensor[:1] if tensor.dim() > 1 else tensor).detach().requires_grad_(trained and tensor.requires_grad)
            for tensor in tensors
        ]
        ours, theirs = _with_gradients(fused, sample), _with_gradients(stock, sample)
        truth = _with_gradients(stock, [x.detach().double().requires_grad_(x.requires_grad) for x in sample])
        for i, (mine, other, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
            error, allowed = _error(mine, exact), 1.5 * _error(other.to(mine.dtype), exact) + self.slack
            if not error <= allowed:
                warnings.warn(
                    f"the fused {op} differs from float64 by {error:.3g} (relative, result or gradient {i}) where "
                    f"{allowed:.3g} is allowed; the stock modules serve for "
                    f"{', '.join(f'{list(t.shape)} {t.dtype}' for t in tensors)}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
        return True


def _with_gradients(op: Op, tensors: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of the inputs that ask for one for a fixed pattern of incoming ones."""
    # Hooks of our own keep what is saved here from gradient checkpointing's, which would miss it the second time.
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), unseen, torch.autocast(tensors[0].device.type, enabled=False):
        results = op(*tensors)
        asking = [tensor for tensor in tensors if tensor.requires_grad]
        differentiable = [result for result in results if result.requires_grad]
        incoming = [_pattern(result) for result in differentiable]
        grads = torch.autograd.grad(differentiable, asking, incoming) if asking else ()
    return [tensor.detach() for tensor in (*results, *grads)]


def _pattern(like: Tensor) -> Tensor:
    """Numbers of both signs that no norm is blind to and that every dtype holds exactly."""
    numbers = torch.arange(like.numel(), device=like.device).remainder(7) - 3
    return numbers.view(like.shape).to(like.dtype)


def _error(actual: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
