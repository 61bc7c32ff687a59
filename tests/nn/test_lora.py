"""The low-rank linear layer against float64 and against what PEFT computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import advflow_ext as af
from advflow_ext import reference
from advflow_ext.nn import lora_forward, lora_linear, lora_obstacle
from advflow_ext.nn.low_rank import Adapter, Base, low_rank_linears

peft = pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from tests.nn.lora_models import inputs, layer, with_adapters  # noqa: E402


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    grad: Tensor


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, adapter_dtypes: tuple[torch.dtype, ...]) -> Case:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.lists(st.integers(1, 5), max_size=3))
    features, out, rank = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, 17))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    x, grad = normal(*leading, features), normal(*leading, out)
    if leading and draw(st.booleans()):
        x, grad = normal(features, *leading).movedim(0, -1), normal(*leading, 2 * out)[..., ::2]
    # Sizes as in a trained model: the adapter adds a fraction to what the base gives.
    weight, a, b = normal(out, features) / features**0.5, normal(rank, features) / features**0.5, normal(out, rank)
    bias = normal(out).to(dtype) if draw(st.booleans()) else None
    adapter_dtype = draw(st.sampled_from(adapter_dtypes))
    scale = draw(st.sampled_from([2.0, 1.5, 0.3, 0.0]))
    b = 0.2 * b / rank**0.5
    return Case(x.to(dtype), weight.to(dtype), bias, a.to(adapter_dtype), b.to(adapter_dtype), scale, grad.to(dtype))


def run(function: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """Output, and gradients to x, A and B."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (case.x, case.a, case.b))
    out = function(x, case.weight, case.bias, a, b, case.scale)
    out.backward(case.grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in (x, a, b))]  # type: ignore[list-item]


def exact(case: Case) -> list[Tensor]:
    doubles = [t.double() if isinstance(t, Tensor) else t for t in case]
    return run(reference.lora_linear, Case(*doubles))  # type: ignore[arg-type]


def sizes(case: Case) -> list[float]:
    """Norms of the same without signs: what the products add up to before they cancel."""
    return [t.norm().item() for t in exact(Case(*(t.abs() if isinstance(t, Tensor) else t for t in case)))]


def error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).norm().item() / max(truth.norm().item(), 1e-30)


@given(case=cases(torch.float32, (torch.float32, torch.float64)))
def test_float32_is_exact_to_its_rounding(case: Case) -> None:
    found = run(lora_linear, case)
    for name, tensor, truth, size in zip(("out", "x", "a", "b"), found, exact(case), sizes(case), strict=True):
        assert (tensor.double() - truth).norm() <= 1e-6 * size, name
    assert [t.dtype for t in found] == [case.x.dtype, case.x.dtype, case.a.dtype, case.b.dtype]
    assert found[0].shape == case.grad.shape


@given(case=cases(torch.bfloat16, (torch.bfloat16, torch.float32)))
def test_bfloat16_is_as_good_as_peft_s_own(case: Case) -> None:
    """PEFT's in the same dtypes: with adapters of bf16, or under autocast, which makes bf16 of those of fp32."""

    def peft_s(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.a.dtype == torch.float32):
            return reference.lora_linear(*arguments)  # type: ignore[arg-type]

    found, stock = run(lora_linear, case), run(peft_s, case)
    for ours, theirs, truth, size in zip(found, stock, exact(case), sizes(case), strict=True):
        # Of a few numbers the rounding may fall either way; half a unit in the last place of bf16 is 2^-9.
        allowed = max(1.5 * (theirs.double() - truth).norm().item(), 2**-9 * size)
        assert (ours.double() - truth).norm() <= allowed


