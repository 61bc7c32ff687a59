"""Gated residuals, layer norm and modulation: the kernel, its gradient, and what it may not read or keep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import advflow_ext as af
from advflow_ext.kernels import triton_ops
from tests.nn.kernel_checks import KERNEL_DEVICE, RecordedOps, assert_right, results_and_gradients, rows_apart

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(0, 1), (0, 2), (1, 0), (2, 0), (1, 1), (2, 1)]  # gated branches, modulations


def draw(
    batch: int, tokens: int, width: int, gates: int, norms: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """The residual, then x and gate of each branch, then scale and shift of each modulation; all ask for gradients."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(KERNEL_DEVICE, dtype).requires_grad_()

    branches = [normal(*shape) for _ in range(gates) for shape in ((batch, tokens, width), (batch, width))]
    return [normal(batch, tokens, width), *branches, *(normal(batch, width) for _ in range(2 * norms))]


def pairs(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def call(module, gates: int, norms: int) -> Callable[..., tuple[Tensor, ...]]:
    def op(residual: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        branches, modulations = pairs(rest[: 2 * gates]), pairs(rest[2 * gates :])
        if not gates:
            return module.layer_norm_modulate(residual, *modulations)
        if not norms:
            return (module.gate_residual(residual, *branches),)
        return module.gate_residual_layer_norm_modulate(residual, branches, modulations[0])

    return op


def stock(gates: int, norms: int) -> Callable[..., tuple[Tensor, ...]]:
    """As diffusers' blocks write it."""

    def op(h: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        for x, gate in pairs(rest[: 2 * gates]):
            h = h + gate.unsqueeze(1) * x
        normed = F.layer_norm(h, h.shape[-1:], eps=1e-6)
        modulated = [normed * (1 + scale[:, None]) + shift[:, None] for scale, shift in pairs(rest[2 * gates :])]
        return tuple([h] * (gates > 0) + modulated)

    return op


def incoming(batch: int, tokens: int, width: int, gates: int, norms: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(batch, tokens, width, generator=rng).to(KERNEL_DEVICE) for _ in range((gates > 0) + norms)]


@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 5, 33]),
    width=st.sampled_from([16, 40, 64, 96]),
    dtype=st.sampled_from(FLOATS),
    gap=st.sampled_from([0, 3]),
)
@settings(max_examples=40)
def test_results_and_gradients_are_right(kind, batch, tokens, width, dtype, gap):
    tensors = [rows_apart(tensor, gap) for tensor in draw(batch, tokens, width, *kind, dtype)]
    assert_right(call(af.nn, *kind), stock(*kind), tensors, incoming(batch, tokens, width, *kind))


def test_tiles_cover_a_row_and_waste_no_more_than_one_would():
    from advflow_ext.kernels import adaln

    assert [adaln.tiles(width) for width in (1, 2, 3, 1024, 1152, 1536, 2048, 2432, 3072)] == [
        (1, 0), (2, 0), (2, 1), (1024, 0), (1024, 128), (1024, 512), (2048, 0), (2048, 512), (2048, 1024),
    ]  # fmt: skip
    for width in range(1, 5000):
        head, tail = adaln.tiles(width)
        one = 1 << (width - 1).bit_length()
        assert width <= head + tail <= one and head.bit_count() == 1 and tail.bit_count() == (head < width)
        assert not tail or (head < width and tail < 2 * (width - head))


@pytest.mark.parametrize("kind", KINDS)
def test_the_width_of_sd35_is_right(kind):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = draw(2, 3, 1536, *kind, dtype)
        assert_right(call(af.nn, *kind), stock(*kind), tensors, incoming(2, 3, 1536, *kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 3, 17, 1100])
def test_any_width_is_right(kind, width):
    if width == 1 and kind[1]:
        pytest.skip("one number is its own mean: the gradient is zero, and relative to nothing")
    tensors = draw(2, 3, width, *kind, torch.float32)
    assert_right(call(af.nn, *kind), stock(*kind), tensors, incoming(2, 3, width, *kind))


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_right(kind):
    tensors = [tensor.cpu().detach().requires_grad_() for tensor in draw(2, 7, 24, *kind, torch.float32)]
    assert_right(call(af.reference, *kind), stock(*kind), tensors, [g.cpu() for g in incoming(2, 7, 24, *kind)])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_pass_gradcheck(kind):
    tensors = [tensor.cpu().detach().double().requires_grad_() for tensor in draw(1, 2, 4, *kind, torch.float32)]
    assert torch.autograd.gradcheck(call(af.reference, *kind), tensors)


