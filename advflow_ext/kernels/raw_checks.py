"""What the raw operators accept, as their fakes see it: what csrc/torch checks of the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from advflow_ext.contract.checks import FLOAT_DTYPES, accumulate_dtype

_FLOATS = "float32, float16, bfloat16 and float64"


def check_latents(op: str, required: Mapping[str, Tensor | None], optional: Mapping[str, Tensor | None]) -> torch.dtype:
    """The accumulate dtype of latents that fit together; the first of ``required`` is v."""
    v = required["v"]
    if v is not None and v.dim() == 0:
        raise RuntimeError("v has no dimension; accepted is a batch of samples, [B, ...].")
    given = {**required, **{name: tensor for name, tensor in optional.items() if tensor is not None}}
    for name, tensor in given.items():
        if tensor is None:
            raise RuntimeError(f"{name} is None; accepted is a tensor.")
        assert v is not None
        if tensor.shape != v.shape:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; accepted is the shape of v, {list(v.shape)}.")
        check_device(name, tensor, v, "v")
        check_float(name, tensor)
    accumulate = accumulate_dtype(*given.values())
    assert v is not None
    check_served(op, accumulate, v)
    return accumulate


def check_column(name: str, column: Tensor | None, v: Tensor, accumulate: torch.dtype) -> None:
    """One number for all samples, or one a sample; may be absent."""
    if column is None:
        return
    batch = v.shape[0]
    if column.shape not in ((), (batch,)):
        raise RuntimeError(f"{name} has shape {list(column.shape)}; accepted are [] and [{batch}].")
    check_accumulate(name, column, v, accumulate)


def check_scalars(coef: Tensor | None, upstream: Tensor | None, v: Tensor, accumulate: torch.dtype) -> None:
    batch = v.shape[0]
    if coef is None:
        raise RuntimeError("coef is None; accepted is a tensor.")
    if coef.shape != (batch, 3):
        raise RuntimeError(f"coef has shape {list(coef.shape)}; accepted is [{batch}, 3].")
    check_accumulate("coef", coef, v, accumulate)
    check_column("upstream", upstream, v, accumulate)


def check_like(
    name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype, other: Tensor, other_name: str = "stats"
) -> None:
    """``other``: the tensor whose device it has to share."""
    if tensor is None:
        raise RuntimeError(f"{name} is None; accepted is a tensor.")
    if tensor.shape != tuple(shape):
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}; accepted is {list(shape)}.")
    if tensor.dtype != dtype:
        raise RuntimeError(f"{name} has dtype {tensor.dtype}; accepted is {dtype}.")
    check_device(name, tensor, other, other_name)


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise RuntimeError(f"{name} has dtype {tensor.dtype}; accepted are {_FLOATS}.")


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    if tensor.device != other.device:
        raise RuntimeError(f"{name} is on {tensor.device}; accepted is the device of {other_name}, {other.device}.")


def check_served(op: str, accumulate: torch.dtype, tensor: Tensor) -> None:
    if accumulate == torch.float64 and tensor.is_cuda:
        raise RuntimeError(
            f"{op} received float64 on CUDA; accepted there are float32, float16 and bfloat16 (float64 is served on "
            "CPU)."
        )


def check_accumulate(name: str, tensor: Tensor, v: Tensor, accumulate: torch.dtype) -> None:
    if tensor.dtype != accumulate:
        raise RuntimeError(
            f"{name} has dtype {tensor.dtype}; accepted is the accumulate type of the inputs, {accumulate}."
        )
    check_device(name, tensor, v, "v")
