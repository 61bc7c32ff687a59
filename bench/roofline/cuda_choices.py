"""Tensors on a CPU, kernels as on a GPU: what PyTorch would pick for CUDA tensors, for traces without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("bench::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension in fp32, contiguous, and the fp32 reciprocal root."""
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    y = x.float() * rstd
    return (y if weight is None else y * weight).to(x.dtype).contiguous(), rstd.contiguous()


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("bench::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    normalised = x.float() * rstd
    grad_normalised = grad.float() if weight is None else grad.float() * weight
    along = (normalised * grad_normalised).mean(-1, keepdim=True)
    return (rstd * (grad_normalised - normalised * along)).to(x.dtype).contiguous()


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, output[1], weight)


def _differentiate(ctx: Any, grad: Tensor, _grad_rstd: Tensor) -> tuple[Tensor, None, None]:
    return _rms_norm_backward(grad, *ctx.saved_tensors), None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)


class CudaChoices(TorchFunctionMode):
    """Within it, attention without a mask is flash attention, and `F.rms_norm` over the last dimension is one fused op.

    Tensors that claim to be on a GPU would make PyTorch choose by itself, but its autograd refuses them where there is
    none. Weights of a norm are taken for frozen: they get no gradient.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and len(args) in (0, 3) and kwargs.get("attn_mask") is None:
            qkv = args or tuple(kwargs[name] for name in ("query", "key", "value"))
            causal = kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_flash_attention(
                *qkv, kwargs.get("dropout_p", 0.0), causal, scale=kwargs.get("scale")
            )[0]
        if function is F.rms_norm:
            return _fused_rms_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _fused_rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    if len(normalized_shape) != 1 or (weight is not None and weight.requires_grad):
        raise ValueError("F.rms_norm: traced are only norms over the last dimension with a frozen weight or none")
    normalised: Tensor = _rms_norm(x, weight, eps)[0]
    return normalised
