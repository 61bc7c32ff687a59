"""Argument checks shared by every implementation of a transformer op, so that all of them refuse the same calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advflow_ext.ops._checks import FLOAT_DTYPES, require_choice, require_float_tensor
from advflow_ext.ops._numbers import require_number

_MOST_ROWS = 2**31 - 2**10  # the kernel counts them in int32, and up to the end of its last tile


def joint_qk_norm_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    eps: float,
    text: tuple[Tensor, Tensor, Tensor] | None,
    text_weights: tuple[Tensor, Tensor] | None,
    keep: str,
) -> None:
    _require_tokens("q", q)
    for name, value in {"k": k, "v": v}.items():
        _require_shape(name, value, q.shape, "that of q", q)
    width = q.shape[2]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"heads is {heads!r}; accepted is a positive divisor of q's width {width}.")
    _require_eps(eps, q)
    _require_dtype_of("q", q, {"k": k, "v": v})
    weights = {"weight_q": weight_q, "weight_k": weight_k}
    if (text is None) != (text_weights is None):
        raise ValueError("text and text_weights are given together or not at all.")
    if text is not None and text_weights is not None:
        _require_several("text", text, ("q", "k", "v"))
        _require_several("text_weights", text_weights, ("weight of q", "weight of k"))
        _require_tokens("text[0]", text[0])
        _require_shape("text[0]", text[0], (q.shape[0], text[0].shape[1], width), "[B, M, width of q]", q)
        for name, value in (("text[1]", text[1]), ("text[2]", text[2])):
            _require_shape(name, value, text[0].shape, "that of text[0]", q)
        _require_dtype_of("q", q, {"text[0]": text[0], "text[1]": text[1], "text[2]": text[2]})
        weights |= {"text_weights[0]": text_weights[0], "text_weights[1]": text_weights[1]}
    for name, weight in weights.items():
        _require_shape(name, weight, (width // heads,), "[width of q / heads]", q)
    require_choice("keep", keep, ("inputs", "outputs"))
    if keep == "outputs" and any(weight.requires_grad for weight in weights.values()):
        raise ValueError("keep is 'outputs' and a weight asks for a gradient; accepted is then 'inputs'.")
    rows = q.shape[0] * heads * (q.shape[1] + (text[0].shape[1] if text is not None else 0))
    if rows >= _MOST_ROWS:
        raise ValueError(f"q and text hold {rows} heads of tokens; accepted are fewer than {_MOST_ROWS}.")


def adaln_arguments(
    residual: Tensor,
    branches: Sequence[tuple[Tensor, Tensor]] | None,
    modulations: Sequence[tuple[Tensor, Tensor]] | None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    *,
    gated: bool = True,
) -> None:
    """No modulations: the op has none. It has branches where it is ``gated``."""
    _require_tokens("residual" if gated else "x", residual)
    per_sample = (residual.shape[0], residual.shape[2])
    _require_eps(eps, residual)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted are None, {', '.join(map(str, FLOAT_DTYPES))}.")
    if not gated and modulations == ():
        raise ValueError("No branches and no modulations are given; accepted are one or two.")
    for what, pairs in {"branches": branches, "modulations": modulations}.items():
        if pairs is None and (what == "modulations" or not gated):
            continue
        if not isinstance(pairs, (tuple, list)):
            raise ValueError(f"{what} is a {type(pairs).__name__}; accepted is a list of one or two pairs.")
        if len(pairs) not in (1, 2):
            raise ValueError(f"{len(pairs)} {what} are given; accepted are one or two.")
    for i, branch in enumerate(branches or (), 1):
        _require_several(f"branch {i}", branch, ("x", "gate"))
        x, gate = branch
        _require_shape(f"x of branch {i}", x, residual.shape, "that of residual", residual)
        _require_shape(f"gate of branch {i}", gate, per_sample, "[B, C]", residual)
        _require_dtype_of("x of branch 1", branches[0][0], {f"x of branch {i}": x})  # type: ignore[index]
    for i, modulation in enumerate(modulations or (), 1):
        _require_several(f"modulation {i}", modulation, ("scale", "shift"))
        scale, shift = modulation
        _require_shape(f"scale of modulation {i}", scale, per_sample, "[B, C]", residual)
        _require_shape(f"shift of modulation {i}", shift, per_sample, "[B, C]", residual)


def lora_linear_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> None:
    for name, tensor in {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}.items():
        require_float_tensor(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; accepted is {x.device}, where the other tensors are.")
    if x.dim() < 1:
        raise ValueError("x has shape []; accepted is [..., in].")
    for name, tensor, shape in (
        ("weight", weight, (None, x.shape[-1])),
        ("lora_a", lora_a, (None, x.shape[-1])),
        ("lora_b", lora_b, (weight.shape[0] if weight.dim() else None, lora_a.shape[0] if lora_a.dim() else None)),
    ):
        if tensor.dim() != 2 or any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
            accepted = ["any" if size is None else size for size in shape]
            raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted for x {list(x.shape)} is {accepted}.")
    if bias is not None:
        _require_shape("bias", bias, weight.shape[:1], "[rows of weight]", x)
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64  # which it leaves alone
    based = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, tensor in based.items():
        if not autocast and tensor.dtype != x.dtype:
            raise ValueError(
                f"x is {x.dtype} and {name} {tensor.dtype}; accepted without autocast is one dtype for both."
            )
    if lora_a.dtype != lora_b.dtype:
        raise ValueError(f"lora_a is {lora_a.dtype} and lora_b {lora_b.dtype}; accepted is one dtype for both.")
    require_number("scale", scale)
    _require_held("scale", scale, x)


def _require_eps(eps: float, x: Tensor) -> None:
    require_number("eps", eps, low=0.0)
    _require_held("eps", eps, x)


def _require_held(name: str, value: float, x: Tensor) -> None:
    """Refuses what the arithmetic on ``x`` would read as infinity."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if abs(value) > torch.finfo(wide).max:
        raise ValueError(
            f"{name} is {value!r}; accepted is a number that {wide} holds, in which {x.dtype} is added up."
        )


def _require_several(name: str, values: object, what: tuple[str, ...]) -> None:
    if isinstance(values, (tuple, list)) and len(values) == len(what):
        return
    given = f"{len(values)} values" if isinstance(values, (tuple, list)) else f"a {type(values).__name__}"
    raise ValueError(f"{name} is {given}; accepted is a tuple ({', '.join(what)}).")


def _require_tokens(name: str, value: Tensor) -> None:
    require_float_tensor(name, value)
    if value.dim() != 3 or not value.shape[2]:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is [batch, tokens, width].")


def _require_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str, like: Tensor) -> None:
    require_float_tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; accepted is {meaning}, {list(shape)}.")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; accepted is {like.device}, where the other tensors are.")


def _require_dtype_of(name: str, like: Tensor, others: dict[str, Tensor]) -> None:
    for other, value in others.items():
        if value.dtype != like.dtype:
            raise ValueError(f"{other} has dtype {value.dtype}; accepted is that of {name}, {like.dtype}.")
