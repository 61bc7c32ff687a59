"""Queries, keys and values of joint attention: the kernel, its gradient, and what it may not read or touch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import advflow_ext as af
from tests.nn.kernel_checks import KERNEL_DEVICE, RecordedOps, assert_right, results_and_gradients, rows_apart

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(
    batch: int, image: int, text: int, heads: int, head_dim: int, dtype: torch.dtype, device: str, seed: int = 0
) -> list[Tensor]:
    """q, k, v, those of the text if there is any, and two or four weights; all ask for gradients."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype).requires_grad_()

    tensors = [normal(batch, image, heads * head_dim) for _ in range(3)]
    tensors += [normal(batch, text, heads * head_dim) for _ in range(3 if text else 0)]
    return tensors + [normal(head_dim) for _ in range(4 if text else 2)]


def split(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    return (tensors[:3], tensors[3:6], tensors[6:]) if len(tensors) == 10 else (tensors[:3], (), tensors[3:])


def call(module, heads: int, eps: float = 1e-6, **given):
    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        image, text, weights = split(tensors)
        if text:
            given.update(text=tuple(text), text_weights=tuple(weights[2:]))
        return module.joint_qk_norm(*image, *weights[:2], heads=heads, eps=eps, **given)

    return op


def angles(tokens: int, head_dim: int, device: str = KERNEL_DEVICE) -> Tensor:
    """Another for each pair of elements of each token."""
    turn = torch.randn(tokens, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 3
    return torch.stack([turn.cos(), turn.sin()], -1).to(device)


def stock(heads: int, eps: float = 1e-6, rotary: Tensor | None = None):
    """As diffusers writes it: RMSNorm's own roundings, a concatenation, a rotation in float32, rounded once more."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        variance = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight

    def stream(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> list[Tensor]:
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        return [norm(q, wq), norm(k, wk), v]

    def rotated(x: Tensor) -> Tensor:
        if rotary is None:
            return x
        cos, sin = (table.repeat_interleave(2, -1)[:, None] for table in rotary.unbind(-1))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * cos + torch.stack([-odd, even], -1).flatten(3).to(wide) * sin).to(x.dtype)

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        image, text, weights = split(tensors)
        joint = stream(*image, *weights[:2])
        if text:
            joint = [torch.cat(pair, 1) for pair in zip(joint, stream(*text, *weights[2:]), strict=True)]
        return rotated(joint[0]), rotated(joint[1]), joint[2]

    return op


def incoming(batch: int, tokens: int, heads: int, head_dim: int, device: str) -> list[Tensor]:
    """Laid out as attention's backward does: heads before tokens."""
    rng = torch.Generator().manual_seed(1)
    shape = (batch, heads, tokens, head_dim)
    return [torch.randn(shape, generator=rng).to(device).transpose(1, 2) for _ in range(3)]


@given(
    batch=st.integers(1, 3),
    image=st.integers(1, 6),
    text=st.integers(0, 4),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(FLOATS),
    gap=st.sampled_from([0, 3]),
    turned=st.booleans(),
)
@settings(max_examples=60)
def test_results_and_gradients_are_right(batch, image, text, heads, head_dim, dtype, gap, turned):
    device = KERNEL_DEVICE
    tensors = [rows_apart(tensor, gap) for tensor in draw(batch, image, text, heads, head_dim, dtype, device)]
    rotary = angles(image + text, head_dim) if turned else None
    grads = incoming(batch, image + text, heads, head_dim, device)
    assert_right(call(af.nn, heads, rotary=rotary), stock(heads, rotary=rotary), tensors, grads)


@given(
    image=st.integers(1, 6),
    text=st.integers(0, 4),
    head_dim=st.sampled_from([16, 64]),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1e-2, 1.0, 30.0]),
)
@settings(max_examples=30)
def test_gradients_from_the_outputs_are_right(image, text, head_dim, dtype, size):
    tensors = draw(2, image, text, 2, head_dim, dtype, KERNEL_DEVICE)
    first = 6 if text else 3
    tensors[first:] = [size * weight.detach().sign() * (0.05 + weight.detach().abs()) for weight in tensors[first:]]
    grads = incoming(2, image + text, 2, head_dim, KERNEL_DEVICE)
    assert_right(call(af.nn, 2, keep="outputs"), stock(2), tensors, grads)


def test_gradients_along_the_outputs_are_right():
    """The hardest case: what comes in is nearly parallel to what was kept, and nearly cancels."""
    for dtype in FLOATS:
        tensors = draw(2, 8, 0, 2, 64, dtype, KERNEL_DEVICE)
        tensors[3:] = [weight.detach().abs() + 0.5 for weight in tensors[3:]]
        q, k, _ = stock(2)(*(tensor.detach() for tensor in tensors))
        noise = incoming(2, 8, 2, 64, KERNEL_DEVICE)
        grads = [q / tensors[3] ** 2 + 0.3 * noise[0], k / tensors[4] ** 2 + 0.3 * noise[1], noise[2]]
        assert_right(call(af.nn, 2, keep="outputs"), stock(2), tensors, grads)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("text", [0, 5])
