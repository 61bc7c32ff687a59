"""Projections of one token stream as one function of it, against float64 and against the layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from advflow_ext.nn import is_lora_layer, lora_forward
from advflow_ext.nn.lora_joint import joint_lora_forward

peft = pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from tests.nn.lora_models import fill  # noqa: E402

FEATURES, OUT = 24, 20
RANKS = {"one": 4, "two": 3}


def projections(
    *adapted: int,
    adapters: Sequence[str] = ("one",),
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int] = (FEATURES, OUT),
    device: str = "cpu",
    **settings: Any,
) -> list[Any]:
    """Queries', keys' and values' layers, frozen, the last without a bias; those of ``adapted`` with LoRA adapters."""
    torch.manual_seed(0)
    layers = [nn.Linear(*sizes, bias=i < 2) for i in range(3)]
    model = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)}).to(dtype).requires_grad_(False)
    for seed, name in enumerate(adapters if adapted else ()):
        own = {"r": RANKS[name], "lora_alpha": 6, "target_modules": [str(i) for i in adapted]} | settings
        model = peft.inject_adapter_in_model(peft.LoraConfig(**own), model, name)
        fill(model, name, adapter_dtype, 0.2, seed)
    found = [model.to(device)[str(i)] for i in range(3)]
    for layer in found:
        if is_lora_layer(layer):
            layer.set_adapter(list(adapters))  # type: ignore[operator]
    return found


