"""The log-probability of a stored transition and its noise: the formula, the sampler's own bits, and the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import assert_rounded_once
from advflow_ext.testing.layouts import LAYOUTS, arrange
from advflow_ext.testing.strategies import HALVES_AND_FLOAT, shapes
from advflow_ext.testing.transition_strategies import FLASH, SCATTERED, TABLES, shifted
from tests.ops.transitions import SPACES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
WINDOW = af.StepTable(shifted(10), stochastic_steps=(0, 1, 2, 5))  # stochastic and deterministic steps side by side
CONSTANT = math.log(2 * math.pi) / 2


def draw(shape=(4, 3, 5, 7), dtype=torch.float32, device="cpu", seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [x.to(device, dtype) for x in torch.randn(count, *shape, generator=generator, dtype=torch.float64)]


def columns(table, index, v):
    step = table.rows(torch.as_tensor(index, device=v.device).expand(len(v)), torch.float64)
    return [column.view(-1, *[1] * (v.dim() - 1)) for column in step[:3]]


@both
@given(st.data(), shapes(), st.integers(0, 2**31), st.booleans())
@settings(max_examples=80)
def test_any_transition_is_the_formula(space, data, shape, seed, variance):
    dtypes = st.sampled_from([*HALVES_AND_FLOAT, torch.float64])
    given_ = [
        arrange(tensor.to(data.draw(dtypes)), data.draw(st.sampled_from(LAYOUTS)))
        for tensor in draw(shape, torch.float64, seed=seed)
    ]
    table = data.draw(st.sampled_from([*TABLES, FLASH, SCATTERED, WINDOW]))
    one = st.integers(0, table.steps - 1)
    index = data.draw(st.one_of(one, st.lists(one, min_size=shape[0], max_size=shape[0]).map(torch.tensor)))
    v = given_[0].detach().requires_grad_()
    values = space.transition_log_prob(v, *given_[1:], table, index, variance=variance)
    (grad,) = torch.autograd.grad(values.sum(), v)
    noise = space.transition_noise(*given_, table, index)

    wide = any(tensor.dtype == torch.float64 for tensor in given_)
    tolerance = 1e-13 if wide else 1e-6
    c_x, c_v, sigma = columns(table, index, v)
    v_wide, x, x_next = (tensor.detach().double() for tensor in (v, *given_[1:]))
    size = (c_x * x).abs() + (c_v * v_wide).abs() + x_next.abs()
    eps = torch.where(sigma > 0, (x_next - c_x * x - c_v * v_wide) / sigma, 0)
    error = torch.where(sigma > 0, tolerance * (size / sigma + eps.abs()), 0)
    assert noise.dtype == (torch.float64 if wide else torch.float32)
    assert noise.is_contiguous() or space is af.reference
    assert ((noise.double() - eps).abs() <= error).all()

    sigma, c_v = sigma.flatten(), c_v.flatten()
    square = eps.flatten(1).square().mean(1)
    scale = torch.tensor(0.5) if variance else sigma.square()
    truth = -scale * square - ((sigma.log() + CONSTANT) if variance else 0)
    truth = torch.where(sigma > 0, truth, 0)
    allowed = scale * ((2 * eps.abs() + error) * error).flatten(1).mean(1) + tolerance * (1 + scale * square)
    assert values.dtype == torch.float64 and values.shape == shape[:1]
    assert ((values - truth).abs() <= allowed).all()

    slope = torch.where(sigma > 0, 2 * scale * c_v / sigma, 0).view_as(columns(table, index, v)[0])
    exact = slope * eps / max(v[0].numel(), 1)
    assert grad.dtype == v.dtype
    off = (slope.abs() * error + tolerance * exact.abs()) / max(v[0].numel(), 1) + tolerance * exact.abs()
    info = torch.finfo(v.dtype)
    rounding = (1.001 * exact.abs() + info.tiny) * info.eps / 2
    assert ((grad.double() - exact).abs() <= off + rounding).all()


@pytest.mark.parametrize("table", [*TABLES, WINDOW], ids=lambda table: f"{table.sampler}-{len(table.stochastic_steps)}")
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("shape", [(6, 1), (6, 3, 5, 7), (6, 4097), (6, 16, 32, 33)])
def test_an_unchanged_policy_has_the_samplers_own_bits(table, dtype, shape, device):
    """Whatever else was in the batch that sampled: the log-ratio is 0, not nearly so."""
    v, x = draw(shape, dtype, device, count=2)
    index = torch.arange(6, device=device)
    out = af.sde_step(v, x, table, index, generator=torch.Generator(device).manual_seed(0))
    again = af.transition_log_prob(v, x, out.x_next, table, index)
    assert torch.equal(again, out.log_prob)
    assert torch.equal(af.transition_noise(v, x, out.x_next, table, index), out.eps)
    for rows in ([4], [5, 1, 2]):
        some = af.transition_log_prob(v[rows], x[rows], out.x_next[rows], table, index[rows])
        assert torch.equal(some, out.log_prob[rows])
    for row in range(6):  # an int for one
        alone = slice(row, row + 1)
        assert torch.equal(af.transition_log_prob(v[alone], x[alone], out.x_next[alone], table, row), again[alone])


def test_a_stored_bf16_latent_is_scored_as_it_is(device):
    v, x = draw((4, 4096), torch.float32, device, count=2)
    out = af.sde_step(v, x, TABLES[0], 3, dtype=torch.bfloat16, generator=torch.Generator(device).manual_seed(0))
    assert out.eps.dtype == torch.float32
    assert torch.equal(af.transition_log_prob(v, x, out.x_next, TABLES[0], 3), out.log_prob)
    assert torch.equal(af.transition_noise(v, x, out.x_next, TABLES[0], 3), out.eps)


def test_the_difference_of_two_keeps_nine_digits():
    """At an update of 2e-7 the log-ratio is of the size of what float32 log-probabilities are off by."""
    table, step = TABLES[0], 4
    v_old, x, change = draw((8, 16, 64, 64))
    x_next = af.sde_step(v_old, x, table, step, generator=torch.Generator().manual_seed(0)).x_next
    v = v_old + 2e-4 * change
    latents = x.double(), x_next.double()
    wide = [af.reference.transition_log_prob(u.double(), *latents, table, step) for u in (v, v_old)]
    truth = wide[0] - wide[1]
    ours = af.transition_log_prob(v, x, x_next, table, step) - af.transition_log_prob(v_old, x, x_next, table, step)
    c_x, c_v, sigma = (column.float() for column in columns(table, step, v))

    def in_float32(u):
        mean = c_x * x + c_v * u
        return (-(x_next - mean).square() / (2 * sigma**2) - sigma.log() - CONSTANT).flatten(1).mean(1)

    theirs = in_float32(v) - in_float32(v_old)
    assert (ours - truth).abs().max() < 1e-9
    assert (theirs.double() - truth).abs().max() > 5e-8


@both
def test_noise_level_0_gives_0_and_no_gradient(space, device):
    table = af.StepTable(shifted(10), noise_level=0.0)
    v, x, x_next = draw(device=device)
    v.requires_grad_()
    for variance in (True, False):
        values = space.transition_log_prob(v, x, x_next, table, 3, variance=variance)
        assert values.dtype == torch.float64 and not values.any()
        assert not torch.autograd.grad(values.sum(), v)[0].any()
    assert not space.transition_noise(v, x, x_next, table, 3).any()


@both
@pytest.mark.parametrize("variance", [True, False])
def test_gradcheck(space, variance):
    v, x, x_next = draw((3, 2, 5), torch.float64)
    v.requires_grad_()
    index = torch.tensor([0, 3, 5])  # the one in the middle is deterministic
    assert torch.autograd.gradcheck(
        lambda v: space.transition_log_prob(v, x, x_next, WINDOW, index, variance=variance), v
    )


def test_the_upstream_gradient_of_each_transition_joins_before_rounding(device):
    v, x, x_next = draw((4, 4096), torch.float16, device)
    v.requires_grad_()
    upstream = torch.tensor([65536.0, 1.0, 0.0, -3.0], dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad(af.transition_log_prob(v, x, x_next, TABLES[0], 3), v, upstream)
    wide = v.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        af.reference.transition_log_prob(wide, x.double(), x_next.double(), TABLES[0], 3), wide, upstream
    )[0]
    assert_rounded_once(grad, exact, 1e-5)
    assert grad[0].abs().min() > 0 and not grad[2].any()


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(3))
def test_a_bad_transition_shows_has_no_gradient_and_touches_no_other(space, bad, which, device):
    latents = draw(device=device)

    def call(latents):
        v = latents[0].clone().requires_grad_()
        values = space.transition_log_prob(v, *latents[1:], TABLES[0], 3)
        return values.detach(), torch.autograd.grad(values.sum(), v)[0]

    clean = call(latents)
    latents[which][1, 0, 0, 0] = bad
    values, grad = call(latents)
    assert not values[1].isfinite() and not grad[1].any()
    for one, other in zip((values, grad), clean, strict=True):
        assert torch.equal(one[[0, 2, 3]], other[[0, 2, 3]])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0, 2)])
@both
def test_nothing_to_score(space, shape):
    v = torch.empty(shape, requires_grad=True)
    values = space.transition_log_prob(v, v.detach(), v.detach(), TABLES[0], 3)
    assert values.shape == shape[:1] and values.dtype == torch.float64 and values.isfinite().all()
    assert torch.autograd.grad(values.sum(), v)[0].shape == shape
    assert space.transition_noise(v, v, v, TABLES[0], 3).shape == shape


@pytest.mark.skipif(_native.module is None, reason="nothing compiled")
@pytest.mark.parametrize("samples", [1, 64])
def test_one_launch_and_one_for_the_gradient(samples, device):
    module = _native.module
    v, x, x_next = draw((samples, 33), device=device)
    module.reset_launch_count()
    values = af.transition_log_prob(v.requires_grad_(), x, x_next, TABLES[0], 3)
    assert module.launch_count() == 1
    values.sum().backward()
    assert module.launch_count() == 2
    af.transition_noise(v, x, x_next, TABLES[0], 3)
    assert module.launch_count() == 3


@both
def test_compiles_once_for_changing_steps_and_tables(space):
    v, x, x_next = draw()
    counter = CompileCounter()
    torch._dynamo.reset()

    def step(v, index, table, variance):
        return space.transition_log_prob(v, x, x_next, table, index, variance=variance)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    tables = [WINDOW, TABLES[0], af.StepTable(shifted(10), noise_level=0.3)]
    for k, table in enumerate(tables):
        index = torch.tensor([k, 3, 5, 0])
        assert torch.equal(compiled(v, index, table, True), step(v, index, table, True))
    assert counter.frame_count == 1
    for index in (2, 4, 6, 3, 5):
        assert torch.equal(compiled(v, index, WINDOW, False), step(v, index, WINDOW, False))
    assert counter.frame_count <= 4  # another dtype of index, the other form, and the first change of a number


@both
def test_compiles_for_any_batch_with_its_gradient(space):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(space.transition_log_prob, fullgraph=True, backend=counter, dynamic=True)
    compiled_for_the_first = 0
    for batch in (4, 7, 3, 5):
        v, x, x_next = draw((batch, 16, 8))  # sizes that are equal once are held to be so
        index = torch.arange(batch)
        for call in (compiled, space.transition_log_prob):
            leaf = v.clone().requires_grad_()
            values = call(leaf, x, x_next, TABLES[0], index)
            (grad,) = torch.autograd.grad(values.sum(), leaf)
            if call is compiled:
                found = values.detach(), grad
        torch.testing.assert_close(found[0], values.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], grad, rtol=1e-5, atol=1e-9)
        compiled_for_the_first = compiled_for_the_first or counter.frame_count
    assert counter.frame_count == compiled_for_the_first


def test_a_second_derivative_is_refused():
    v, x, x_next = draw()
    v.requires_grad_()
    values = af.transition_log_prob(v, x, x_next, TABLES[0], 3)
    (grad,) = torch.autograd.grad(values.sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="transition_deviation is not implemented|does not require grad"):
        grad.sum().backward()


V, X, X_NEXT = draw()


@both
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"v": V[0, 0, 0, 0]}, r"v has shape \[\]; accepted are a batch dimension and at least one more"),
        ({"x": X[:2]}, r"x has shape \[2, 3, 5, 7\]; accepted is the shape of v, \[4, 3, 5, 7\]"),
        ({"x_next": X_NEXT.int()}, r"x_next has dtype torch.int32; accepted are float32, float16"),
        ({"x_next": None}, r"x_next is a NoneType; accepted is a floating-point torch.Tensor"),
        ({"x": X.to("meta")}, r"x is on meta; accepted is the device of v, cpu"),
        ({"table": 3}, r"table is a int; accepted is a StepTable"),
        ({"index": 10}, r"index is 10; accepted are the steps 0 to 9 and an int64 or int32 tensor"),
        (
            {"index": torch.tensor([0, 1, 12, 3])},
            r"index\[2\] is 12, outside the table of 10 steps; accepted are the s",
        ),
        ({"index": torch.tensor([0, 1])}, r"index has shape \[2\]; accepted is one step a transition, \[4\]"),
        ({"variance": 1}, r"variance is 1; accepted are True and False"),
    ],
)
def test_bad_input_gets_a_sentence(space, change, sentence):
    given_ = {"v": V, "x": X, "x_next": X_NEXT, "table": TABLES[0], "index": 3} | change
    with pytest.raises(ValueError, match=sentence):
        space.transition_log_prob(**given_)
    if "variance" in change or "v" in change:
        return
    with pytest.raises(ValueError, match=sentence):
        space.transition_noise(V, *(given_[key] for key in ("x", "x_next", "table", "index")))


@both
@pytest.mark.parametrize("index", [2, torch.tensor(2), torch.tensor(2, dtype=torch.int32), torch.tensor([2] * 4).int()])
def test_a_step_comes_as_a_number_or_a_tensor_of_either_width(space, index):
    expected = space.transition_log_prob(V, X, X_NEXT, WINDOW, torch.tensor([2] * 4))
    assert torch.equal(space.transition_log_prob(V, X, X_NEXT, WINDOW, index), expected)
    loss = space.flow_grpo_loss(V, X, X_NEXT, WINDOW, torch.tensor([2] * 4), torch.ones(4)).loss
    assert torch.equal(space.flow_grpo_loss(V, X, X_NEXT, WINDOW, index, torch.ones(4)).loss, loss)


def test_a_step_that_cannot_be_read_and_is_none_shows():
    module = torch.compile(af.transition_log_prob, fullgraph=True, backend="aot_eager")
    v = V.clone().requires_grad_()
    values = module(v, X, X_NEXT, TABLES[0], torch.tensor([0, 10, -1, 3]))
    assert values.isfinite().tolist() == [True, False, False, True]
    grad = torch.autograd.grad(values.nan_to_num().sum(), v)[0]
    assert not grad[1:3].any() and grad[0].any()


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts that kept means


@given(st.data(), shapes(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_means_give_back_the_velocity_and_the_noise(data, shape, seed):
    table = data.draw(st.sampled_from([*TABLES, FLASH, SCATTERED, WINDOW]))
    index = torch.tensor(data.draw(st.lists(st.integers(0, table.steps - 1), min_size=shape[0], max_size=shape[0])))
    v_old, x, noise = draw(shape, torch.float64, seed=seed)
    c_x, c_v, sigma = columns(table, index, v_old)
    means = c_x * x + c_v * v_old
    found = af.from_means(means, x, means + sigma * noise, table, index)
    size = (c_x * x).abs() / c_v.abs() + v_old.abs()
    assert ((found[0] - v_old).abs() <= 1e-14 * (1 + size)).all()
    expected = torch.where(sigma == 0, 0, noise)
    assert ((found[1] - expected).abs() <= 1e-14 * (means.abs() + 1) / torch.where(sigma == 0, 1, sigma)).all()


def test_a_loss_from_float32_means_is_that_of_the_rollout():
    table = TABLES[0]
    v_old, x, change = draw((8, 16, 32, 32))
    index = torch.arange(8)
    out = af.sde_step(v_old, x, table, index, generator=torch.Generator().manual_seed(0))
    c_x, c_v, _ = (column.float() for column in columns(table, index, v_old))
    kept = af.from_means(c_x * x + c_v * v_old, x, out.x_next, table, index)
    assert kept[0].dtype == kept[1].dtype == torch.float32
    v, advantages = v_old + 1e-2 * change, torch.ones(8)
    losses = [
        af.grpo_guard_loss(v, *made, table, index, advantages, clip=0.5, reduction="none").loss
        for made in ((v_old, out.eps), kept)
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)


def test_from_means_says_what_is_wrong():
    for change, sentence in (
        ({"means": V[0, 0, 0, 0]}, r"means has shape \[\]; accepted are a batch dimension"),
        ({"x": X[:2]}, r"x has shape \[2, 3, 5, 7\]; accepted is the shape of means, \[4, 3, 5, 7\]"),
        ({"x_next": X.to("meta")}, r"x_next is on meta; accepted is the device of means, cpu"),
        ({"table": None}, r"table is a NoneType; accepted is a StepTable"),
        ({"index": -1}, r"index is -1; accepted are the steps 0 to 9"),
    ):
        given_ = {"means": V, "x": X, "x_next": X_NEXT, "table": TABLES[0], "index": 3} | change
        with pytest.raises(ValueError, match=sentence):
            af.from_means(**given_)


def test_from_means_compiles_and_takes_inference_tensors():
    expected = af.from_means(V, X, X_NEXT, WINDOW, 2)
    torch._dynamo.reset()
    compiled = torch.compile(af.from_means, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        given_ = [tensor.clone() for tensor in (V, X, X_NEXT)]
    for call in (compiled, af.from_means):
        for one, other in zip(call(*given_, WINDOW, torch.tensor([2] * 4)), expected, strict=True):
            assert torch.equal(one, other) and not one.requires_grad
