"""The raw operators of the loss core: statistics and gradient, by torch's own checks and by hand.

One file, for operators of samples and of transitions are held to the same promises.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advflow_ext import _native
from advflow_ext._native import STATS
from advflow_ext.testing import assert_close_to_truth, assert_rounded_once
from advflow_ext.testing.layouts import LAYOUTS, arrange
from advflow_ext.testing.strategies import HALVES_AND_FLOAT, shapes

stats_op = torch.ops.advflow.residual_stats.default
grad_op = torch.ops.advflow.residual_grad.default
transition_stats_op = torch.ops.advflow.transition_stats.default
transition_grad_op = torch.ops.advflow.transition_grad.default

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def latents(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(5, *shape, generator=generator).to(device, dtype).unbind())


def doubled(*tensors):
    return [None if x is None else x.double().flatten(1) for x in tensors]


def stats_by_hand(v, target, noise, o, p, mix=0.0):
    v, target, noise, o, p = doubled(v, target, noise, o, p)
    u = target if noise is None else noise - target
    nothing = torch.zeros(v.shape[0], dtype=torch.float64, device=v.device)
    mixed = o is not None and mix != 0
    return torch.stack(
        [
            (v - u).square().mean(1),
            nothing if o is None else (v - o).square().mean(1),
            nothing if p is None else (v - p).square().mean(1),
            nothing if o is None else (o - u).square().mean(1),
            (v - u).abs().mean(1),
            nothing if o is None else (o - u).abs().mean(1),
            ((o - u) + mix * (v - o)).abs().mean(1) if mixed else nothing,
            ((o - u) - mix * (v - o)).abs().mean(1) if mixed else nothing,
        ],
        1,
    )


def transition_stats_by_hand(v, eps, o, p):
    v, eps, o, p = doubled(v, eps, o, p)
    nothing = torch.zeros(v.shape[0], dtype=torch.float64, device=v.device)
    columns = [
        (eps * (v - o)).mean(1),
        (v - o).square().mean(1),
        nothing if p is None else (v - p).square().mean(1),
        eps.square().mean(1),
    ]
    return torch.stack([*columns, *[nothing] * 4], 1)


def grad_by_hand(v, target, noise, o, p, coef):
    shape = v.shape
    v, target, noise, o, p = doubled(v, target, noise, o, p)
    a, b, c = coef.double().unsqueeze(2).unbind(1)
    grad = a * (v - (target if noise is None else noise - target))
    grad = grad if o is None else grad + b * (v - o)
    grad = grad if p is None else grad + c * (v - p)
    return (2 / v.shape[1] * grad).view(shape)


def transition_grad_by_hand(v, eps, o, p, coef):
    shape = v.shape
    v, eps, o, p = doubled(v, eps, o, p)
    a, b, c = coef.double().unsqueeze(2).unbind(1)
    grad = a * eps + b * (v - o)
    grad = grad if p is None else grad + c * (v - p)
    return (2 / v.shape[1] * grad).view(shape)


def draw_tensors(data, shape, seed, optional):
    """Latents of any dtype and layout; those from index ``optional`` on may be absent."""
    tensors = []
    for index, tensor in enumerate(latents(shape, torch.float64, seed=seed)):
        dtype, layout = data.draw(st.sampled_from(HALVES_AND_FLOAT)), data.draw(st.sampled_from(LAYOUTS))
        present = index < optional or data.draw(st.booleans())
        tensors.append(arrange(tensor.to(dtype), layout) if present else None)
    return tensors


@given(st.data(), shapes(), st.sampled_from([0.0, 0.1, 1.0, 2.0]), st.integers(0, 2**31))
@settings(max_examples=150)
def test_any_inputs_match_the_formula(data, shape, mix, seed):
    tensors = draw_tensors(data, shape, seed, optional=2)
    stats = stats_op(*tensors, mix)
    assert stats.dtype == torch.float32 and stats.shape == (shape[0], len(STATS))
    torch.testing.assert_close(stats.double(), stats_by_hand(*tensors, mix), rtol=1e-6, atol=1e-30)
    if mix == 0 or tensors[3] is None:
        assert not stats[:, 6:].any()

    coef = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(seed))
    grad = grad_op(*tensors, coef)
    assert grad.is_contiguous() and grad.dtype == tensors[0].dtype
    assert_rounded_once(grad, grad_by_hand(*tensors, coef))


@given(st.data(), shapes(), st.integers(0, 2**31))
@settings(max_examples=150)
def test_any_transitions_match_the_formula(data, shape, seed):
    v, eps, o, p, _ = draw_tensors(data, shape, seed, optional=3)
    stats = transition_stats_op(v, eps, o, p)
    assert stats.dtype == torch.float32 and stats.shape == (shape[0], len(STATS))
    truth = transition_stats_by_hand(v, eps, o, p)
    torch.testing.assert_close(stats[:, 1:].double(), truth[:, 1:], rtol=1e-6, atol=1e-30)
    # A sum of both signs: exact to the size of its terms.
    size = (eps.double() * (v.double() - o.double())).abs().flatten(1).mean(1)
    assert ((stats[:, 0].double() - truth[:, 0]).abs() <= 1e-6 * size).all()
    assert not stats[:, 4:].any()

    coef = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(seed))
    grad = transition_grad_op(v, eps, o, p, coef)
    assert grad.is_contiguous() and grad.dtype == v.dtype
    assert_rounded_once(grad, transition_grad_by_hand(v, eps, o, p, coef))


@pytest.mark.parametrize("mix", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
def test_mixed_norms(dtype, mix, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    v, x0, noise, o, p = latents((3, 5003), dtype, device)
    stats = stats_op(v, x0, noise, o, p, mix)
    rtol = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(stats.double(), stats_by_hand(v, x0, noise, o, p, mix), rtol=rtol, atol=0)
    without = stats_op(v, x0, noise, o, p)
    assert torch.equal(without[:, :6], stats[:, :6]) and not without[:, 6:].any()
    # At mix 1 the first of them is |v - u| by another road.
    if mix == 1.0:
        torch.testing.assert_close(stats[:, 6], stats[:, 4], rtol=rtol, atol=0)


@pytest.mark.parametrize("present", list(itertools.product([True, False], repeat=3)))
def test_absent_tensors(present, device):
    v, target, *others = latents((3, 515), device=device)
    others = [x if here else None for x, here in zip(others, present, strict=True)]
    stats = stats_op(v, target, *others)
    torch.testing.assert_close(stats.double(), stats_by_hand(v, target, *others), rtol=1e-6, atol=0)
    coef = torch.randn(3, 3, device=device)
    assert_close_to_truth(grad_op(v, target, *others, coef), grad_by_hand(v, target, *others, coef), 1e-6)


@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transitions_in_both_accumulate_types(dtype, with_ref, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    v, eps, o, p, _ = latents((3, 5003), dtype, device)
    p = p if with_ref else None
    stats = transition_stats_op(v, eps, o, p)
    assert stats.dtype == dtype
    torch.testing.assert_close(stats.double(), transition_stats_by_hand(v, eps, o, p), rtol=tolerance, atol=tolerance)
    coef = torch.randn(3, 3, device=device, dtype=dtype)
    grad = transition_grad_op(v, eps, o, p, coef)
    assert_close_to_truth(grad, transition_grad_by_hand(v, eps, o, p, coef), tolerance)


def test_a_policy_next_to_the_rollout_keeps_its_digits(device):
    # Differences of log-probabilities, the usual way to this number, are off by 1e-8 to 1e-7 here.
    v, eps, o, _, _ = latents((4, 65536), torch.float64, device)
    o = o.float()
    v = (o.double() + 1e-4 * v).float()
    stats, truth = transition_stats_op(v, eps.float(), o, None), transition_stats_by_hand(v, eps.float(), o, None)
    assert (stats[:, 0].double() - truth[:, 0]).abs().max() <= 1e-11
    torch.testing.assert_close(stats[:, 1].double(), truth[:, 1], rtol=1e-6, atol=0)


def test_an_unchanged_policy_is_exactly_at_the_rollout(device):
    v, eps, _, p, _ = latents((3, 515), torch.bfloat16, device)
    stats = transition_stats_op(v, eps, v.clone(), p)
    assert not stats[:, :2].any() and (stats[:, 2:4] > 0).all()


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_bfloat16_inputs_are_exact_before_the_rounding(dtype, device):
    # v in float32 shows the gradient unrounded; the others are read as they are.
    v, *others = latents((4, 65536), dtype, device)
    v = v.float()
    coef = torch.randn(4, 3, device=device)
    assert_close_to_truth(grad_op(v, *others, coef), grad_by_hand(v, *others, coef), 1e-6)
    rounded = grad_op(v.to(dtype), *others, coef)
    assert_rounded_once(rounded, grad_by_hand(v, *others, coef))


def test_policy_next_to_its_target_keeps_its_digits(device):
    # (v - u)^2 rebuilt from the other statistics would be wrong in the second digit here.
    v, target, noise, o, p = latents((2, 4096), torch.float64, device)
    v = (noise - target + 1e-3 * v).float()
    tensors = [v, *(x.float() for x in (target, noise, o, p))]
    torch.testing.assert_close(stats_op(*tensors).double(), stats_by_hand(*tensors), rtol=2e-4, atol=0)
    direct = [v, (noise - target).float(), None, None, None]
    torch.testing.assert_close(stats_op(*direct).double(), stats_by_hand(*direct), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_zero_coefficient_lets_nothing_through(dtype, bad, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    clean = latents((3, 33), dtype, device)
    for index, coef in ((3, [0.5, 0.0, 0.5]), (4, [0.5, 0.5, 0.0]), (1, [0.0, 0.5, 0.5]), (2, [0.0, 0.5, 0.5])):
        tensors = [x.clone() for x in clean]
        tensors[index].fill_(bad)
        rows = torch.tensor([coef] * 3, dtype=accumulate, device=device)
        assert torch.equal(grad_op(*tensors, rows), grad_op(*clean, rows))
    everything_bad = [torch.full_like(x, bad) for x in clean]
    grad = grad_op(*everything_bad, torch.zeros(3, 3, dtype=accumulate, device=device))
    assert torch.equal(grad, torch.zeros_like(grad)) and not torch.signbit(grad).any()


@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_zero_coefficient_lets_nothing_of_a_transition_through(dtype, bad, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    clean = latents((3, 33), dtype, device)[:4]
    for index, coef in ((1, [0.0, 0.5, 0.5]), (2, [0.5, 0.0, 0.5]), (3, [0.5, 0.5, 0.0])):
        tensors = [x.clone() for x in clean]
        tensors[index].fill_(bad)
        rows = torch.tensor([coef] * 3, dtype=accumulate, device=device)
        assert torch.equal(transition_grad_op(*tensors, rows), transition_grad_op(*clean, rows))
    # eps alone needs no velocity at all.
    eps_alone = torch.tensor([[0.5, 0.0, 0.0]] * 3, dtype=accumulate, device=device)
    grad = transition_grad_op(*(torch.full_like(clean[0], bad) if i != 1 else clean[1] for i in range(4)), eps_alone)
    assert torch.equal(grad, transition_grad_op(*clean, eps_alone)) and grad.isfinite().all()
    everything_bad = [torch.full_like(x, bad) for x in clean]
    grad = transition_grad_op(*everything_bad, torch.zeros(3, 3, dtype=accumulate, device=device))
    assert torch.equal(grad, torch.zeros_like(grad)) and not torch.signbit(grad).any()


@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
def test_the_upstream_gradient_multiplies_the_coefficients(dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    v, x0, noise, o, p = latents((4, 3, 33), dtype, device)
    coef = torch.randn(4, 3, dtype=accumulate).to(device)
    per_row = torch.randn(4, 2, dtype=accumulate).to(device)[:, 0]
    for upstream in (per_row, per_row[1], per_row[1].expand(4)):
        scaled = coef * (upstream[:, None] if upstream.dim() else upstream)
        assert torch.equal(grad_op(v, x0, noise, o, p, coef, upstream), grad_op(v, x0, noise, o, p, scaled))
        assert torch.equal(transition_grad_op(v, x0, o, p, coef, upstream), transition_grad_op(v, x0, o, p, scaled))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_dropped_row_stays_dropped_under_any_upstream_gradient(bad, device):
    v, x0, noise, o, p = latents((3, 33), torch.float32, device)
    coef = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], device=device)
    upstream = torch.tensor([1.0, bad, 1.0], device=device)
    for grad in (grad_op(v, x0, noise, o, p, coef, upstream), transition_grad_op(v, x0, o, p, coef, upstream)):
        assert grad.isfinite().all() and not grad[1].any()


def test_a_wrong_upstream_gradient_is_refused(device):
    v = torch.ones(2, 3, device=device)
    coef = torch.zeros(2, 3, device=device)
    for upstream, sentence in (
        (torch.ones(3, device=device), r"upstream has shape \[3\]; accepted are \[\] and \[2\]"),
        (torch.ones(2, 1, device=device), r"upstream has shape \[2, 1\]"),
        (torch.ones(2, device=device).bfloat16(), r"upstream has dtype BFloat16; accepted is the accumulate type"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            grad_op(v, v, None, None, None, coef, upstream)


@pytest.mark.parametrize("shape", [(5, 33), (3, 3, 65, 61)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype, shape, device):
    v, x0, noise, o, p = latents(shape, dtype, device)
    coef = torch.randn(shape[0], 3, device=device)
    stats, grad = stats_op(v, x0, noise, o, p, 0.7), grad_op(v, x0, noise, o, p, coef)
    step_stats, step_grad = transition_stats_op(v, noise, o, p), transition_grad_op(v, noise, o, p, coef)
    for rows in ([2], [2, 0], [1, 2, 1]):
        part = [x[rows] for x in (v, x0, noise, o, p)]
        v_, _, noise_, o_, p_ = part
        assert torch.equal(stats_op(*part, 0.7), stats[rows])
        assert torch.equal(grad_op(*part, coef[rows]), grad[rows])
        assert torch.equal(transition_stats_op(v_, noise_, o_, p_), step_stats[rows])
        assert torch.equal(transition_grad_op(v_, noise_, o_, p_, coef[rows]), step_grad[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value_survives_the_round_trip(dtype):
    v = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    # With D = 1, a = 1/2 and u = 0 the gradient is v itself.
    coef = torch.tensor([[0.5, 0.0, 0.0]]).expand(2**16, 3)
    grad = grad_op(v, torch.zeros_like(v), None, None, None, coef)
    number = ~v.isnan()
    assert torch.equal(grad[number], v[number]) and grad[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_is_rounded_as_torch_rounds(dtype):
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(-30, 18, (1, 2**16), generator=generator)
    wide = torch.randn(1, 2**16, generator=generator) * 2.0**exponent
    # v = 0 in half, so the gradient is -u scaled by exactly one: any float32 number can be sent through the rounding.
    coef = torch.tensor([[wide.shape[1] / 2, 0.0, 0.0]])
    grad = grad_op(torch.zeros_like(wide, dtype=dtype), wide, None, None, None, coef)
    assert torch.equal(grad, (-wide).to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# As PyTorch operators


@pytest.mark.parametrize("present", [(True, True, True), (True, True, False), (False, False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(present, dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    v, target, *others = latents((2, 3, 5), dtype, device)
    others = [x if here else None for x, here in zip(others, present, strict=True)]
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    torch.library.opcheck(stats_op, (v, target, *others))
    torch.library.opcheck(stats_op, (v.transpose(1, 2), target.transpose(1, 2), None, None, None))
    torch.library.opcheck(stats_op, (v, target, *others, 0.1))
    coef = torch.randn(2, 3, dtype=accumulate, device=device)
    torch.library.opcheck(grad_op, (v, target, *others, coef))
    torch.library.opcheck(grad_op, (v, target, *others, coef, coef[:, 0]))
    for v_ref in (None, v + 1):
        torch.library.opcheck(transition_stats_op, (v, target, v - 1, v_ref))
        torch.library.opcheck(transition_grad_op, (v, target.transpose(1, 2).contiguous().mT, v - 1, v_ref, coef))


def test_compiles_without_graph_breaks(device):
    def both(v, x0, noise, o, p, coef):
        forward = stats_op(v, x0, noise, o, p, 0.1), grad_op(v, x0, noise, o, p, coef)
        return *forward, transition_stats_op(v, noise, o, p), transition_grad_op(v, noise, o, p, coef)

    arguments = (*latents((3, 5, 7), torch.bfloat16, device), torch.randn(3, 3, device=device))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(itertools.starmap(torch.equal, zip(compiled, both(*arguments), strict=True)))


def test_exports():
    class Stats(torch.nn.Module):
        def forward(self, v, x0, noise):
            return stats_op(v, x0, noise, None, None)

    v, x0, noise, *_ = latents((2, 3, 5))
    exported = torch.export.export(Stats(), (v, x0, noise))
    assert torch.equal(exported.module()(v, x0, noise), stats_op(v, x0, noise, None, None))


def test_fake_cuda_tensors_need_no_gpu():
    with torch._subclasses.FakeTensorMode():
        v = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        assert stats_op(v, v, v, v, None).shape == (4, len(STATS))
        assert transition_stats_op(v, v, v, None).shape == (4, len(STATS))
        coef = torch.empty(4, 3, device="cuda")
        for grad in (grad_op(v, v, v, v, None, coef), transition_grad_op(v, v, v, None, coef)):
            assert grad.dtype == torch.bfloat16 and grad.device.type == "cuda"


def test_raw_ops_refuse_to_be_differentiated(device):
    v, target, *_ = latents((2, 5), device=device)
    v.requires_grad_()
    with pytest.raises(RuntimeError, match="residual_stats is not implemented"):
        stats_op(v, target, None, None, None).sum().backward()
    coef = torch.ones(2, 3, device=device)
    with pytest.raises(RuntimeError, match="residual_grad is not implemented"):
        grad_op(v, target, None, None, None, coef).sum().backward()
    with pytest.raises(RuntimeError, match="transition_stats is not implemented"):
        transition_stats_op(v, target, target, None).sum().backward()
    with pytest.raises(RuntimeError, match="transition_grad is not implemented"):
        transition_grad_op(v, target, target, None, coef).sum().backward()


def test_misuse_of_the_raw_ops(device):
    v, target, *_ = latents((2, 5), device=device)
    for arguments, sentence in (
        ((v, target[:1], None, None, None), r"target has shape \[1, 5\]; accepted is the shape of v, \[2, 5\]"),
        ((v, target, None, target.int(), None), r"v_old has dtype Int; accepted are float32"),
        ((v[0, 0], target[0, 0], None, None, None), r"v has no dimension"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            stats_op(*arguments)
    for coef, sentence in (
        (torch.ones(2, 2, device=device), r"coef has shape \[2, 2\]; accepted is \[2, 3\]"),
        (torch.ones(2, 3, device=device, dtype=torch.float64), r"coef has dtype Double; accepted is"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            grad_op(v, target, None, None, None, coef)
        with pytest.raises(RuntimeError, match=sentence):
            transition_grad_op(v, target, target, None, coef)
    with pytest.raises(RuntimeError, match=r"v_old has shape \[1, 5\]; accepted is the shape of v, \[2, 5\]"):
        transition_stats_op(v, target, target[:1], None)


@pytest.mark.gpu
def test_float64_on_cuda_is_refused_in_a_sentence():
    v = torch.randn(2, 5, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match=r"residual_stats received float64 on CUDA; accepted there are float32"):
        stats_op(v, v, None, None, None)
    with pytest.raises(RuntimeError, match=r"transition_grad received float64 on CUDA; accepted there are float32"):
        transition_grad_op(v, v, v, None, torch.zeros(2, 3, dtype=torch.float64, device="cuda"))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0, 2)])
def test_nothing_to_do_launches_nothing(shape, device):
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    v = torch.empty(shape, device=device)
    stats = stats_op(v, v, v, v, v)
    assert stats.shape == (shape[0], len(STATS)) and not stats.any()
    coef = torch.zeros(shape[0], 3, device=device)
    assert grad_op(v, v, v, v, v, coef).shape == shape
    stats = transition_stats_op(v, v, v, v)
    assert stats.shape == (shape[0], len(STATS)) and not stats.any()
    assert transition_grad_op(v, v, v, v, coef).shape == shape
    assert module.launch_count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU can show


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    tensors = latents((8, 65536), device="cuda")
    expected = stats_op(*tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [x + 0 for x in tensors]  # on another stream this would be read before it is written
        stats = stats_op(*late)
    stream.synchronize()
    assert torch.equal(stats, expected)


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_data():
    tensors = latents((4, 4096), device="cuda")
    coef = torch.randn(4, 3, device="cuda")
    stats_op(*tensors), grad_op(*tensors, coef)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats, grad = stats_op(*tensors), grad_op(*tensors, coef)
    tensors[0].normal_()
    graph.replay()
    assert torch.equal(stats, stats_op(*tensors)) and torch.equal(grad, grad_op(*tensors, coef))


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_device():
    import advflow_ext as af

    v, x0, noise, o, p = latents((4, 4096), device="cuda")
    v.requires_grad_()
    t, A = torch.rand(2, 4, device="cuda").clamp(min=0.01).unbind()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for weighting in ("prediction", "velocity", "adaptive"):
            af.advantage_flow_loss(v, x0, noise, t, A, v_old=o, v_ref=p, weighting=weighting).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
