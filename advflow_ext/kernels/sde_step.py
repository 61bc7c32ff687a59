"""The compiled sampler step: its shapes for tracing, and a typed entry for the public op."""

from __future__ import annotations

import torch
from torch import Tensor

from advflow_ext import _native
from advflow_ext.contract.checks import FLOAT_DTYPES
from advflow_ext.kernels.raw_checks import check_latents, check_like, check_scalars, check_served


def _register_fake() -> None:
    @torch.library.register_fake("advflow::sde_step")  # type: ignore[untyped-decorator]
    def sde_step_shapes(
        v: Tensor,
        x: Tensor,
        coef: Tensor,
        noise: Tensor | None,
        seed: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if (noise is None) == (seed is None):
            given = "Neither" if noise is None else "Both"
            raise RuntimeError(f"{given} of noise and seed given; accepted is exactly one of them.")
        accumulate = check_latents("sde_step", {"v": v, "x": x}, {"noise": noise})
        if seed is not None:
            check_like("seed", seed, v.shape[:1], torch.int64, v, "v")
        stored = dtype or x.dtype
        if stored not in FLOAT_DTYPES:
            raise RuntimeError(f"dtype is {stored}; accepted are float32, float16, bfloat16 and float64.")
        x_next, eps = (x.new_empty(x.shape, dtype=stored) for _ in range(2))
        if stored == torch.float64:
            accumulate = stored
            check_served("sde_step", accumulate, v)
        check_scalars(coef, None, v, accumulate)
        return x_next, eps, v.new_empty((v.shape[0],), dtype=accumulate)


if _native.module is not None:
    _register_fake()


def sde_step_op(
    v: Tensor, x: Tensor, coef: Tensor, noise: Tensor | None, seed: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_next``, ``eps`` (``x``'s shape, ``dtype``) and ``eps_sq`` ``[N]`` of one sampler step, without gradient.

    ``coef`` ``[N, 3]`` is (c_x, c_v, sigma) in the accumulate dtype: float32, or float64 as soon as a tensor or
    ``dtype`` is float64. With mean = c_x x + c_v v, x_next = mean + sigma noise rounded to ``dtype`` (default ``x``'s),
    eps = (x_next - mean) / sigma of the rounded x_next, eps_sq = <eps^2> before eps is rounded. Where sigma is 0,
    x_next is the mean, eps and eps_sq are 0, and noise is not read.

    Exactly one of ``noise`` (``x``'s shape) and ``seed`` (int64 ``[N]``) is given. A seed's noise is that of
    csrc/math/philox.h: it depends on the seed and on the element's index alone, CPU and CUDA draw the same integers,
    and their normals agree to a few units in the last place of float32. A row depends on its own sample only.
    """
    others = (None if tensor is None else tensor.detach() for tensor in (noise, seed))
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.advflow.sde_step.default(
        v.detach(), x.detach(), coef.detach(), *others, dtype
    )
    return outputs