def test_reference_is_right(text, turned):
    tensors = draw(2, 7, text, 3, 8, torch.float32, "cpu")
    rotary = angles(7 + text, 8, "cpu") if turned else None
    grads = incoming(2, 7 + text, 3, 8, "cpu")
    assert_right(call(af.reference, 3, rotary=rotary), stock(3, rotary=rotary), tensors, grads)


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_of_the_reference_pass_gradcheck(turned):
    tensors = draw(1, 2, 2, 2, 4, torch.float64, "cpu")
    rotary = angles(4, 4, "cpu") if turned else None
    assert torch.autograd.gradcheck(call(af.reference, 2, rotary=rotary), tensors)


def test_a_rotation_is_one_of_complex_numbers_and_rows_may_lie_anywhere():
    """float32 to the last bits: Qwen-Image multiplies pairs of elements as complex numbers."""
    q, k, v, wq, wk = (tensor.detach() for tensor in draw(2, 5, 0, 2, 32, torch.float32, KERNEL_DEVICE))
    plain = af.nn.joint_qk_norm(q, k, v, wq, wk, heads=2)
    table = angles(5, 32)
    apart = rows_apart(table.flatten(1), 3).unflatten(-1, (16, 2))
    turned = af.nn.joint_qk_norm(q, k, v, wq, wk, heads=2, rotary=apart)
    for one, other in zip(turned[:2], plain[:2], strict=True):
        expected = torch.view_as_complex(other.unflatten(-1, (16, 2))) * torch.view_as_complex(table)[:, None]
        torch.testing.assert_close(one, torch.view_as_real(expected).flatten(-2), rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[2], plain[2])


@pytest.mark.parametrize("head_dim", [8, 24])
def test_other_head_dimensions_are_left_to_the_reference(head_dim):
    tensors = draw(1, 3, 2, 2, head_dim, torch.float32, KERNEL_DEVICE)
    assert_right(call(af.nn, 2), stock(2), tensors, incoming(1, 5, 2, head_dim, KERNEL_DEVICE))


def test_float32_weights_leave_the_dtype_of_the_queries():
    tensors = draw(1, 3, 2, 2, 32, torch.bfloat16, KERNEL_DEVICE)
    tensors[6:] = [weight.detach().float().requires_grad_() for weight in tensors[6:]]
    ours = results_and_gradients(call(af.nn, 2), tensors, incoming(1, 5, 2, 32, KERNEL_DEVICE))
    assert [tensor.dtype for tensor in ours] == [torch.bfloat16] * 9 + [torch.float32] * 4


@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_see_its_batch(text, dtype):
    tensors = [tensor.detach() for tensor in draw(5, 4, text, 3, 32, dtype, KERNEL_DEVICE)]
    image, text_tensors, weights = split(tensors)
    for tensor in (*image, *text_tensors):
        tensor.requires_grad_()
    grads = [grad.to(dtype) for grad in incoming(5, 4 + text, 3, 32, KERNEL_DEVICE)]
    together = results_and_gradients(call(af.nn, 3), tensors, grads)
    for row in range(5):
        alone = [tensor.detach()[row : row + 1].requires_grad_() for tensor in (*image, *text_tensors)]
        results = results_and_gradients(call(af.nn, 3), [*alone, *weights], [grad[row : row + 1] for grad in grads])
        for one, all_of_them in zip(results, together, strict=True):
            assert torch.equal(one[0], all_of_them[row])


def test_frozen_weights_get_no_gradient_and_keep_nothing_but_queries_and_keys():
    tensors = draw(2, 4, 3, 2, 32, torch.bfloat16, KERNEL_DEVICE)
    tensors[6:] = [weight.detach() for weight in tensors[6:]]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        results = call(af.nn, 2)(*tensors)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    allowed = {tensors[i].untyped_storage().data_ptr() for i in (0, 1, 3, 4, 6, 7, 8, 9)}
    assert storages <= allowed
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = call(af.nn, 2, keep="outputs")(*tensors)
    own = [tensor for tensor in kept if tensor.dtype == torch.float32]
    assert [tensor.shape for tensor in own] == [(2, 2, 7, 2)]  # q and k: one number a head and token
    allowed = {tensor.untyped_storage().data_ptr() for tensor in (*outputs[:2], *tensors[6:], *own)}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == allowed
    with RecordedOps() as recorded:
        torch.autograd.grad(results, tensors[:6], [torch.ones_like(result) for result in results])
    asked_for_weights = [arguments[-1] for name, arguments in recorded.calls if name == "joint_qk_norm_backward"]
    assert asked_for_weights == [False]


def test_no_tokens_and_no_samples_are_no_error():
    for batch, image in ((0, 3), (2, 0)):
        tensors = draw(batch, image, 2, 2, 32, torch.float32, KERNEL_DEVICE)
        results = results_and_gradients(call(af.nn, 2), tensors, incoming(batch, image + 2, 2, 32, KERNEL_DEVICE))
        assert results[0].shape == (batch, image + 2, 2, 32)
        assert all(tensor.isfinite().all() for tensor in results)