def one_by_one(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    return [lora_forward(layer, x) if is_lora_layer(layer) else layer(x) for layer in layers]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(layers: Sequence[Any]) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def run(
    function: Callable[[Sequence[Any], Tensor], list[Tensor]], layers: Sequence[Any], x: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs; gradients of what asks for one, for incoming ones of both signs."""
    asking = [tensor for tensor in (x, *parameters(layers)) if tensor.requires_grad]
    outs = function(layers, x)
    incoming = [normal(*out.shape, seed=i + 2).to(out) for i, out in enumerate(outs)]
    return [out.detach() for out in outs], list(torch.autograd.grad(outs, asking, incoming))


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(one.double() - other).norm().item() / other.norm().item() for one, other in zip(found, exact, strict=True)]


def in_float64(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """As :func:`run`, by autograd, of the layers as they are; their dtypes are lost."""
    for layer in layers:
        layer.double()
    outs, grads = run(lambda layers, x: [layer(x) for layer in layers], layers, x.detach().double().requires_grad_())
    return outs + grads


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "all three": ((0, 1, 2), {}),
    "some": ((0, 2), {}),
    "none": ((), {}),
    "two adapters": ((0, 1, 2), {"adapters": ("one", "two")}),
    "ranks and scales of their own": ((0, 1, 2), {"rank_pattern": {"1": 7}, "alpha_pattern": {"2": 5}}),
    "a scale of zero": ((0, 1), {"lora_alpha": 0}),
}


@pytest.mark.parametrize(("adapted", "settings"), CASES.values(), ids=CASES)
def test_float32_is_exact_to_its_rounding_and_the_same_without_gradients(
    adapted: tuple[int, ...], settings: dict[str, Any]
) -> None:
    layers, x = projections(*adapted, **settings), normal(3, 5, FEATURES).requires_grad_()
    outs, grads = run(joint_lora_forward, layers, x)
    with torch.no_grad():
        assert all(map(torch.equal, joint_lora_forward(layers, x), outs))
    assert [grad.dtype for grad in grads] == [torch.float32] * len(grads)
    for found, exact in zip(outs + grads, in_float64(layers, x), strict=True):
        assert (found.double() - exact).norm() <= 3e-7 * max(exact.norm().item(), 1e-30)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [None, "bfloat16 base", "float32 base"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_precision_is_as_good_as_the_layers_one_by_one(
    adapter_dtype: torch.dtype, autocast: str | None, device: str
) -> None:
    base = torch.float32 if autocast == "float32 base" else torch.bfloat16
    settings: dict[str, Any] = {"dtype": base, "adapter_dtype": adapter_dtype, "sizes": (96, 64), "device": device}
    settings |= {"lora_alpha": 5, "alpha_pattern": {"2": 3}}  # no powers of two
    made = [projections(0, 1, 2, **settings) for _ in range(3)]
    x = normal(1024, 96).to(device, base).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast is not None):
        outs, grads = run(joint_lora_forward, made[0], x)
        theirs = [each for part in run(one_by_one, made[1], x) for each in part]
        with torch.no_grad():
            assert all(map(torch.equal, joint_lora_forward(made[0], x), outs))
    assert [out.dtype for out in outs] == [torch.bfloat16] * 3
    assert [grad.dtype for grad in grads] == [base, *[adapter_dtype] * 6]
    exact = in_float64(made[2], x)
    ratios = [ours / their for ours, their in zip(errors(outs + grads, exact), errors(theirs, exact), strict=True)]
    assert max(ratios) <= 1.25  # of some hundred numbers each
    if base == torch.bfloat16:  # else autograd adds up in float32 what is rounded twice a layer
        assert ratios[3] <= 0.98  # the gradient of x, which is rounded four times instead of eight


@pytest.mark.parametrize("function", [joint_lora_forward, one_by_one])
def test_float16_overflows_only_where_what_is_asked_for_does(function: Any) -> None:
    """Scales of 64 and 16, and gradients of 500, as a loss scaler makes them."""
    for scale, size, of_grad, of_b in ((64, 40.0, 1e-3, 1e-3), (16, 1.0, 500.0, 0.5)):
        layers = projections(
            0, 1, 2, dtype=torch.float16, lora_alpha=scale * RANKS["one"], alpha_pattern={"2": scale * RANKS["one"] / 2}
        )
        x = torch.full((3, FEATURES), size, dtype=torch.float16, requires_grad=True)
        with torch.no_grad():
            for layer in layers:
                layer.lora_A["one"].weight.fill_(4.0 if scale == 64 else 1e-3)
                layer.lora_B["one"].weight.fill_(of_b)
        asking = [x, *parameters(layers)]
        outs = function(layers, x)
        grads = torch.autograd.grad(outs, asking, [torch.full_like(out, of_grad) for out in outs])
        inner = scale * of_grad * of_b * OUT
        assert max(scale * size * 4.0 * FEATURES, inner) > torch.finfo(torch.float16).max
        exact = in_float64_of(layers, x, of_grad)
        for found, truth in zip([*outs, *grads], exact, strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=2e-2, atol=1e-2 * truth.abs().max().item())


def in_float64_of(layers: Sequence[Any], x: Tensor, of_grad: float) -> list[Tensor]:
    for layer in layers:
        layer.double()
    x = x.detach().double().requires_grad_()
    outs = [layer(x) for layer in layers]
    grads = torch.autograd.grad(outs, [x, *parameters(layers)], [torch.full_like(out, of_grad) for out in outs])
    return [out.detach() for out in outs] + list(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_layer_do_not_depend_on_the_scales_of_its_neighbours(dtype: torch.dtype) -> None:
    x = normal(40, FEATURES).to(dtype).requires_grad_()
    alike = run(joint_lora_forward, projections(0, 1, 2, dtype=dtype, lora_alpha=5), x)
    other = run(joint_lora_forward, projections(0, 1, 2, dtype=dtype, lora_alpha=5, alpha_pattern={"2": 3}), x)
    assert torch.equal(alike[0][0], other[0][0]) and not torch.equal(alike[0][2], other[0][2])
    for place in (1, 2, 3, 4):  # A and B of the first two, after x
        assert torch.equal(alike[1][place], other[1][place])


@pytest.mark.parametrize("used", [(1,), (0, 2), (1, 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_outputs_that_nobody_uses_get_no_gradient_and_no_product(used: tuple[int, ...], batched: bool) -> None:
    layers, x = projections(0, 1, alpha_pattern={"1": 5}), normal(6, FEATURES).requires_grad_()
    asking = [x, *parameters(layers)]
    grads = []
    for function in (joint_lora_forward, one_by_one):
        outs = [function(layers, x)[i] for i in used]
        shapes = [(2, *out.shape) if batched else out.shape for out in outs]
        incoming = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
        grads.append(torch.autograd.grad(outs, asking, incoming, allow_unused=True, is_grads_batched=batched))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)  # None is close to None alone


def test_products_of_unused_outputs_are_not_made() -> None:
    layers, x = projections(0, 1), normal(6, FEATURES).requires_grad_()
    out = joint_lora_forward(layers, x)[1]
    incoming = torch.ones_like(out)
    with Recorder() as recorder:
        torch.autograd.grad(out, [x, *parameters(layers)], incoming, allow_unused=True)
    # The base, A's and B's; the inner gradient, and onto that of x; the scales. Of two A, the one.
    assert recorder.counts == {"mm": 3, "addmm_": 2, "_foreach_mul": 1, "cat": 1}


def test_each_gradient_has_a_memory_of_its_own() -> None:
    layers, x = projections(0, 1, 2), normal(6, FEATURES).requires_grad_()
    for grad in run(joint_lora_forward, layers, x)[1]:
        assert grad.untyped_storage().nbytes() == grad.nbytes


def test_gradcheck() -> None:
    layers = projections(0, 2, adapters=("one", "two"), alpha_pattern={"2": 5})
    for layer in layers:
        layer.double()
    x = normal(2, 3, FEATURES).double().requires_grad_()
    inputs = x, *parameters(layers)
    assert torch.autograd.gradcheck(lambda x, *_: tuple(joint_lora_forward(layers, x)), inputs, fast_mode=True)


@pytest.mark.parametrize("shape", [(0, FEATURES), (2, 0, FEATURES), (FEATURES,)])
def test_no_tokens_and_one(shape: tuple[int, ...]) -> None:
    layers, x = projections(0, 1, 2), normal(*shape).requires_grad_()
    for ours, theirs in zip(run(joint_lora_forward, layers, x), run(one_by_one, layers, x), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other)


def test_memory_that_nothing_was_written_to_is_not_read() -> None:
    layers, x = projections(0, 1, 2, alpha_pattern={"2": 5}), normal(6, FEATURES).requires_grad_()
    expected = [each for part in run(joint_lora_forward, layers, x) for each in part]
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        found = [each for part in run(joint_lora_forward, layers, x) for each in part]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))


def test_an_adapter_of_zeros_is_the_base_to_the_bit() -> None:
    layers, x = projections(0, 1, 2, dtype=torch.bfloat16), normal(3, 5, FEATURES).bfloat16().requires_grad_()
    for layer in layers:
        nn.init.zeros_(layer.lora_B["one"].weight)
    for out, layer in zip(joint_lora_forward(layers, x), layers, strict=True):
        assert torch.equal(out, layer.base_layer(x))


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B"])
def test_only_what_requires_a_gradient_gets_one_and_only_what_that_needs_is_saved(frozen: str) -> None:
    layers, x = projections(0, 1), normal(6, FEATURES).requires_grad_(frozen != "x")
    for layer in layers[:2]:
        getattr(layer, frozen, layer).requires_grad_(frozen == "x")
        layer.base_layer.requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        outs = joint_lora_forward(layers, x)
    addresses = {t.data_ptr() for t in saved}
    assert (x.data_ptr() in addresses) == (frozen != "lora_A")
    assert ((6, 2 * RANKS["one"]) in [t.shape for t in saved]) == (frozen != "lora_B")
    assert (layers[0].base_layer.weight.data_ptr() in addresses) == (frozen != "x")
    asking = [tensor for tensor in (x, *parameters(layers)) if tensor.requires_grad]
    assert len(asking) == {"x": 4, "lora_A": 3, "lora_B": 3}[frozen]
    grads = torch.autograd.grad(torch.cat(outs).square().sum(), asking)
    expected = torch.autograd.grad(torch.cat(one_by_one(layers, x)).square().sum(), asking)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Recorder(TorchDispatchMode):
    """Counts operators by name, views and allocations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, list)) and not func.is_view and name not in ("new_empty", "detach"):
            self.counts[name] = self.counts.get(name, 0) + 1
        return result


