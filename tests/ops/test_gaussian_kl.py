"""KL divergences of Gaussians against torch.distributions, and what rounded means make of them.

One file, for it is one of those that tests/build/test_sanitizer.py runs.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import assert_close_to_truth, assert_rounded_once
from advflow_ext.testing.layouts import LAYOUTS, arrange
from advflow_ext.testing.strategies import HALVES_AND_FLOAT, shapes
from advflow_ext.testing.transition_strategies import TABLES, shifted
from tests.ops.transitions import SPACES, draw_transitions

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def means(shape, dtype=torch.float32, device="cpu", seed=0, apart=0.3):
    generator = torch.Generator().manual_seed(seed)
    first, change = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    return [x.to(device, dtype).requires_grad_() for x in (first, first + apart * change)]


def by_torch(mean1, mean2, std1, std2):
    """Value and both gradients in float64."""
    mean1, mean2 = (x.detach().double().requires_grad_() for x in (mean1, mean2))
    column = [-1, *[1] * (mean1.dim() - 1)]
    stds = [std.double().view(column) if isinstance(std, torch.Tensor) else std for std in (std1, std2)]
    normals = [torch.distributions.Normal(mean, std) for mean, std in zip((mean1, mean2), stds, strict=True)]
    kl = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    return kl.detach(), *torch.autograd.grad(kl.sum(), (mean1, mean2))


@both
@given(st.data(), shapes(), st.integers(0, 2**31))
def test_any_means_match_torch(space, data, shape, seed):
    dtypes, layouts = st.sampled_from([*HALVES_AND_FLOAT, torch.float64]), st.sampled_from(LAYOUTS)
    mean1, mean2 = (
        arrange(x.detach().to(data.draw(dtypes)), data.draw(layouts)).detach().requires_grad_()
        for x in means(shape, torch.float64, seed=seed)
    )
    draw_std = st.one_of(st.floats(0.05, 2), st.just("tensor"))
    std1, std2 = (
        torch.rand(shape[0], generator=torch.Generator().manual_seed(seed + k)) + 0.1 if std == "tensor" else std
        for k, std in enumerate((data.draw(draw_std), data.draw(draw_std)))
    )
    shared = data.draw(st.booleans())
    kl = space.gaussian_kl(mean1, mean2, std1, *([] if shared else [std2]))
    expected, grad1, grad2 = by_torch(mean1, mean2, std1, std1 if shared else std2)
    wide = torch.float64 in (mean1.dtype, mean2.dtype)
    assert kl.dtype == (torch.float64 if wide else torch.float32)
    tolerance = 1e-12 if wide else 1e-6
    ratio = torch.as_tensor(1.0 if shared else std1 / std2).double()
    size = expected + ratio.log().abs() + ratio.square()  # what cancels in the value
    assert ((kl.double() - expected).abs() <= tolerance * size).all()
    for mean, truth in ((mean1, grad1), (mean2, grad2)):
        (grad,) = torch.autograd.grad(kl.sum(), mean, retain_graph=True)
        assert grad.dtype == mean.dtype
        assert_rounded_once(grad, truth, tolerance)


def test_the_two_directions_differ_where_the_spreads_do():
    mean1, mean2 = means((1, 4), torch.float64)
    one = af.gaussian_kl(mean1, mean2, 0.5, 0.8)
    other = af.gaussian_kl(mean2, mean1, 0.8, 0.5)
    assert abs(float((one - other).detach())) > 0.1
    assert af.gaussian_kl(mean1, mean2, 0.5, 0.5).item() == af.gaussian_kl(mean1, mean2, 0.5).item()


def test_nearly_equal_spreads_keep_their_digits():
    mean = torch.zeros(1, 4)
    for gap in (1e-3, 1e-5):
        kl = float(af.gaussian_kl(mean, mean, 0.7, 0.7 * (1 + gap)))
        assert kl == pytest.approx(math.log1p(gap) + 0.5 / (1 + gap) ** 2 - 0.5, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Standard deviations of any size

STDS = [5e-324, 1e-300, 1e-160, 1e-45, 1e-38, 1e-20, 3e-13, 1e-12, 1.0, 1e12, 3e12, 1e20, 1e38, 1e160, 1e300]


@both
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
@pytest.mark.parametrize("kind", [float, lambda std: torch.full((3,), std, dtype=torch.float64)], ids=["float", "[N]"])
def test_equal_means_of_equal_spread_are_at_0_whatever_the_spread(space, std, dtype, kind):
    mean1, mean2 = means((3, 5), dtype)
    mean2 = mean1.detach().clone().requires_grad_()
    kl = space.gaussian_kl(mean1, mean2, kind(std))
    assert kl.tolist() == [0, 0, 0]
    for grad in torch.autograd.grad(kl.sum(), (mean1, mean2)):
        assert not grad.any()


@both
@pytest.mark.parametrize(
    ("dtype", "std"),
    [
        *((torch.float32, std) for std in STDS if 1e-32 < std < 1e30),
        *((torch.float64, std) for std in STDS if 1e-290 < std < 1e290),
    ],
)
def test_means_apart_by_spreads_of_any_size(space, std, dtype):
    """In units of the spread it is always the same divergence; the gradient is that over the spread."""
    scale = Decimal(std)
    z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean1 = (z * std).to(dtype).requires_grad_()
    mean2 = torch.zeros(3, 64, dtype=dtype, requires_grad=True)
    kl = space.gaussian_kl(mean1, mean2, std)
    with localcontext(prec=50):
        exact = [[Decimal(x) / scale for x in row] for row in mean1.tolist()]
        expected = torch.tensor([float(sum(x * x for x in row) / 128) for row in exact], dtype=torch.float64)
        slope = torch.tensor([[float(x / scale / 64) for x in row] for row in exact], dtype=torch.float64)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(kl.double(), expected, rtol=tolerance, atol=0)
    for grad, sign in zip(torch.autograd.grad(kl.sum(), (mean1, mean2)), (1, -1), strict=True):
        representable = slope.abs() > 1.2e-38 if dtype == torch.float32 else slope.abs() > 0
        torch.testing.assert_close(grad.double()[representable], sign * slope[representable], rtol=tolerance, atol=0)


@both
@pytest.mark.parametrize(
    ("std1", "std2"),
    [
        (1e-20, 1.0),
        (1.0, 1e-15),
        (1e-300, 1e300),
        (1e-30, 3e-30),
        (1e18, 1e2),
        (5e-324, 1.0),
        (0.7, 0.7 * (1 + 1e-7)),
        (0.7 * (1 + 1e-6), 0.7),
        (2e-40, 2e-40 * (1 + 1e-5)),
        (1.1, 1.0),
        (1.0, 1.12),
    ],
)
def test_ratios_of_spreads_of_any_size(space, std1, std2):
    with localcontext(prec=60):
        ratio = Decimal(std1) / Decimal(std2)
        expected = float(-ratio.ln() + ratio * ratio / 2 - Decimal("0.5"))
    mean = torch.zeros(2, 4, requires_grad=True)
    kl = space.gaussian_kl(mean, mean.detach(), std1, std2)
    assert kl.tolist() == pytest.approx([expected, expected], rel=2e-7)
    wide = space.gaussian_kl(
        mean.detach().double(), mean.detach().double(), std1, torch.tensor(std2, dtype=torch.float64)
    )
    assert wide.tolist() == pytest.approx([expected, expected], rel=1e-9)
    assert not torch.autograd.grad(kl.sum(), mean)[0].any()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_spreads_in_any_dtype(space, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    std = torch.tensor([1.3, tiny, tiny / 8], dtype=dtype)  # the last is subnormal
    mean1 = torch.zeros(3, 4, dtype=torch.float64)
    mean2 = mean1 + 2 * std.double()[:, None]
    assert space.gaussian_kl(mean1, mean2, std).tolist() == pytest.approx([2.0] * 3, rel=1e-12)
    one = torch.tensor(0.3, dtype=dtype)
    pair = means((3, 5))
    assert torch.equal(space.gaussian_kl(*pair, one), space.gaussian_kl(*pair, float(one)))
    assert torch.equal(space.gaussian_kl(*pair, 0.4, one), space.gaussian_kl(*pair, 0.4, float(one)))


def test_an_extreme_spread_touches_no_other_sample():
    pair = means((4, 33))
    ordinary = torch.tensor([0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
    extreme = torch.tensor([0.3, 1e-13, 0.5, 1e13], dtype=torch.float64)
    kl, clean = (af.gaussian_kl(*pair, std) for std in (extreme, ordinary))
    assert torch.equal(kl[::2], clean[::2])
    for grad, expected in zip(*(torch.autograd.grad(x.sum(), pair) for x in (kl, clean)), strict=True):
        assert torch.equal(grad[::2], expected[::2]) and grad[1].all() and grad[3].all()


@both
def test_a_gradient_that_overflows_where_its_divergence_does_not_is_zero(space):
    mean1 = torch.tensor([[1e-6, 0.0], [1e-6, 0.0]], requires_grad=True)
    std = torch.tensor([1e-25, 1.0], dtype=torch.float64)
    kl = space.gaussian_kl(mean1, torch.zeros(2, 2), std)
    assert kl[0].item() == pytest.approx(float(mean1.detach()[0, 0].double() ** 2 / 4e-50), rel=1e-6)
    (grad,) = torch.autograd.grad(kl.sum(), mean1)
    assert not grad[0].any() and grad[1, 0].item() == pytest.approx(5e-7)


@both
def test_velocities_of_a_step_with_next_to_no_noise(space):
    for level in (1e-17, 1e-20, 1e-30):
        table = af.StepTable(shifted(10), noise_level=level)
        index = torch.tensor([0, 3, 8])
        kappa = table.rows(index).kappa.double()
        v = torch.zeros(3, 64).requires_grad_()
        assert space.gaussian_kl_from_velocity(v, v.detach(), table, index).tolist() == [0, 0, 0]
        z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        v_old = (z / kappa[:, None]).float()
        kl = space.gaussian_kl_from_velocity(v, v_old, table, index)
        expected = (v_old.double() * kappa[:, None]).square().mean(1) / 2
        torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(kl.sum(), v)
        truth = -kappa.square()[:, None] * v_old.double() / 64
        torch.testing.assert_close(grad.double(), truth, rtol=1e-6, atol=0)


def test_where_an_extreme_spread_cannot_be_read_equal_means_are_at_0_and_others_are_no_number():
    mean1, mean2 = means((2, 5))
    mean2 = torch.where(torch.tensor([[True], [False]]), mean1.detach(), mean2.detach())
    torch._dynamo.reset()
    compiled = torch.compile(af.gaussian_kl, fullgraph=True, backend="aot_eager")
    for std in (torch.tensor([1e-20, 1e-20]), torch.tensor([1e20, 1e20])):
        kl = compiled(mean1, mean2, std)
        assert kl[0] == 0 and kl[1].isnan()
        assert not torch.autograd.grad(kl.sum(), mean1)[0].any()


@both
def test_equal_gaussians_have_no_divergence(space, device):
    mean1, _ = means((3, 5, 7), device=device)
    kl = space.gaussian_kl(mean1, mean1.detach().clone(), 0.3)
    assert not kl.any()
    (grad,) = torch.autograd.grad(kl.sum(), mean1)
    assert not grad.any()


# ---------------------------------------------------------------------------------------------------------------------
# From velocities


@both
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.sampler)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_velocities_give_the_divergence_of_their_transitions(space, table, dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    batch = draw_transitions(6, (3, 8, 8), dtype, device, table=table)
    kl = space.gaussian_kl_from_velocity(batch.v, batch.v_old, table, batch.index)
    step = table.rows(batch.index, torch.float64)
    x = torch.randn(batch.v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    c_x, c_v = (column.view(-1, 1, 1, 1) for column in (step.c_x, step.c_v))
    mean1, mean2 = (c_x * x + c_v * y.detach().double() for y in (batch.v, batch.v_old))
    expected, grad1, _ = by_torch(mean1, mean2, step.sigma, step.sigma)
    assert_close_to_truth(kl, expected, 1e-6)
    batch.v_old.requires_grad_()
    (grad,) = torch.autograd.grad(kl.sum(), batch.v)
    assert_rounded_once(grad, c_v * grad1)


@pytest.mark.parametrize(
    ("step", "from_bfloat16"),
    [(1, 7.8e-7), (3, 1.6e-6), (4, 1.9e-6), (8, 3.4e-6)],
)
def test_float32_means_agree_and_bfloat16_means_do_not(step, from_bfloat16):
    """Acceptance test 11.7: at a KL of 1e-7, the trust region of Flow-DPPO, rounded means see their rounding alone."""
    lowest = 3e-3 / (1 + 2e-3)  # diffusers' schedule: the shift is applied twice
    s = torch.linspace(1, lowest, 10, dtype=torch.float64)
    table = af.StepTable([*(3 * s / (1 + 2 * s)).tolist(), 0.0])
    generator = torch.Generator().manual_seed(step)
    x, v_old, delta = torch.randn(3, 4, 65536, generator=generator).unbind()
    v_old = 1.2 * v_old
    kappa, c_x, c_v, sigma = (float(getattr(table, name)[step]) for name in ("kappa", "c_x", "c_v", "sigma"))
    v = v_old + delta * (math.sqrt(2e-7) / abs(kappa))
    index = torch.full((4,), step)
    kl = af.gaussian_kl_from_velocity(v, v_old, table, index).double()
    truth = kappa**2 / 2 * (v.double() - v_old.double()).square().mean(1)
    assert ((kl / truth - 1).abs() <= 1e-6).all()

    mean, mean_old = (c_x * x + c_v * y for y in (v, v_old))
    assert ((af.gaussian_kl(mean, mean_old, sigma) / truth - 1).abs() < 1e-5).all()
    exact_mean, exact_old = (c_x * x.double() + c_v * y.double() for y in (v, v_old))
    assert ((af.gaussian_kl(exact_mean, exact_old, sigma) / truth - 1).abs() < 1e-6).all()
    rounded = af.gaussian_kl(mean.bfloat16(), mean_old.bfloat16(), sigma)
    assert rounded.mean().item() == pytest.approx(from_bfloat16, rel=0.15)


@both
def test_a_deterministic_step_has_no_divergence_to_give(space):
    batch = draw_transitions(3, table=TABLES[3])
    batch.index[1] = 9
    with pytest.raises(ValueError, match=r"index\[1\] is 9, a deterministic step \(sigma = 0\); accepted are"):
        space.gaussian_kl_from_velocity(batch.v, batch.v_old, TABLES[3], batch.index)


def test_where_values_cannot_be_read_it_is_no_number_and_has_no_gradient(device):
    batch = draw_transitions(4, device=device, table=TABLES[3])
    expected = af.gaussian_kl_from_velocity(batch.v, batch.v_old, TABLES[3], batch.index)
    (expected_grad,) = torch.autograd.grad(expected.sum(), batch.v)
    batch.index[1:3] = torch.tensor([9, 12])
    torch._dynamo.reset()
    compiled = torch.compile(af.gaussian_kl_from_velocity, fullgraph=True, backend="aot_eager")
    kl = compiled(batch.v, batch.v_old, TABLES[3], batch.index)
    (grad,) = torch.autograd.grad(kl.sum(), batch.v)
    assert not torch.isfinite(kl[1:3]).any() and not grad[1:3].any()
    torch.testing.assert_close(kl[[0, 3]], expected[[0, 3]])
    torch.testing.assert_close(grad[[0, 3]], expected_grad[[0, 3]])


# ---------------------------------------------------------------------------------------------------------------------
# What every op here promises


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_sample_shows_itself_and_touches_no_other(space, value, which, device):
    pair = means((4, 3, 5), device=device)
    clean = space.gaussian_kl(*pair, 0.3)
    clean_grads = torch.autograd.grad(clean.sum(), pair)
    broken = [x.detach().clone() for x in pair]
    broken[which][1, 2, 4] = value
    for x in broken:
        x.requires_grad_()
    kl = space.gaussian_kl(*broken, 0.3)
    grads = torch.autograd.grad(kl.sum(), broken)
    others = torch.tensor([0, 2, 3], device=device)
    assert not torch.isfinite(kl[1]) and torch.equal(kl[others], clean[others])
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        assert not grad[1].any() and torch.equal(grad[others], clean_grad[others])


def test_a_sample_does_not_see_its_batch(device):
    pair = means((5, 33, 7), device=device)
    std = torch.rand(5, device=device) + 0.1
    kl = af.gaussian_kl(*pair, std, 0.4)
    grads = torch.autograd.grad(kl.sum(), pair)
    for row in range(5):
        one = [x.detach()[row : row + 1].clone().requires_grad_() for x in pair]
        alone = af.gaussian_kl(*one, std[row : row + 1], 0.4)
        assert torch.equal(alone[0], kl[row])
        for grad, whole in zip(torch.autograd.grad(alone.sum(), one), grads, strict=True):
            assert torch.equal(grad[0], whole[row])


def test_the_result_may_be_changed_in_place(device):
    mean1, mean2 = means((3, 3, 5), device=device)
    kl = af.gaussian_kl(mean1, mean2, 0.3)
    whole = torch.autograd.grad(kl.sum(), [mean1, mean2])
    kl = af.gaussian_kl(mean1, mean2, 0.3)
    kl /= 4
    quarter = torch.autograd.grad(kl.sum(), [mean1, mean2])
    assert all(torch.equal(q, w / 4) for q, w in zip(quarter, whole, strict=True))


@pytest.mark.parametrize("samples", [1, 64])
def test_one_launch_and_one_more_for_each_gradient(samples, device):
    module = _native.module
    assert module is not None
    mean1, mean2 = means((samples, 3, 5), device=device)
    for second, launches in ((mean2.detach(), 2), (mean2, 3)):
        module.reset_launch_count()
        kl = af.gaussian_kl(mean1, second, 0.3)
        assert module.launch_count() == 1
        kl.sum().backward()
        assert module.launch_count() == launches
    module.reset_launch_count()
    batch = draw_transitions(samples, device=device)
    af.gaussian_kl_from_velocity(batch.v, batch.v_old, batch.table, batch.index).sum().backward()
    assert module.launch_count() == 2


def test_only_inputs_and_per_sample_numbers_are_saved(device):
    mean1, mean2 = means((4, 16, 8), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        af.gaussian_kl(mean1, mean2, 0.3)
    inputs = {mean1.data_ptr(), mean2.data_ptr()}
    assert {x.data_ptr() for x in saved} >= inputs
    assert all(x.numel() <= 4 * 3 for x in saved if x.data_ptr() not in inputs)


def test_gradcheck():
    mean1, mean2 = means((2, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: af.gaussian_kl(a, b, 0.3, 0.5), (mean1, mean2), nondet_tol=0.0)
    batch = draw_transitions(2, (5,), torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: af.gaussian_kl_from_velocity(v, batch.v_old, batch.table, batch.index), (batch.v,), nondet_tol=0.0
    )


@both
def test_compiles_without_graph_breaks(space, device):
    mean1, mean2 = means((3, 5), device=device)
    std = torch.rand(3, device=device) + 0.1
    torch._dynamo.reset()
    kl = torch.compile(space.gaussian_kl, fullgraph=True, backend="aot_eager")(mean1, mean2, 0.3, std)
    expected = space.gaussian_kl(mean1, mean2, 0.3, std)
    torch.testing.assert_close(kl, expected)
    for grad, truth in zip(*(torch.autograd.grad(x.sum(), (mean1, mean2)) for x in (kl, expected)), strict=True):
        torch.testing.assert_close(grad, truth)


@both
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_spread_that_changes_is_compiled_for_once(space, dynamic):
    mean1, mean2 = (mean.detach() for mean in means((3, 5)))
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda std1, std2: space.gaussian_kl(mean1, mean2, std1, std2),
        fullgraph=True, backend=counter, dynamic=dynamic,
    )  # fmt: skip
    for step in range(5):
        std1, std2 = 0.3 + 0.1 * step, 0.5 + 0.01 * step
        torch.testing.assert_close(compiled(std1, std2), space.gaussian_kl(mean1, mean2, std1, std2))
    # With dynamic=None the first change of a number is one more compilation.
    assert counter.frame_count <= 2


@both
def test_inference_and_fake_tensors_are_taken(space):
    with torch.inference_mode():
        mean2 = means((3, 5))[1]
    mean1 = means((3, 5))[0]
    for std in (0.3, 1e-13):
        kl = space.gaussian_kl(mean1, mean2, std)
        copied = space.gaussian_kl(mean1, mean2.clone().detach(), std)
        assert torch.equal(kl, copied)
        grads = (torch.autograd.grad(x.sum(), mean1)[0] for x in (kl, copied))
        assert torch.equal(*grads)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(mean1)
        for std in (0.3, 1e-20, torch.rand(3), torch.rand(())):
            kl = space.gaussian_kl(fake, fake, std, 0.4)
            assert isinstance(kl, FakeTensor) and kl.shape == (3,) and kl.dtype == torch.float32


@both
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batch_and_empty_samples(space, shape, device):
    mean1, mean2 = means(shape, device=device)
    kl = space.gaussian_kl(mean1, mean2, 0.3)
    assert kl.shape == shape[:1] and not kl.any()
    kl.sum().backward()
    assert mean1.grad.shape == shape and mean2.grad.shape == shape


@both
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.randn(4), torch.randn(4), 1.0), r"mean1 has shape \[4\]; accepted are a batch dimension and at least"),
        ((torch.randn(4, 2), torch.randn(4, 3), 1.0), r"mean2 has shape \[4, 3\]; accepted is that of mean1, \[4, 2\]"),
        ((torch.randn(4, 2), None, 1.0), r"mean2 is a NoneType"),
        (
            (torch.randn(4, 2), torch.randn(4, 2, device="meta"), 1.0),
            r"mean2 is on meta; accepted is the device of mea",
        ),
        ((torch.randn(4, 2), torch.randn(4, 2), 0.0), r"std1 is 0.0; accepted is a finite number above 0"),
        ((torch.randn(4, 2), torch.randn(4, 2), 1.0, -1.0), r"std2 is -1.0; accepted is a finite number above 0"),
        (
            (torch.randn(4, 2), torch.randn(4, 2), torch.ones(3)),
            r"std1 is torch.float32 \[3\] on cpu; accepted are a n",
        ),
        (
            (torch.randn(2, 2), torch.randn(2, 2), torch.tensor([1.0, 0.0])),
            r"std1\[1\] is 0; accepted are numbers abov",
        ),
        *(
            (
                (torch.randn(2, 2), torch.randn(2, 2), 1.0, torch.tensor([1.0, wrong])),
                rf"std2\[1\] is {wrong}; accepted",
            )
            for wrong in (math.nan, math.inf, -1)
        ),
        (
            (torch.randn(2, 2), torch.randn(2, 2), torch.tensor(math.inf)),
            r"std1\[0\] is inf; accepted are numbers above",
        ),
        ((torch.randn(2, 2), torch.randn(2, 2), torch.ones(1, 2)), r"std1 is torch.float32 \[1, 2\] on cpu; accepted"),
    ],
)
def test_misuse_is_said_in_a_sentence(space, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        space.gaussian_kl(*arguments)


@both
def test_misuse_of_the_velocity_form(space):
    batch = draw_transitions(2, (5,))
    table = af.StepTable(shifted(10))
    for arguments, sentence in (
        ((batch.v, batch.v_old[:1], table, batch.index), r"v_old has shape \[1, 5\]"),
        ((batch.v, batch.v_old, None, batch.index), r"table is a NoneType; accepted is a StepTable"),
        ((batch.v, batch.v_old, table, 0.0), r"index is 0.0; accepted are the steps 0 to 9 and an int64 or int32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            space.gaussian_kl_from_velocity(*arguments)


def test_unknown_device_is_served_by_the_reference(monkeypatch):
    mean1, mean2 = means((3, 5))
    expected = af.reference.gaussian_kl(mean1, mean2, 0.3)
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        assert torch.equal(af.gaussian_kl(mean1, mean2, 0.3), expected)
