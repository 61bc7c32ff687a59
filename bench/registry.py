"""What can be measured: op -> inputs, byte count, implementations, and the fp64 answer they must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import advflow_ext as af

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OURS = "ours"

Arguments = dict[str, Any]
Result = tuple[Tensor, Tensor]  # loss, gradient
Implementation = Callable[[Arguments], Result]


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: str
    with_ref: bool

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {shape} {self.dtype} {'with' if self.with_ref else 'no'} v_ref"


class Op(Protocol):
    default_shapes: list[tuple[int, ...]]

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments: ...

    def bytes_moved(self, case: Case) -> int: ...

    def implementations(self) -> dict[str, Implementation]: ...

    def check(self, case: Case, arguments: Arguments, result: Result) -> Check: ...


@dataclass(frozen=True)
class Check:
    """Errors against fp64 on the same rounded inputs."""

    loss_error: float  # relative to the mean magnitude of the samples' losses, which may cancel
    grad_error: float  # ||grad - exact|| / ||exact||
    limit: float

    @property
    def green(self) -> bool:
        # Written so that NaN is red.
        return self.loss_error <= 1e-6 and self.grad_error <= self.limit


def gradient_limit(dtype: torch.dtype) -> float:
    """What one rounding to ``dtype`` may cost at most, on top of 1e-6 for fp32 arithmetic."""
    return 1e-6 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


def plain_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None,
    gamma: float,
    lam: float,
) -> Tensor:
    """The loss as a trainer would write it: no checks, no metrics, no care for non-finite samples."""

    def deviation(anchor: Tensor) -> Tensor:
        return (v.float() - anchor).square().flatten(1).mean(1)

    loss = advantages * deviation(noise.float() - x0.float()) + gamma * deviation(v_old.float())
    if v_ref is not None:
        loss = loss + lam * deviation(v_ref.float())
    return (t.square() * loss).mean()


class AdvantageFlowLoss:
    """Forward and backward of ``advantage_flow_loss`` with the gradient of v alone."""

    default_shapes = [(8, 16, 64, 64), (9, 16, 64, 64), (8, 1024, 64)]

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)

        def latent() -> Tensor:
            return torch.randn(case.shape, generator=generator).to(device, DTYPES[case.dtype])

        batch = case.shape[0]
        return {
            "v": latent().requires_grad_(),
            "x0": latent(),
            "noise": latent(),
            "t": (0.05 + 0.95 * torch.rand(batch, generator=generator)).to(device),
            "advantages": torch.randn(batch, generator=generator).clamp(-1, 1).to(device),
            "v_old": latent(),
            "v_ref": latent() if case.with_ref else None,
            "gamma": 1.1,
            "lam": 1e-3,
        }

    def bytes_moved(self, case: Case) -> int:
        """Every input read once for the loss and once for the gradient, the gradient written once."""
        inputs = 5 if case.with_ref else 4
        return (2 * inputs + 1) * torch.Size(case.shape).numel() * DTYPES[case.dtype].itemsize

    def implementations(self) -> dict[str, Implementation]:
        def with_gradient(loss: Callable[..., Tensor]) -> Implementation:
            def run(arguments: Arguments) -> Result:
                value = loss(**arguments)
                (grad,) = torch.autograd.grad(value, arguments["v"])
                return value.detach(), grad

            return run

        def ours(**arguments: Any) -> Tensor:
            return af.advantage_flow_loss(**arguments).loss

        def reference(**arguments: Any) -> Tensor:
            return af.reference.advantage_flow_loss(**arguments).loss

        return {
            OURS: with_gradient(ours),
            "eager": with_gradient(reference),
            "compile": with_gradient(torch.compile(reference, dynamic=False)),
            "plain eager": with_gradient(plain_loss),
            "plain compile": with_gradient(torch.compile(plain_loss, dynamic=False)),
        }

    def check(self, case: Case, arguments: Arguments, result: Result) -> Check:
        exact_arguments: Arguments = {
            name: value.detach().cpu().double() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        exact_arguments["v"].requires_grad_()
        losses = af.reference.advantage_flow_loss(**exact_arguments, reduction="none").loss
        (exact_grad,) = torch.autograd.grad(losses.mean(), exact_arguments["v"])
        losses = losses.detach()
        loss, grad = (tensor.detach().cpu().double() for tensor in result)
        return Check(
            loss_error=float((loss - losses.mean()).abs() / losses.abs().mean()),
            grad_error=float((grad - exact_grad).norm() / exact_grad.norm()),
            limit=gradient_limit(DTYPES[case.dtype]),
        )


OPS: dict[str, Op] = {"advantage_flow_loss": AdvantageFlowLoss()}


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """``"8x16x64x64,8x1024x64"`` -> [(8, 16, 64, 64), (8, 1024, 64)]."""
    shapes = []
    for item in text.split(","):
        try:
            shape = tuple(int(size) for size in item.strip().split("x"))
        except ValueError:
            shape = ()
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape {item.strip()!r}: expected at least two positive sizes joined by x, as 8x16x64x64")
        shapes.append(shape)
    return shapes


def cases(ops: list[str], shapes: list[tuple[int, ...]] | None, dtypes: list[str], refs: list[bool]) -> Iterator[Case]:
    for op in ops:
        for shape in shapes or OPS[op].default_shapes:
            for dtype in dtypes:
                for with_ref in refs:
                    yield Case(op, shape, dtype, with_ref)