def test_what_is_launched() -> None:
    layers, x = projections(0, 1, 2, dtype=torch.float32), normal(6, FEATURES).requires_grad_()
    with Recorder() as forward:
        outs = joint_lora_forward(layers, x)
    # The matrices side by side; three bases, two with a bias; every A; the three B.
    assert forward.counts == {"cat": 1, "addmm": 2, "mm": 1 + 1, "addmm_": 3}
    incoming = [torch.ones_like(out) for out in outs]
    with Recorder() as backward:
        torch.autograd.grad(outs, [x, *parameters(layers)], incoming)
    # The first base; every A's; each B's. In place: two bases, each B for the inner gradients, every A with those. The
    # scales of all six gradients.
    assert backward.counts == {"mm": 1 + 1 + 3, "addmm_": 2 + 3 + 1, "_foreach_mul": 1}
    layers = projections()
    with Recorder() as plain, torch.no_grad():
        joint_lora_forward(layers, x)
    assert plain.counts == {"addmm": 2, "mm": 1}


def test_of_plain_layers_the_gradient_of_the_input_is_added_up_in_the_products() -> None:
    layers, x = projections(), normal(6, FEATURES).requires_grad_()
    outs = joint_lora_forward(layers, x)
    incoming = [torch.ones_like(out) for out in outs]
    with Recorder() as recorder:
        torch.autograd.grad(outs, x, incoming)
    assert recorder.counts == {"mm": 1, "addmm_": 2}


