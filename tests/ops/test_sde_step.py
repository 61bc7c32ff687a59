"""One sampler step: against its formula, its noise, and together with the losses that train on it.

One file, for nearly every test takes a step of the same draws.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import UNIT_ROUNDOFF
from advflow_ext.testing.layouts import LAYOUTS, arrange
from advflow_ext.testing.strategies import HALVES_AND_FLOAT, shapes
from advflow_ext.testing.transition_strategies import FLASH, SCATTERED, TABLES, TransitionBatch, shifted
from tests.ops.transitions import SPACES

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
# Stochastic and deterministic steps side by side.
WINDOW = af.StepTable(shifted(10), stochastic_steps=(0, 1, 2, 5))


def draw(shape=(4, 3, 5, 7), dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [x.to(device, dtype) for x in torch.randn(3, *shape, generator=generator, dtype=torch.float64)]


def assert_is_the_step(out, v, x, table, index, noise, dtype):
    """In float64: x_next is the formula rounded once, and eps and log_prob explain that very x_next."""
    wide = torch.float64 in (v.dtype, x.dtype, noise.dtype, dtype)
    tolerance = 1e-14 if wide else 1e-6
    index = torch.as_tensor(index, device=v.device).expand(v.shape[0])
    step = table.rows(index, torch.float64)
    c_x, c_v, sigma = (column.view(-1, *[1] * (v.dim() - 1)) for column in step[:3])
    mean = c_x * x.double() + c_v * v.double()
    size = (c_x * x.double()).abs() + (c_v * v.double()).abs() + (sigma * noise.double()).abs()
    info = torch.finfo(dtype)
    assert out.x_next.dtype == dtype and out.x_next.shape == out.eps.shape == v.shape
    assert out.eps.dtype == (torch.float64 if wide else torch.float32)
    exact = mean + sigma * noise.double()
    rounding = (1.001 * exact.abs() + info.tiny) * UNIT_ROUNDOFF[dtype]
    assert ((out.x_next.double() - exact).abs() <= rounding + tolerance * size).all()

    explained = torch.where(sigma > 0, (out.x_next.double() - mean) / sigma, 0)
    error = torch.where(sigma > 0, tolerance * (size / sigma + explained.abs()), 0)
    assert ((out.eps.double() - explained).abs() <= error).all()

    score = -explained.flatten(1).square().mean(1) / 2 - step.sigma.log() - math.log(2 * math.pi) / 2
    score = torch.where(step.sigma > 0, score, 0)
    allowed = (explained.abs() * error).flatten(1).mean(1) + tolerance * (1 + score.abs())
    assert out.log_prob.shape == v.shape[:1]
    assert out.log_prob.dtype == torch.float64
    assert ((out.log_prob.double() - score).abs() <= allowed).all()


@both
@given(st.data(), shapes(), st.integers(0, 2**31))
@settings(max_examples=80)
def test_any_step_is_the_formula(space, data, shape, seed):
    dtypes = st.sampled_from([*HALVES_AND_FLOAT, torch.float64])
    v, x, noise = (
        arrange(tensor.to(data.draw(dtypes)), data.draw(st.sampled_from(LAYOUTS)))
        for tensor in draw(shape, torch.float64, seed=seed)
    )
    table = data.draw(st.sampled_from([*TABLES, FLASH, SCATTERED, WINDOW]))
    one = st.integers(0, table.steps - 1)
    index = data.draw(st.one_of(one, st.lists(one, min_size=shape[0], max_size=shape[0]).map(torch.tensor)))
    dtype = data.draw(st.one_of(st.none(), dtypes))
    out = space.sde_step(v, x, table, index, noise, dtype=dtype)
    assert_is_the_step(out, v, x, table, index, noise, dtype or x.dtype)


@both
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.sampler)
def test_a_512_pixel_latent(space, table, dtype, device):
    v, x, noise = draw((10, 16, 64, 64), dtype, device)
    index = torch.arange(10, device=device)
    assert_is_the_step(space.sde_step(v, x, table, index, noise), v, x, table, index, noise, dtype)


@both
def test_deterministic_rows_are_euler(space, device):
    v, x, noise = draw((10, 33), device=device)
    index = torch.arange(10, device=device)
    out = space.sde_step(v, x, WINDOW, index, noise)
    silent = torch.tensor([k not in WINDOW.stochastic_steps for k in range(10)], device=device)
    assert not out.eps[silent].any() and not out.log_prob[silent].any()
    assert out.eps[~silent].all() and out.log_prob[~silent].all()
    euler = x + WINDOW.dt.to(x)[:, None] * v
    torch.testing.assert_close(out.x_next[silent], euler[silent])
    again = space.sde_step(v, x, WINDOW, index)
    assert torch.equal(again.x_next[silent], out.x_next[silent])  # whatever the noise


@both
@pytest.mark.parametrize("index", [0, 3, 9])
def test_an_integer_is_that_step_for_all(space, index, device):
    v, x, noise = draw(device=device)
    one = space.sde_step(v, x, WINDOW, index, noise)
    each = space.sde_step(v, x, WINDOW, torch.full((4,), index, device=device), noise)
    assert all(torch.equal(a, b) for a, b in zip(one, each, strict=True))


@both
def test_rounding_comes_before_scoring(space, device):
    """What is scored is the x_next that training will see: scored before rounding it would be off by 1e-5 and more."""
    v, x, noise = draw((4, 65536), torch.bfloat16, device)
    out = space.sde_step(v, x, TABLES[0], 4, noise)
    step = TABLES[0].rows(torch.tensor([4]), torch.float64)
    mean = float(step.c_x) * x.double() + float(step.c_v) * v.double()
    constant = math.log(float(step.sigma)) + math.log(2 * math.pi) / 2

    def score(x_next):
        return -((x_next - mean) / float(step.sigma)).square().mean(1) / 2 - constant

    unrounded = mean + float(step.sigma) * noise.double()
    assert (out.log_prob.double() - score(out.x_next.double())).abs().max() < 1e-6
    assert (out.log_prob.double() - score(unrounded)).abs().max() > 3e-6


# ---------------------------------------------------------------------------------------------------------------------
# The noise


def test_the_generator_decides_and_the_batch_does_not(device):
    v, x, _ = draw((6, 3, 11), device=device)

    def step(rows, seed):
        generator = torch.Generator(device).manual_seed(seed)
        return af.sde_step(v[:rows], x[:rows], TABLES[0], 3, generator=generator)

    whole = step(6, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, step(6, 1), strict=True))
    assert not torch.equal(whole.eps, step(6, 2).eps)
    if device == "cpu":  # seeds are drawn one after another there
        for rows in (1, 4):
            assert all(torch.equal(a[:rows], b) for a, b in zip(whole, step(rows, 1), strict=True))


@both
def test_without_a_generator_torchs_own_decides(space, device):
    v, x, _ = draw(device=device)
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(space.sde_step(v, x, TABLES[0], 3))
    assert torch.equal(outputs[0].x_next, outputs[1].x_next)
    assert not torch.equal(space.sde_step(v, x, TABLES[0], 3).x_next, outputs[0].x_next)


@both
def test_noise_is_standard_normal_and_rows_are_unrelated(space, device):
    rows, elements = 16, 65536
    zeros = torch.zeros(rows, elements, device=device)
    generator = torch.Generator(device).manual_seed(0)
    eps = space.sde_step(zeros, zeros, TABLES[0], 2, generator=generator).eps.double()
    count = rows * elements
    assert abs(float(eps.mean())) < 4 / math.sqrt(count)
    assert abs(float(eps.square().mean()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float(eps.pow(3).mean())) < 4 * math.sqrt(15 / count)
    assert abs(float(eps.pow(4).mean()) - 3) < 4 * math.sqrt(96 / count)
    assert 4 < float(eps.abs().max()) < 7
    for level in (-2.0, -0.5, 1.0):
        share = 0.5 * math.erfc(-level / math.sqrt(2))
        assert abs(float((eps < level).double().mean()) - share) < 4 * 0.5 / math.sqrt(count)
    correlations = eps @ eps.T / elements - torch.eye(rows, device=device)
    assert correlations.abs().max() < 5 / math.sqrt(elements)  # the diagonal varies by sqrt(2) more
    neighbours = (eps[:, 1:] * eps[:, :-1]).mean()
    assert abs(float(neighbours)) < 4 / math.sqrt(count)


def test_seeded_noise_is_what_it_says(device):
    """eps of a seeded step, given back as noise, makes the same step."""
    v, x, _ = draw((4, 257), device=device)
    seeded = af.sde_step(v, x, TABLES[0], 3, generator=torch.Generator(device).manual_seed(1))
    given_back = af.sde_step(v, x, TABLES[0], 3, seeded.eps)
    torch.testing.assert_close(given_back.x_next, seeded.x_next, rtol=0, atol=1e-6)
    torch.testing.assert_close(given_back.log_prob, seeded.log_prob)


# ---------------------------------------------------------------------------------------------------------------------
# With the losses


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.sampler)
def test_the_log_ratio_is_the_difference_of_scores_of_the_same_x_next(space, table, dtype):
    """The losses never see x: here it is, under the means that contain it."""
    v_old, x, _ = draw((6, 64, 64), dtype)
    index = torch.tensor(table.stochastic_steps)[torch.arange(6) % len(table.stochastic_steps)]
    x_next, eps, _ = space.sde_step(v_old, x, table, index, generator=torch.Generator().manual_seed(0))
    v = v_old + 1e-2 * draw((6, 64, 64), dtype, seed=1)[0]
    step = table.rows(index, torch.float64)
    c_x, c_v, sigma = (column.view(-1, 1, 1) for column in step[:3])
    new, old = (c_x * x.double() + c_v * y.double() for y in (v, v_old))
    difference = ((x_next.double() - old).square() - (x_next.double() - new).square()) / (2 * sigma**2)
    batch = TransitionBatch(v, v_old, eps, table, index, torch.ones(6))
    metrics = af.flow_grpo_loss(*batch.arguments()).metrics.as_dict()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-9
    assert abs(metrics["mean_log_ratio"] - float(difference.mean())) < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# What every op here promises


@both
def test_a_bad_sample_touches_no_other(space, device):
    v, x, noise = draw(device=device)
    clean = space.sde_step(v, x, TABLES[0], 3, noise)
    x[1, 0, 0, 0] = float("nan")
    out = space.sde_step(v, x, TABLES[0], 3, noise)
    others = torch.tensor([0, 2, 3], device=device)
    assert out.x_next[1].isnan().sum() == 1 and out.log_prob[1].isnan()
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("shape", [(5, 1), (5, 33), (5, 3, 5, 7), (5, 12291)])
def test_a_sample_does_not_see_its_batch(shape, device):
    v, x, noise = draw(shape, device=device)
    index = torch.tensor([0, 4, 2, 9, 5], device=device)
    whole = af.sde_step(v, x, WINDOW, index, noise)
    for row in range(5):
        rows = slice(row, row + 1)
        alone = af.sde_step(v[rows], x[rows], WINDOW, index[rows], noise[rows])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("samples", [1, 64])
def test_one_native_launch(samples, given, device):
    module = _native.module
    assert module is not None
    v, x, noise = draw((samples, 33), device=device)
    af.sde_step(v, x, TABLES[0], 3, noise if given else None)
    module.reset_launch_count()
    af.sde_step(v, x, TABLES[0], 3, noise if given else None)
    assert module.launch_count() == 1


@both
def test_nothing_is_recorded(space, device):
    v, x, noise = (tensor.requires_grad_() for tensor in draw(device=device))
    assert not any(tensor.requires_grad for tensor in space.sde_step(v, x, TABLES[0], 3, noise))


@both
@pytest.mark.parametrize("given", [True, False])
def test_compiles_without_graph_breaks(space, given, device):
    v, x, noise = draw(device=device)
    index = torch.tensor([0, 3, 9, 4], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(space.sde_step, fullgraph=True, backend="aot_eager")
    out = compiled(v, x, WINDOW, index, noise if given else None)
    if given:
        for a, b in zip(out, space.sde_step(v, x, WINDOW, index, noise), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.isfinite(out.x_next).all() and not out.eps[2].any() and out.eps[0].all()


@both
@pytest.mark.parametrize("dynamic", [None, True])
def test_an_integer_that_changes_is_compiled_for_once(space, dynamic):
    v, x, noise = draw()
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(
        lambda v, x, index: space.sde_step(v, x, WINDOW, index, noise), fullgraph=True, backend=counter, dynamic=dynamic
    )
    for index in (4, 0, 1, 9, 3, 2):
        for a, b in zip(step(v, x, index), space.sde_step(v, x, WINDOW, index, noise), strict=True):
            assert torch.equal(a, b)
    # With dynamic=None the first change of a number is one more compilation, and 0 and 1 are their own.
    assert counter.frame_count <= 4
    with pytest.raises(Exception, match=r"index is 10; accepted are the steps 0 to 9 and an int64 or int32 tensor"):
        step(v, x, 10)


@both
def test_a_new_window_is_no_new_program(space):
    """MixGRPO's window moves, and a trainer with one noise level a sample makes a table for every batch."""
    v, x, noise = draw()
    index = torch.tensor([0, 3, 2, 1])
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(lambda v, x, table: space.sde_step(v, x, table, index, noise), fullgraph=True, backend=counter)
    sigmas = shifted(4)
    levels = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    tables = [af.StepTable(sigmas, stochastic_steps=[k]) for k in range(3)]
    tables += [af.StepTable.from_steps(sigmas[:-1], sigmas[1:], noise_level=a, sigma_1=sigmas[1]) for a in levels]
    for table in tables:
        for a, b in zip(step(v, x, table), space.sde_step(v, x, table, index, noise), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@both
def test_rollouts_in_inference_mode_are_steps_like_others(space):
    with torch.inference_mode():
        v, x, noise = draw()
        table = af.StepTable(shifted(10))
        inside = space.sde_step(v, x, table, 3, noise)
    outside = space.sde_step(v.clone(), x.clone(), table, 3, noise.clone())
    mixed = space.sde_step(v, x, table, torch.full((4,), 3), noise)
    for a, b, c in zip(inside, outside, mixed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and not b.is_inference()


@both
def test_fake_tensors_are_stepped(space):
    table = af.StepTable(shifted(10))
    with FakeTensorMode():
        v, x, noise = draw()
        for index in (3, torch.tensor([0, 3, 9, 4])):
            for given in (noise, None):
                out = space.sde_step(v, x, table, index, given, dtype=torch.bfloat16)
                assert all(isinstance(tensor, FakeTensor) for tensor in out)
                assert (out.x_next.shape, out.x_next.dtype, out.log_prob.shape) == (v.shape, torch.bfloat16, (4,))
    v, x, noise = draw()
    assert_is_the_step(space.sde_step(v, x, table, 3, noise), v, x, table, 3, noise, torch.float32)


@both
def test_a_latent_that_does_not_fit_shows_itself(space, device):
    """fp16 ends at 65504: x_next is infinite, its noise and its log-probability are no numbers to train on."""
    v, x, noise = draw(device=device)
    x[1] = 1e5
    out = space.sde_step(v, x, TABLES[0], 3, noise, dtype=torch.float16)
    others = torch.tensor([0, 2, 3], device=device)
    assert out.x_next[1].isinf().all() and not torch.isfinite(out.eps[1]).any() and not torch.isfinite(out.log_prob[1])
    assert torch.isfinite(out.x_next[others]).all() and torch.isfinite(out.log_prob[others]).all()


def test_where_values_cannot_be_read_an_unknown_step_is_no_number(device):
    v, x, noise = draw(device=device)
    index = torch.tensor([0, 10, -1, 4], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(af.sde_step, fullgraph=True, backend="aot_eager")
    out = compiled(v, x, TABLES[0], index, noise)
    expected = af.sde_step(v, x, TABLES[0], torch.tensor([0, 0, 0, 4], device=device), noise)
    assert out.x_next[1:3].isnan().all() and out.log_prob[1:3].isnan().all()
    assert torch.equal(out.x_next[[0, 3]], expected.x_next[[0, 3]])


@both
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("given", [True, False])
def test_empty_batch_and_empty_samples(space, shape, given, device):
    v, x, noise = draw(shape, device=device)
    out = space.sde_step(v, x, TABLES[0], 3, noise if given else None)
    assert out.x_next.shape == out.eps.shape == shape and out.log_prob.shape == shape[:1]
    assert torch.isfinite(out.log_prob).all()


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device():
    v, x, noise = draw(device="cuda")
    index = torch.tensor([0, 3, 9, 4], device="cuda")
    af.sde_step(v, x, WINDOW, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        af.sde_step(v, x, WINDOW, index)
        af.sde_step(v, x, WINDOW, 3, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@both
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"v": torch.randn(4)}, r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
        ({"x": torch.randn(4, 5)}, r"x has shape \[4, 5\]; accepted is the shape of v, \[4, 6\]"),
        ({"x": torch.ones(4, 6, dtype=torch.int32)}, r"x has dtype torch.int32"),
        ({"noise": torch.randn(4, 6, device="meta")}, r"noise is on meta; accepted is the device of v, cpu"),
        ({"table": 3}, r"table is a int; accepted is a StepTable"),
        ({"index": 10}, r"index is 10; accepted are the steps 0 to 9 and an int64 or int32 tensor \[\] or \[N\]"),
        ({"index": -1}, r"index is -1; accepted are the steps 0 to 9"),
        ({"index": True}, r"index is True; accepted"),
        ({"index": 1.0}, r"index is 1.0; accepted"),
        ({"index": torch.tensor([0, 1, 2])}, r"index has shape \[3\]; accepted is one step a transition, \[4\]"),
        (
            {"index": torch.tensor([0, 1, 2, 10])},
            r"index\[3\] is 10, outside the table of 10 steps; accepted are the steps 0 to 9",
        ),
        ({"index": torch.zeros(4)}, r"index is torch.float32; accepted is an int64 or int32 tensor"),
        ({"generator": 0}, r"generator is a int; accepted are a torch.Generator and None"),
        ({"generator": torch.Generator()}, r"generator is given beside noise; accepted is one of them, or neither"),
        ({"dtype": torch.int32}, r"dtype is torch.int32; accepted are float32, float16, bfloat16, float64 and None"),
        ({"dtype": "bf16"}, r"dtype is 'bf16'; accepted"),
    ],
)
def test_misuse_is_said_in_a_sentence(space, change, sentence):
    v, x, noise = draw((4, 6))
    arguments = {"v": v, "x": x, "table": TABLES[0], "index": 3, "noise": noise}
    with pytest.raises(ValueError, match=sentence):
        space.sde_step(**{**arguments, **change})


def test_unknown_device_is_served_by_the_reference(monkeypatch):
    v, x, noise = draw()
    expected = af.reference.sde_step(v, x, TABLES[0], 3, noise)
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        out = af.sde_step(v, x, TABLES[0], 3, noise)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