def test_many_bfloat16_samples_are_no_worse_than_peft_s() -> None:
    """The same over enough numbers that chance is out of it."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(512, 256), torch.randn(192, 256) / 16, torch.randn(512, 192)
    a, b = torch.randn(32, 256) / 16, torch.randn(192, 32) / 6
    case = Case(*(t.bfloat16() for t in (x, weight)), None, a, b, 1.3, grad.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, under_autocast = run(reference.lora_linear, case), run(lora_linear, case)
    for plain, cast, their, right in zip(run(lora_linear, case), under_autocast, theirs, exact(case), strict=True):
        assert error(plain, right) <= 1.05 * error(their, right)
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias: bool) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (2, 5), (4, 2)))
    weight, offset = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if bias else None
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, offset, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_only_what_requires_a_gradient_gets_one_and_only_what_that_needs_is_saved(wanted: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(s, requires_grad=i in wanted) for i, s in enumerate([(6, 8), (3, 8), (5, 3)])]
    weight = torch.randn(5, 8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = lora_linear(tensors[0], weight, None, tensors[1], tensors[2], 2.0)
    own = {t.data_ptr() for t in (*tensors, weight)}
    activations = [t.shape for t in saved if t.data_ptr() not in own]
    assert activations == ([(6, 3)] if 2 in wanted else [])
    assert (tensors[0].data_ptr() in {t.data_ptr() for t in saved}) == (1 in wanted)
    grads = torch.autograd.grad(out.sum(), [tensors[i] for i in wanted], retain_graph=True)
    plain = reference.lora_linear(tensors[0], weight, None, tensors[1], tensors[2], 2.0)
    for ours, theirs in zip(grads, torch.autograd.grad(plain.sum(), [tensors[i] for i in wanted]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_an_adapter_of_zeros_is_the_base_to_the_bit(dtype: torch.dtype, strided: bool) -> None:
    """Learner and reference are then the same policy, and must be the same numbers."""
    torch.manual_seed(0)
    x = torch.randn(3, 48, 17).mT if strided else torch.randn(3, 17, 48)
    x, weight, bias = x.to(dtype), torch.randn(40, 48).to(dtype), torch.randn(40).to(dtype)
    a, b = torch.randn(4, 48, requires_grad=True), torch.zeros(40, 4, requires_grad=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert torch.equal(lora_linear(x, weight, bias, a, b, 2.0), F.linear(x, weight, bias))


def test_a_base_that_trains_too_gets_its_gradients() -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = (torch.randn(s, requires_grad=True) for s in ((6, 8), (5, 8), (5,), (3, 8), (5, 3)))
    out = lora_linear(x, weight, bias, a, b, 2.0).square().sum()
    plain = (F.linear(x, weight, bias) + 2.0 * x @ a.t() @ b.t()).square().sum()
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight, bias, a, b)) for y in (out, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_to_one_graph(backend: str, autocast: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, requires_grad=True) for s in ((2, 6, 8), (3, 8), (5, 3)))
    weight = torch.randn(5, 8)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return lora_linear(x, weight, None, a, b, 0.5)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-2 if autocast else 1e-6, atol=1e-2)
    grads = [torch.autograd.grad(f(x).float().sum(), (x, a, b)) for f in (compiled, function)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if autocast else 1e-6, atol=1e-2 if autocast else 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_survive_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, requires_grad=True) for s in ((6, 8), (3, 8), (5, 3)))
    weight = torch.randn(5, 8)

    def function(x: Tensor) -> Tensor:
        return lora_linear(x, weight, None, a, b, 0.5).square()

    grads = []
    for out in (function(x), checkpoint(function, x, use_reentrant=reentrant)):
        for tensor in (x, a, b):
            tensor.grad = None
        out.sum().backward()
        grads.append([tensor.grad for tensor in (x, a, b)])
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": torch.zeros(5, 7)}, r"weight has shape \[5, 7\]; accepted for x \[6, 8\] is \['any', 8\]"),
        ({"lora_a": torch.zeros(8)}, r"lora_a has shape \[8\]; accepted for x \[6, 8\] is \['any', 8\]"),
        ({"lora_b": torch.zeros(5, 4)}, r"lora_b has shape \[5, 4\]; accepted for x \[6, 8\] is \[5, 3\]"),
        ({"weight": torch.zeros(5, 8).bfloat16()}, r"x is torch.float32 and weight torch.bfloat16; accepted without"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Tensor], sentence: str) -> None:
    good = {"x": torch.zeros(6, 8), "weight": torch.zeros(5, 8), "lora_a": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=sentence):
        lora_linear(**(good | {"lora_b": torch.zeros(5, 3)} | change), bias=None, scale=1.0)  # type: ignore[arg-type]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [("one",), ("one", "two")])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, True),
    ],
    ids=["fp32", "bf16", "fp32 adapters on bf16", "fp32 under autocast"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_transformer_gives_peft_s_outputs_and_gradients(
    adapters: tuple[str, ...],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    autocast: bool,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_adapters(*adapters, dtype=dtype, adapter_dtype=adapter_dtype, lora_alpha=3)
    model.set_adapter(list(adapters))
    if checkpointing:
        model.enable_gradient_checkpointing()
    arguments = inputs(dtype)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(*arguments, return_dict=False)[0]
        out.float().square().mean().backward()
        return out.detach(), gradients(model)

    stock_out, stock_gradients = step()

    def not_covered(layer: torch.nn.Module, x: Tensor) -> Tensor:
        raise AssertionError(f"the stock forward was asked: {lora_obstacle(layer)}")

    linear = peft.tuners.lora.layer.Linear
    monkeypatch.setattr(linear, "forward", lambda layer, x: lora_forward(layer, x, stock=not_covered))
    out, found = step()
    low = autocast or dtype == torch.bfloat16
    assert error(out, stock_out.double()) <= (1e-2 if low else 1e-6)
    assert found.keys() == stock_gradients.keys() and len(found) == 2 * 11 * len(adapters)
    for name, gradient in found.items():
        assert gradient.dtype == stock_gradients[name].dtype
        assert error(gradient, stock_gradients[name].double()) <= (3e-2 if low else 1e-5), name


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "Adapter 'default' is DoRA."),
        ({"lora_bias": True}, "Adapter 'default' has a bias."),
        ({"lora_dropout": 0.5}, "Adapter 'default' has a dropout, and the layer is in training mode."),
        ({"arrow_config": peft.ArrowConfig()}, "Adapter 'default' is the LoRA variant ArrowLinearVariant."),
    ],
)
def test_what_it_does_not_cover_is_peft_s_and_the_reason_a_sentence(
    settings: dict[str, object], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "arrow_config" in settings:
        one = layer()
        one.lora_variant["default"] = peft.tuners.lora.variants.ArrowLinearVariant()
        monkeypatch.setattr(type(one), "forward", lambda self, x: x)
    else:
        one = layer(**settings)
    assert lora_obstacle(one.train()) == sentence
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    stock = one(x)
    torch.manual_seed(1)
    assert torch.equal(lora_forward(one, x), stock)


def test_state_is_looked_at_at_every_call() -> None:
    one, x = layer(lora_dropout=0.5), torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    one.eval()
    assert lora_obstacle(one) is None
    torch.testing.assert_close(lora_forward(one, x), one(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(lora_forward(one, x, adapter_names=["default", "__base__", "default"])[1], one.base_layer(x)[1])
    one.enable_adapters(False)
    assert torch.equal(lora_forward(one, x), one.base_layer(x))
    one.enable_adapters(True)
    one.set_adapter("another")
    assert torch.equal(lora_forward(one, x), one.base_layer(x))
    one.set_adapter("default")
    unmerged = one(x)
    one.merge()
    assert lora_obstacle(one) == "PEFT has merged its adapters into the base weight."
    assert torch.equal(lora_forward(one, x), one(x))
    torch.testing.assert_close(lora_forward(one, x), unmerged, rtol=1e-4, atol=1e-5)


def test_hooks_and_other_layers_are_left_alone() -> None:
    one = layer()
    assert lora_obstacle(one.base_layer) == "Linear is not PEFT's LoRA Linear."
    handle = one.base_layer.register_forward_hook(lambda module, arguments, out: out + 1)
    assert lora_obstacle(one) == "Its base layer has hooks or is a Linear, not a plain Linear."
    handle.remove()
    one.lora_A["default"].forward = one.lora_A["default"].forward
    assert lora_obstacle(one) == "A matrix of adapter 'default' has hooks or is a Linear, not a plain Linear."
    fan = layer()
    assert lora_obstacle(fan) is None
    fan.fan_in_fan_out = True
    assert lora_obstacle(fan) == "Its base weight is transposed (fan_in_fan_out)."


def test_patched_blocks_compile_whole_and_switch_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, {"learner": "one", "rollout": "two", "reference": None}, merged_bytes=2**20)
    arguments = inputs()

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.no_grad():
            found = []
            for role, merged in (("reference", False), ("rollout", True), ("rollout", False)):
                with policies.use(role, merged=merged):
                    found.append(model(*arguments, return_dict=False)[0])
        out = model(*arguments, return_dict=False)[0]
        out.square().mean().backward()
        return [*found, out.detach(), *gradients(model).values()]

    stock = step()
    linear = peft.tuners.lora.layer.Linear
    real = linear.forward
    monkeypatch.setattr(linear, "forward", lambda layer, x: lora_forward(layer, x, stock=real))
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(step(), stock, strict=True):
        assert error(ours, theirs.double()) <= 1e-5
    assert len(stock) == 4 + 2 * 11


def test_a_patched_layer_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    one, x = layer(), torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: lora_forward(one, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), one(x))
    compiled(x).sum().backward()
    assert one.lora_A["default"].weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), one(x))


def test_adapters_expanded_over_samples_get_the_gradient_of_each() -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(3, 5, 8), torch.randn(6, 8), torch.randn(3, 5, 6)
    pairs = [(torch.randn(2, 8), torch.randn(6, 2)) for _ in range(2)]
    expanded = [(a.expand(3, 2, 8).requires_grad_(), b.expand(3, 6, 2).requires_grad_()) for a, b in pairs]

    def run(x: Tensor, matrices: list[tuple[Tensor, Tensor]]) -> Tensor:
        adapters = [(layer, Adapter(a, b, 1.5)) for layer, (a, b) in enumerate(matrices)]
        return torch.stack(low_rank_linears(x, [Base(weight, None)] * 2, adapters, x.dtype)).sum(0)

    out = run(x, expanded)
    out.backward(grad)
    assert torch.equal(out.detach(), run(x, pairs))
    for sample in range(3):
        alone = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in pairs]
        run(x[sample : sample + 1], alone).backward(grad[sample : sample + 1])
        for (a, b), (all_a, all_b) in zip(alone, expanded, strict=True):
            torch.testing.assert_close(all_a.grad[sample], a.grad, rtol=1e-5, atol=1e-5)  # type: ignore[index]
            torch.testing.assert_close(all_b.grad[sample], b.grad, rtol=1e-5, atol=1e-5)  # type: ignore[index]
    with pytest.raises(ValueError, match="an adapter is expanded over 3 samples; accepted are those of x, 2"):
        run(x[:2], expanded)