def _with_hook(layers: list[Any]) -> None:
    layers[1].register_forward_hook(lambda module, args, out: 2 * out)


def _with_own_forward(layers: list[Any]) -> None:
    layers[2].forward = lambda x: layers[0].base_layer(x) + 1


def _with_a_trained_base(layers: list[Any]) -> None:
    layers[0].base_layer.weight.requires_grad_()


def _with_a_dropout(layers: list[Any]) -> None:
    layers[0].lora_dropout["one"] = nn.Dropout(0.5)


def _merged(layers: list[Any]) -> None:
    layers[0].merge()


def _derived(layers: list[Any]) -> None:
    layers[2] = type("Linear", (nn.Linear,), {"forward": lambda self, x: 3 * nn.functional.linear(x, self.weight)})(
        FEATURES, OUT
    ).requires_grad_(False)


@pytest.mark.parametrize(
    "change", [_with_hook, _with_own_forward, _with_a_trained_base, _with_a_dropout, _merged, _derived]
)
@pytest.mark.parametrize("enabled", [True, False])
def test_what_it_does_not_cover_the_layers_do_themselves(change: Callable[[list[Any]], None], enabled: bool) -> None:
    layers, x = projections(0, 1), normal(6, FEATURES).requires_grad_()
    change(layers)
    with torch.set_grad_enabled(enabled):
        torch.manual_seed(3)
        expected = [layer(x) for layer in layers]
        torch.manual_seed(3)
        found = joint_lora_forward(layers, x)
    assert all(map(torch.equal, found, expected))
    assert not any("LowRankLinears" in type(out.grad_fn).__name__ for out in found)


def test_a_dtype_of_its_own_is_refused_as_the_layer_does() -> None:
    layers = projections(0, 1)
    layers[2].bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        joint_lora_forward(layers, normal(6, FEATURES))


def test_policies_are_switched_between_calls() -> None:
    layers, x = projections(0, 1, 2, adapters=("one", "two")), normal(6, FEATURES)
    for names in (["one"], ["two"], ["one", "two"]):
        for layer in layers:
            layer.set_adapter(names)
        for ours, theirs in zip(joint_lora_forward(layers, x), one_by_one(layers, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    for layer in layers:
        layer.enable_adapters(False)
    for out, layer in zip(joint_lora_forward(layers, x), layers, strict=True):
        assert torch.equal(out, layer.base_layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_survive_checkpointing(reentrant: bool) -> None:
    layers, x = projections(0, 1), normal(6, FEATURES).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return torch.cat(joint_lora_forward(layers, x)).square()

    grads = []
    for out in (function(x), checkpoint(function, x, use_reentrant=reentrant)):
        for tensor in (x, *parameters(layers)):
            tensor.grad = None
        out.sum().backward()
        grads.append([tensor.grad for tensor in (x, *parameters(layers))])
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_compiles_to_one_graph(backend: str, autocast: bool) -> None:
    torch._dynamo.reset()
    layers, x = projections(0, 1, alpha_pattern={"1": 5}), normal(2, 6, FEATURES).requires_grad_()

    def function(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return joint_lora_forward(layers, x)

    tolerance = 1e-2 if autocast else 1e-6

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for ours, theirs in zip(run(compiled, layers, x), run(function, layers, x), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
    with torch.no_grad():
        for one, other in zip(compiled(layers, x), function(layers, x), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
