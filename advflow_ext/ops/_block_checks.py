"""Argument checks shared by every implementation of a transformer op, so that all of them refuse the same calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from advflow_ext.ops._checks import require_choice, require_float_tensor
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
    require_number("eps", eps, low=0.0)
    _require_dtype_of("q", q, {"k": k, "v": v})
    weights = {"weight_q": weight_q, "weight_k": weight_k}
    if (text is None) != (text_weights is None):
        raise ValueError("text and text_weights are given together or not at all.")
    if text is not None and text_weights is not None:
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
    branches: Sequence[tuple[Tensor, Tensor]],
    modulations: Sequence[tuple[Tensor, Tensor]],
    eps: float,
) -> None:
    _require_tokens("residual" if branches else "x", residual)
    per_sample = (residual.shape[0], residual.shape[2])
    require_number("eps", eps, low=0.0)
    for what, pairs in {"branches": branches, "modulations": modulations}.items():
        if len(pairs) > 2:
            raise ValueError(f"{len(pairs)} {what} are given; accepted are one or two.")
    if not branches and not modulations:
        raise ValueError("No branches and no modulations are given; accepted are one or two.")
    for i, (x, gate) in enumerate(branches, 1):
        _require_shape(f"x of branch {i}", x, residual.shape, "that of residual", residual)
        _require_shape(f"gate of branch {i}", gate, per_sample, "[B, C]", residual)
        _require_dtype_of("x of branch 1", branches[0][0], {f"x of branch {i}": x})
    for i, (scale, shift) in enumerate(modulations, 1):
        _require_shape(f"scale of modulation {i}", scale, per_sample, "[B, C]", residual)
        _require_shape(f"shift of modulation {i}", shift, per_sample, "[B, C]", residual)


def _require_tokens(name: str, value: Tensor) -> None:
    require_float_tensor(name, value)
    if value.dim() != 3:
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