@pytest.mark.parametrize("kind", [(1, 1), (2, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_is_the_two_calls_to_the_bit(kind, dtype):
    residual, *rest = draw(2, 5, 48, *kind, dtype)
    branches, modulation = pairs(tuple(rest[:-2])), (rest[-2], rest[-1])
    h, y = af.nn.gate_residual_layer_norm_modulate(residual, branches, modulation)
    alone = af.nn.gate_residual(residual, *branches)
    assert torch.equal(h, alone) and torch.equal(y, af.nn.layer_norm_modulate(alone, modulation)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_see_its_batch(kind, dtype):
    tensors, grads = draw(5, 4, 40, *kind, dtype), [g.to(dtype) for g in incoming(5, 4, 40, *kind)]
    together = results_and_gradients(call(af.nn, *kind), tensors, grads)
    for row in range(5):
        alone = [tensor.detach()[row : row + 1].requires_grad_() for tensor in tensors]
        results = results_and_gradients(call(af.nn, *kind), alone, [grad[row : row + 1] for grad in grads])
        for one, all_of_them in zip(results, together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_is_not_finite_stays_alone(kind):
    tensors, grads = draw(3, 4, 40, *kind, torch.float32), incoming(3, 4, 40, *kind)
    clean = results_and_gradients(call(af.nn, *kind), tensors, grads)
    for poisoned in range(len(tensors)):
        spoiled = [tensor.detach().clone() for tensor in tensors]
        spoiled[poisoned][1] = torch.nan
        results = results_and_gradients(call(af.nn, *kind), [t.requires_grad_() for t in spoiled], grads)
        for one, other in zip(results, clean, strict=True):
            assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_frozen_modulations_keep_what_is_normalised_and_no_branch():
    residual, x, gate, scale, shift = draw(2, 4, 40, 1, 1, torch.bfloat16)
    gate, scale, shift = (tensor.detach() for tensor in (gate, scale, shift))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        h, y = af.nn.gate_residual_layer_norm_modulate(residual, [(x, gate)], (scale, shift))
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert storages == {tensor.untyped_storage().data_ptr() for tensor in (h, gate, scale)}
    with RecordedOps() as recorded:
        torch.autograd.grad((h, y), (residual, x), (torch.ones_like(h), torch.ones_like(y)))
    assert [(name, arguments[-1]) for name, arguments in recorded.calls] == [("adaln_backward", False)]


def test_the_result_may_have_another_dtype():
    residual, x, gate, scale, shift = draw(1, 3, 16, 1, 1, torch.float32)
    h, y = af.nn.gate_residual_layer_norm_modulate(residual, [(x, gate)], (scale, shift), dtype=torch.bfloat16)
    assert (h.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    wide = af.nn.gate_residual_layer_norm_modulate(residual, [(x, gate)], (scale, shift))[1]
    assert torch.equal(y, wide.bfloat16())


def test_an_epsilon_of_zero_leaves_the_gradients_of_the_modulation_numbers():
    x, scale, shift = draw(2, 5, 16, 0, 1, torch.float32)
    (y,) = af.nn.layer_norm_modulate(x, (scale, shift), eps=0.0)
    ours = torch.autograd.grad(y.sum(), (x, scale, shift))
    (y,) = af.reference.layer_norm_modulate(x, (scale, shift), eps=0.0)
    for one, other in zip(ours, torch.autograd.grad(y.sum(), (x, scale, shift)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_derivatives_without_a_rule_are_right_or_refused():
    x, scale, shift = (tensor.detach() for tensor in draw(1, 3, 16, 0, 1, torch.float32))

    def op(module):
        return lambda x: module.layer_norm_modulate(x, (scale, shift))[0]

    tangent = torch.ones_like(x).cumsum(-1)
    for one, other in zip(*(torch.func.jvp(op(m), (x,), (tangent,)) for m in (af.nn, af.reference)), strict=True):
        torch.testing.assert_close(one, other)
    x.requires_grad_()
    (first,) = torch.autograd.grad(op(af.nn)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_and_no_samples_are_no_error(kind):
    for batch, tokens in ((0, 3), (2, 0)):
        tensors = draw(batch, tokens, 16, *kind, torch.float32)
        results = results_and_gradients(call(af.nn, *kind), tensors, incoming(batch, tokens, 16, *kind))
        assert all(tensor.isfinite().all() for tensor in results)


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    current = []

    @contextmanager
    def device(which):
        current.append(which)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = triton_ops.on_device_of_tensors(lambda *arguments: [*current, arguments[1]])
    x = torch.empty(1, device="meta")
    assert kernel(x, "one") == [x.device, "one"] and kernel([x, x], "list") == [x.device, "list"] and not current
    monkeypatch.setattr(torch.cuda, "current_device", lambda: x.device.index)
    assert kernel(x, "one") == ["one"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_of_the_tensors_need_not_be_the_current_one(kind):
    tensors, grads = draw(2, 3, 16, *kind, torch.float32), incoming(2, 3, 16, *kind)
    here = results_and_gradients(call(af.nn, *kind), tensors, grads)
    moved = [tensor.detach().to("cuda:1").requires_grad_() for tensor in tensors]
    there = results_and_gradients(call(af.nn, *kind), moved, [grad.to("cuda:1") for grad in grads])
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, other.to(one.device))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    gates = kind[0]
    residual, *rest = (tensor.detach() for tensor in draw(2, 3, 16, *kind, torch.float32))
    branches, gate = rest[: 2 * gates : 2], rest[1 : 2 * gates : 2]
    scales, shifts = rest[2 * gates :: 2], rest[2 * gates + 1 :: 2]
    torch.library.opcheck(
        torch.ops.advflow.adaln.default, (residual, branches, gate, scales, shifts, 1e-6, torch.float32)
    )
    grads = incoming(2, 3, 16, *kind)
    d_h, d_y = (grads[0], grads[1:]) if gates else (None, grads)
    for modulation_grad in (False, True):
        arguments = (residual, branches, gate, scales, d_h, d_y, 1e-6, torch.float32, modulation_grad)
        torch.library.opcheck(torch.ops.advflow.adaln_backward.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    tensors, grads = draw(2, 3, 16, *kind, torch.float32), incoming(2, 3, 16, *kind)
    eager = results_and_gradients(call(af.nn, *kind), tensors, grads)
    compiled = torch.compile(call(af.nn, *kind), fullgraph=True, backend="aot_eager")
    for one, other in zip(results_and_gradients(compiled, tensors, grads), eager, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda m, x, s: m.layer_norm_modulate(x), "No branches and no modulations are given"),
        (
            lambda m, x, s: m.layer_norm_modulate(x, (s, s), (s, s), (s, s)),
            "3 modulations are given; accepted are one or",
        ),
        (lambda m, x, s: m.layer_norm_modulate(x[0], (s, s)), r"x has shape \[3, 16\]; accepted is \[batch, tokens"),
        (
            lambda m, x, s: m.layer_norm_modulate(x, (s[:1], s)),
            r"scale of modulation 1 has shape \[1, 16\]; accepted is",
        ),
        (
            lambda m, x, s: m.gate_residual(x, (x, s), (x[:, :1], s)),
            r"x of branch 2 has shape \[2, 1, 16\]; accepted is",
        ),
        (lambda m, x, s: m.gate_residual(x, (x, x)), r"gate of branch 1 has shape \[2, 3, 16\]; accepted is \[B, C\]"),
        (
            lambda m, x, s: m.gate_residual(x, (x, s), (x.double(), s)),
            "x of branch 2 has dtype torch.float64; accepted",
        ),
        (lambda m, x, s: m.gate_residual(x.long(), (x, s)), "residual has dtype torch.int64"),
    ],
)
@pytest.mark.parametrize("module", [af.nn, af.reference])
def test_bad_arguments_are_named(module, op, message):
    with pytest.raises(ValueError, match=message):
        op(module, torch.zeros(2, 3, 16), torch.zeros(2, 16))
