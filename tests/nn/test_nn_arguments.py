"""What the ops of the blocks refuse, in one sentence and before anything runs; native and reference alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advflow_ext as af
from tests.nn.lora_models import layer

INF, NAN = float("inf"), float("nan")
X, S = torch.randn(2, 3, 32), torch.randn(2, 32)
WEIGHT, A, B = torch.randn(8, 32), torch.randn(4, 32), torch.randn(8, 4)

OPS: dict[str, Callable[..., Any]] = {
    "layer_norm_modulate": lambda m, **more: m.layer_norm_modulate(X, (S, S), **more),
    "gate_residual_layer_norm_modulate": lambda m, **more: m.gate_residual_layer_norm_modulate(
        X, [(X, S)], (S, S), **more
    ),
    "joint_qk_norm": lambda m, **more: m.joint_qk_norm(
        **({"q": X, "k": X, "v": X, "weight_q": torch.ones(16), "weight_k": torch.ones(16), "heads": 2} | more)
    ),
    "lora_linear": lambda m, **more: m.lora_linear(
        **({"x": X, "weight": WEIGHT, "bias": None, "lora_a": A, "lora_b": B, "scale": 0.5} | more)
    ),
}
WITH_EPS = ("layer_norm_modulate", "gate_residual_layer_norm_modulate", "joint_qk_norm")
WITH_DTYPE = WITH_EPS[:2]
both = pytest.mark.parametrize("module", [af.nn, af.reference])


@both
@pytest.mark.parametrize("op", WITH_EPS)
@pytest.mark.parametrize("eps", [NAN, INF, -INF, -1e-6, True, "1e-6", None, torch.tensor(1e-6)])
def test_epsilon(module: Any, op: str, eps: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"eps is {eps!r}; accepted is a finite number of at least 0.")):
        OPS[op](module, eps=eps)


@both
@pytest.mark.parametrize(("op", "name"), [(op, "eps") for op in WITH_EPS] + [("lora_linear", "scale")])
def test_what_float32_cannot_hold(module: Any, op: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is 1e\+300; accepted is a number that torch.float32 holds"):
        OPS[op](module, **{name: 1e300})


@both
def test_float64_holds_it(module: Any) -> None:
    x, s = X.double(), S.double()
    (y,) = module.layer_norm_modulate(x, (s, s), eps=1e300)
    torch.testing.assert_close(y, (1e-150 * (x - x.mean(-1, keepdim=True))) * (1 + s[:, None]) + s[:, None])


@both
@pytest.mark.parametrize("op", WITH_DTYPE)
@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", 1]
)
def test_dtype_of_the_results(module: Any, op: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"dtype is {dtype!r}; accepted are None, torch.float32, torch.f")):
        OPS[op](module, dtype=dtype)


@both
@pytest.mark.parametrize("op", WITH_DTYPE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_that_are_served(module: Any, op: str, dtype: torch.dtype) -> None:
    y = OPS[op](module, dtype=dtype)[-1]
    exact = OPS[op](af.reference, dtype=torch.float32)[-1]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-5)


BAD: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m.layer_norm_modulate(X, S), "modulation 1 is a Tensor; accepted is a tuple (scale, shift)."),
    (lambda m: m.layer_norm_modulate(X, (S, S, S)), "modulation 1 is 3 values; accepted is a tuple (scale, shift)."),
    (
        lambda m: m.layer_norm_modulate(X, (S, None)),
        "shift of modulation 1 is a NoneType; accepted is a",
    ),
    (lambda m: m.layer_norm_modulate(X, (S, S.long())), "shift of modulation 1 has dtype torch.int64"),
    (lambda m: m.layer_norm_modulate(X[..., :0], (S[:, :0],) * 2), "x has shape [2, 3, 0]; accepted is"),
    (lambda m: m.layer_norm_modulate(X.to(torch.complex64), (S, S)), "x has dtype torch.complex64"),
    (lambda m: m.layer_norm_modulate(X.bool(), (S, S)), "x has dtype torch.bool"),
    (lambda m: m.layer_norm_modulate([1.0], (S, S)), "x is a list; accepted is a floating-point torch.Tensor."),
    (lambda m: m.gate_residual(X), "0 branches are given; accepted are one or two."),
    (lambda m: m.gate_residual(X, X), "branch 1 is a Tensor; accepted is a tuple (x, gate)."),
    (lambda m: m.gate_residual(X, (X.to("meta"), S)), "x of branch 1 is on meta; accepted is cpu"),
    (lambda m: m.gate_residual_layer_norm_modulate(X, [], (S, S)), "0 branches are given; accepted are one or two."),
    (lambda m: m.gate_residual_layer_norm_modulate(X, X, (S, S)), "branches is a Tensor; accepted is a list of one or"),
    (lambda m: m.gate_residual_layer_norm_modulate(X, None, (S, S)), "branches is a NoneType; accepted is a list of"),
    (lambda m: m.gate_residual_layer_norm_modulate(X, (X, S), (S, S)), "branch 1 is a Tensor; accepted is a tuple (x,"),
    (lambda m: m.gate_residual_layer_norm_modulate(X, [(X, S)], None), "modulation 1 is a NoneType; accepted is a"),
    (lambda m: OPS["joint_qk_norm"](m, heads=0), "heads is 0; accepted is a positive divisor of q's width 32."),
    (lambda m: OPS["joint_qk_norm"](m, heads=True), "heads is True; accepted is a positive divisor"),
    (lambda m: OPS["joint_qk_norm"](m, heads=2.0), "heads is 2.0; accepted is a positive divisor"),
    (lambda m: OPS["joint_qk_norm"](m, weight_q=None), "weight_q is a NoneType; accepted is a floating-point"),
    (lambda m: OPS["joint_qk_norm"](m, weight_q=torch.ones(16).int()), "weight_q has dtype torch.int32"),
    (
        lambda m: OPS["joint_qk_norm"](m, text=(X, X), text_weights=(torch.ones(16),) * 2),
        "text is 2 values; accepted is a tuple (q, k, v).",
    ),
    (
        lambda m: OPS["joint_qk_norm"](m, text=(X, X, X), text_weights=torch.ones(2, 16)),
        "text_weights is a Tensor; accepted is a tuple (weight of q, weight of k).",
    ),
    (lambda m: OPS["lora_linear"](m, x=X.int()), "x has dtype torch.int32; accepted are float32"),
    (lambda m: OPS["lora_linear"](m, x=torch.tensor(1.0)), "x has shape []; accepted is [..., in]."),
    (lambda m: OPS["lora_linear"](m, x=X.tolist()), "x is a list; accepted is a floating-point torch.Tensor."),
    (lambda m: OPS["lora_linear"](m, weight=WEIGHT.to(torch.int8)), "weight has dtype torch.int8"),
    (lambda m: OPS["lora_linear"](m, weight=WEIGHT.half()), "x is torch.float32 and weight torch.float16; accepted"),
    (lambda m: OPS["lora_linear"](m, weight=WEIGHT.to("meta")), "weight is on meta; accepted is cpu"),
    (lambda m: OPS["lora_linear"](m, lora_b=B.to("meta")), "lora_b is on meta; accepted is cpu"),
    (lambda m: OPS["lora_linear"](m, lora_a=A.half()), "lora_a is torch.float16 and lora_b torch.float32; accepted"),
    (lambda m: OPS["lora_linear"](m, lora_a=None), "lora_a is a NoneType; accepted is a floating-point"),
    (lambda m: OPS["lora_linear"](m, bias=torch.zeros(7)), "bias has shape [7]; accepted is [rows of weight], [8]."),
    (
        lambda m: OPS["lora_linear"](m, bias=torch.zeros(8).half()),
        "x is torch.float32 and bias torch.float16;",
    ),
    (lambda m: OPS["lora_linear"](m, scale=NAN), "scale is nan; accepted is a finite number."),
    (lambda m: OPS["lora_linear"](m, scale=-INF), "scale is -inf; accepted is a finite number."),
    (lambda m: OPS["lora_linear"](m, scale=True), "scale is True; accepted is a finite number."),
    (lambda m: OPS["lora_linear"](m, scale="2"), "scale is '2'; accepted is a finite number."),
]


@both
@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_arguments_are_named(module: Any, call: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(module)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2"])
def test_size_of_a_modulation_cache(size: Any) -> None:
    class Model(nn.Module):
        time_text_embed = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=re.escape(f"size is {size!r}; accepted is a positive integer.")):
        af.nn.ModulationCache(Model(), size)


def test_weights_that_cannot_be_merged() -> None:
    for one, name, sentence in (
        (layer(use_dora=True), "default", "layer has no merged weight. Adapter 'default' is DoRA."),
        (layer(), "other", "layer is a Linear without adapter 'other'; accepted is one that has it."),
        (nn.Linear(2, 2), "default", "layer is a Linear without adapter 'default'; accepted is one that has it."),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            af.nn.merged_weight(one, name)


def test_a_layer_that_is_not_peft_s_is_called_as_it_is() -> None:
    plain, x = nn.Linear(4, 4), torch.randn(2, 4)
    out: Tensor = af.nn.lora_forward(plain, x)
    assert torch.equal(out, plain(x))
