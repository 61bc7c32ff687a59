"""What every op of a transformer block is held to: results and gradients against float64, and against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from advflow_ext.testing import relative_error

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Op = Callable[..., tuple[Tensor, ...]]

# float32: sums of up to 2048 terms and two divisions stay below 1e-6; the promise is 1e-5.
FLOAT32_ERROR = 1e-5
# Half precision: not further from float64 than this many times what PyTorch has that computes in the same dtype.
HALF_PRECISION_RATIO = 1.5


def results_and_gradients(op: Op, tensors: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    results = op(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(results, wanted, [grad.to(r.dtype) for grad, r in zip(incoming, results, strict=True)])
    return [tensor.detach() for tensor in (*results, *grads)]


def assert_right(op: Op, stock: Op, tensors: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
    """``op`` against ``stock`` in float64, in float32 absolutely, in half precision relative to ``stock`` itself."""
    ours = results_and_gradients(op, tensors, incoming)
    theirs = results_and_gradients(stock, tensors, incoming)
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    rounded = [grad.to(r.dtype).double() for grad, r in zip(incoming, ours[: len(incoming)], strict=True)]
    exact = results_and_gradients(stock, wide, rounded)
    assert len(ours) == len(theirs) == len(exact)
    for i, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        error = relative_error(mine, truth)
        allowed = FLOAT32_ERROR
        if mine.dtype != torch.float32:
            allowed += HALF_PRECISION_RATIO * relative_error(other.to(mine.dtype), truth)
        assert error <= allowed, f"result or gradient {i}: relative error {error:.3g}, allowed {allowed:.3g}"


def rows_apart(tensor: Tensor, gap: int) -> Tensor:
    """The same numbers with ``gap`` NaNs between rows, which nobody may read."""
    if not gap:
        return tensor
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + gap), torch.nan)
    wide[..., : tensor.shape[-1]] = tensor.detach()
    return wide[..., : tensor.shape[-1]].requires_grad_(tensor.requires_grad)


class RecordedOps(TorchDispatchMode):
    """Every call of an op of this package: its name and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "advflow":
            self.calls.append((func._schema.name.removeprefix("advflow::"), args))
        return func(*args, **(kwargs or {}))