def test_one_launch_forward_and_one_backward():
    tensors = draw(1, 3, 2, 2, 32, torch.float32, KERNEL_DEVICE)
    with RecordedOps() as recorded:
        results_and_gradients(call(af.nn, 2), tensors, incoming(1, 5, 2, 32, KERNEL_DEVICE))
    assert [name for name, _ in recorded.calls] == ["joint_qk_norm", "joint_qk_norm_backward"]


@pytest.mark.parametrize("text", [0, 3])
def test_opcheck(text):
    tensors = [tensor.detach() for tensor in draw(2, 4, text, 2, 32, torch.float32, KERNEL_DEVICE)]
    image, texts, weights = ([*part] for part in split(tensors))
    streams = image if text else image[:2]
    table = angles(4 + text, 32)
    for rotary, keep_rstd in ((table, False), (None, False), (None, True)):
        arguments = (streams, texts, weights, rotary, 2, 1e-6, keep_rstd)
        torch.library.opcheck(torch.ops.advflow.joint_qk_norm.default, arguments)
    *joint, rstd = torch.ops.advflow.joint_qk_norm(*arguments)
    grads = [grad.contiguous() for grad in incoming(2, 4 + text, 2, 32, KERNEL_DEVICE)][: len(streams)]
    for arguments in (
        (grads, image[:2], texts[:2], weights, None, None, 4, 1e-6, False),
        (grads, image[:2], texts[:2], weights, table, None, 4, 1e-6, True),
        (grads, image[:2], texts[:2], weights, None, None, 4, 1e-6, True),
        (grads, joint[:2], [], weights, None, rstd, 4, 1e-6, False),
    ):
        torch.library.opcheck(torch.ops.advflow.joint_qk_norm_backward.default, arguments)


@pytest.mark.parametrize(("text", "turned"), [(0, False), (3, False), (3, True)])
def test_compiles_into_one_graph(text, turned):
    tensors = draw(2, 4, text, 2, 32, torch.float32, KERNEL_DEVICE)
    grads = incoming(2, 4 + text, 2, 32, KERNEL_DEVICE)
    op = call(af.nn, 2, rotary=angles(4 + text, 32) if turned else None)
    eager = results_and_gradients(op, tensors, grads)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for one, other in zip(results_and_gradients(compiled, tensors, grads), eager, strict=True):
        assert torch.equal(one, other)


def test_trained_weights_keep_the_inputs():
    tensors = draw(1, 3, 0, 2, 32, torch.float32, KERNEL_DEVICE)
    with pytest.raises(
        ValueError, match="keep is 'outputs' and a weight asks for a gradient; accepted is then 'inputs'"
    ):
        call(af.nn, 2, keep="outputs")(*tensors)
    with pytest.raises(ValueError, match="keep is 'nothing'; accepted are 'inputs', 'outputs'"):
        call(af.nn, 2, keep="nothing")(*tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads is 5; accepted is a positive divisor of q's width 64"),
        ({"k": torch.zeros(2, 3, 64)}, r"k has shape \[2, 3, 64\]; accepted is that of q, \[2, 4, 64\]"),
        ({"v": torch.zeros(2, 4, 64, dtype=torch.bfloat16)}, "v has dtype torch.bfloat16; accepted is that of q"),
        ({"weight_q": torch.zeros(64)}, r"weight_q has shape \[64\]; accepted is \[width of q / heads\], \[32\]"),
        ({"text": (torch.zeros(2, 1, 64),) * 3}, "text and text_weights are given together"),
        ({"q": torch.zeros(2, 64)}, r"q has shape \[2, 64\]; accepted is \[batch, tokens, width\]"),
        ({"eps": -1.0}, "eps is -1.0"),
        (
            {"rotary": torch.zeros(4, 32)},
            r"rotary has shape \[4, 32\]; accepted is \[tokens of q and text, width .* / 2, 2\], \[4, 16, 2\]",
        ),
        ({"rotary": torch.ones(4, 16, 2).requires_grad_()}, "rotary asks for a gradient; accepted are fixed angles"),
        (
            {"rotary": torch.zeros(4, 16, 2), "keep": "outputs"},
            "keep is 'outputs' and rotary is given; accepted is then 'inputs'",
        ),
        (
            {"heads": 64, "weight_q": torch.ones(1), "weight_k": torch.ones(1), "rotary": torch.zeros(4, 0, 2)},
            "rotary turns pairs of elements and heads have 1; accepted is an even number",
        ),
        (
            dict.fromkeys("qkv", torch.empty(2**15, 2**15, 64, device="meta"))
            | dict.fromkeys(("weight_q", "weight_k"), torch.empty(32, device="meta")),
            "q and text hold 2147483648 heads of tokens; accepted are fewer than 2147482624",
        ),
    ],
)
@pytest.mark.parametrize("module", [af.nn, af.reference])
def test_bad_arguments_are_named(module, change, message):
    q, k, v = torch.zeros(3, 2, 4, 64).unbind()
    arguments = {"q": q, "k": k, "v": v, "weight_q": torch.ones(32), "weight_k": torch.ones(32), "heads": 2} | change
    with pytest.raises(ValueError, match=message):
        module.joint_qk_norm(**arguments)
