"""The raw sampler step: exactness, rounding before scoring, independence of rows, its noise, and as an operator.

One file, for it is what tests/build/test_sanitizer.py and the newest torch run of the step.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advflow_ext import _native
from advflow_ext.kernels.sde_step import sde_step_op
from advflow_ext.testing import UNIT_ROUNDOFF
from advflow_ext.testing.layouts import LAYOUTS, arrange
from advflow_ext.testing.strategies import HALVES_AND_FLOAT, shapes

raw_op = torch.ops.advflow.sde_step.default

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LARGEST_RADIUS = math.sqrt(2 * 33 * math.log(2))  # of a uniform that is at least 2^-33


def latents(shape, count, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(device, dtype).unbind())


def coefficients(batch, sigma=0.3, dtype=torch.float32, device="cpu"):
    return torch.tensor([[0.9, -0.1, sigma]], dtype=dtype, device=device).repeat(batch, 1)


def noise_of(seeds, elements, device="cpu"):
    """What is drawn: the step from zero with mean 0 and sigma 1."""
    zeros = torch.zeros(len(seeds), elements, device=device)
    coef = torch.ones(len(seeds), 3, device=device)
    return sde_step_op(zeros, zeros, coef, None, torch.as_tensor(seeds, device=device), None)[0]


def same_step(one, other):
    return all(itertools.starmap(torch.equal, zip(one, other, strict=True)))


def assert_is_the_step(out, v, x, coef, noise, dtype):
    x_next, eps, deviation_sq = out
    assert x_next.shape == eps.shape == x.shape and deviation_sq.shape == x.shape[:1]
    assert x_next.is_contiguous() and eps.is_contiguous()
    assert (x_next.dtype, eps.dtype, deviation_sq.dtype) == (dtype, coef.dtype, torch.float64)
    *given, stored = (t.to(coef.dtype).flatten(1) for t in (v, x, x_next))
    v, x, noise, x_next, eps = (t.double().flatten(1) for t in (v, x, noise, x_next, eps))
    c_x, c_v, sigma = coef.double()[:, :, None].unbind(1)
    noisy = sigma != 0
    mean = c_x * x + c_v * v
    expected = torch.where(noisy, mean + sigma * noise, mean)
    unit, info = UNIT_ROUNDOFF[coef.dtype], torch.finfo(dtype)
    terms = (c_x * x).abs() + (c_v * v).abs() + torch.where(noisy, sigma * noise, 0).abs()
    # float64 goes to half precision through float32.
    one_rounding = 1.001 * UNIT_ROUNDOFF[dtype] * expected.abs() + info.tiny * UNIT_ROUNDOFF[dtype]
    assert ((x_next - expected).abs() <= one_rounding + 2 * unit * terms).all()

    # Of x_next as it is, whatever it was rounded to.
    truth = torch.where(noisy, (x_next - mean) / sigma, 0)
    accumulated = torch.where(noisy, 4 * unit * (terms + x_next.abs()) / sigma, 0) + 4 * unit * truth.abs()
    assert ((eps - truth).abs() <= accumulated).all()
    # Summed in float64, without rounding them in turn; a GPU fuses multiplications and additions.
    deviation = torch.where(noisy, stored - coef[:, :1] * given[1] - coef[:, 1:2] * given[0], 0).double()
    rtol, atol = (1e-3, 1e-12) if coef.is_cuda else (1e-13, 0)
    torch.testing.assert_close(deviation_sq, deviation.square().mean(1), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@given(st.data(), shapes(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=200)
def test_any_inputs_match_the_formula(data, shape, drawn, seed):
    def arranged(tensor):
        return arrange(tensor.to(data.draw(st.sampled_from(HALVES_AND_FLOAT))), data.draw(st.sampled_from(LAYOUTS)))

    v, x, noise = map(arranged, latents(shape, 3, torch.float64, seed=seed))
    dtype = data.draw(st.sampled_from([None, *HALVES_AND_FLOAT]))
    sigmas = data.draw(st.lists(st.sampled_from([0.0, 0.006, 0.3, 1.0]), min_size=shape[0], max_size=shape[0]))
    coef = coefficients(shape[0])
    coef[:, 2] = torch.tensor(sigmas)
    seeds = torch.arange(seed, seed + shape[0])
    if drawn:
        out = sde_step_op(v, x, coef, None, seeds, dtype)
        noise = noise_of(seeds, x[0].numel()).view(shape)
        assert same_step(out, sde_step_op(v, x, coef, noise, None, dtype))
    else:
        out = sde_step_op(v, x, coef, noise, None, dtype)
    assert_is_the_step(out, v, x, coef, noise, dtype or x.dtype)


@pytest.mark.parametrize("wide", ["v", "x", "noise", "dtype", "all"])
@pytest.mark.parametrize("size", [1, 515, 5003])
def test_float64_is_accumulated_in_float64(wide, size):
    names = dict(zip(("v", "x", "noise"), latents((3, size), 3), strict=True))
    names = {name: tensor.double() if wide in (name, "all") else tensor for name, tensor in names.items()}
    dtype = torch.float64 if wide == "dtype" else None
    coef = coefficients(3, dtype=torch.float64)
    out = sde_step_op(names["v"], names["x"], coef, names["noise"], None, dtype)
    assert_is_the_step(out, names["v"], names["x"], coef, names["noise"], dtype or names["x"].dtype)


def test_float64_draws_the_noise_of_float32():
    zeros = torch.zeros(2, 1031, dtype=torch.float64)
    seeds = torch.tensor([3, -4])
    drawn, _, _ = sde_step_op(zeros, zeros, torch.ones(2, 3, dtype=torch.float64), None, seeds, None)
    assert torch.equal(drawn, noise_of(seeds, 1031).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounded_latent_is_scored(dtype, device):
    v, x, noise = latents((4, 65536), 3, torch.float32, device)
    coef = coefficients(4, 0.05, device=device)
    x_next, eps, deviation_sq = sde_step_op(v, x, coef, noise, None, dtype)
    mean = 0.9 * x.double() - 0.1 * v.double()
    explained = (x_next.double() - mean) / 0.05
    # Rounding moved the latent by a good part of sigma, and eps follows it rather than the noise that was asked for.
    moved = (explained - noise.double()).square().mean().sqrt()
    assert moved > (1e-2 if dtype == torch.bfloat16 else 1e-3)
    # eps is not rounded in turn.
    assert (eps.double() - explained).abs().max() < 1e-5
    torch.testing.assert_close(deviation_sq, (0.05 * explained).square().mean(1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [*HALVES_AND_FLOAT, torch.float64])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_deterministic_step_never_reads_its_noise(dtype, zero, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    v, x, noise = latents((3, 1031), 3, dtype, device)
    coef = coefficients(3, dtype=accumulate, device=device)
    coef[1, 2] = zero
    clean = sde_step_op(v, x, coef, noise, None, None)
    noise[1] = float("nan")
    out = sde_step_op(v, x, coef, noise, None, None)
    assert same_step(out, clean)
    x_next, eps, deviation_sq = out
    expected = coef[1, 0].double() * x[1].double() + coef[1, 1].double() * v[1].double()
    torch.testing.assert_close(x_next[1].double(), expected, rtol=UNIT_ROUNDOFF[dtype] * 1.01, atol=1e-6)
    assert not eps[1].any() and not torch.signbit(eps[1]).any() and deviation_sq[1] == 0
    assert eps[0].any() and deviation_sq[0] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_is_seen_and_stays_alone(bad, device):
    v, x, noise = latents((3, 1031), 3, torch.bfloat16, device)
    coef = coefficients(3, device=device)
    clean = sde_step_op(v, x, coef, noise, None, None)
    v[1, 7] = bad
    out = sde_step_op(v, x, coef, noise, None, None)
    assert not out[2][1].isfinite() and not out[0][1, 7].isfinite()
    assert all(torch.equal(part[[0, 2]], other[[0, 2]]) for part, other in zip(out, clean, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Independence


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("shape", [(4, 33), (4, 3, 65, 61)])
def test_a_row_does_not_depend_on_its_batch(shape, drawn, device):
    v, x, noise = latents(shape, 3, torch.bfloat16, device)
    coef = coefficients(4, device=device) * torch.arange(1, 5, device=device)[:, None]
    seeds = torch.tensor([5, -6, 7, 2**62], device=device) if drawn else None
    noise = None if drawn else noise

    def step(rows):
        some_noise, some_seeds = (None if t is None else t[rows] for t in (noise, seeds))
        return sde_step_op(v[rows], x[rows], coef[rows], some_noise, some_seeds, None)

    together = step([0, 1, 2, 3])
    for rows in ([2], [3, 0], [1, 2, 1], [3, 2, 1, 0]):
        assert same_step(step(rows), [part[rows] for part in together])


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_threads_do_not_change_a_bit(drawn):
    v, x, noise = latents((3, 8, 64, 41), 3)
    arguments = (None, torch.arange(3)) if drawn else (noise, None)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(sde_step_op(v, x, coefficients(3), *arguments, None))
    finally:
        torch.set_num_threads(before)
    for out in results[1:]:
        assert same_step(out, results[0])


def test_repeats_do_not_change_a_bit(device):
    v, x = latents((8, 16, 64, 64), 2, torch.bfloat16, device)
    arguments = (v, x, coefficients(8, device=device), None, torch.arange(8, device=device), None)
    first = sde_step_op(*arguments)
    for _ in range(5):
        assert same_step(sde_step_op(*arguments), first)


# ---------------------------------------------------------------------------------------------------------------------
# The noise


def philox(counters, seed):
    """Philox4x32-10 words [n, 4] of counters [n], written from the paper (Salmon et al., SC 2011) in int64."""
    mask = 2**32 - 1
    words = [counters & mask, counters >> 32, torch.zeros_like(counters), torch.zeros_like(counters)]
    keys = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        # Products wrap around in int64, which leaves their 64 bits as they should be.
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        high_first, high_second = (first >> 32) & mask, (second >> 32) & mask
        words = [high_second ^ words[1] ^ keys[0], second & mask, high_first ^ words[3] ^ keys[1], first & mask]
        keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
    return torch.stack(words, 1)


def box_muller(words):
    uniform = (words[:, ::2].float() * 2.0**-32 + 2.0**-33).double()
    angle = 2 * math.pi * 2.0**-32 * words[:, 1::2].double()
    return ((-2 * uniform.log()).sqrt()[:, :, None] * torch.stack([angle.cos(), angle.sin()], 2)).flatten()


@pytest.mark.parametrize("elements", [1, 2, 3, 5, 4096 + 511, 65_536])
def test_a_seed_says_what_is_drawn(elements, device):
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x243F6A8885A308D3]
    drawn = noise_of(seeds, elements, device).cpu().double()
    for seed, row in zip(seeds, drawn, strict=True):
        truth = box_muller(philox(torch.arange(elements // 4 + 1), seed))[:elements]
        torch.testing.assert_close(row, truth, rtol=1e-6, atol=1e-8)


def test_long_rows_draw_beyond_the_first_chunks(device):
    elements = 2**23 + 3
    drawn = noise_of([11], elements, device)[0, -1027:].cpu().double()
    first = (elements - 1027) // 4
    truth = box_muller(philox(torch.arange(first, elements // 4 + 1), 11))
    torch.testing.assert_close(drawn, truth[elements - 1027 - 4 * first :][:1027], rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def sample():
    """Four million normals: 64 samples of a 512 px latent, from neighbouring seeds."""
    return noise_of(range(1000, 1064), 65_536).double()


def test_moments(sample):
    count = sample.numel()
    moments = [sample.pow(k).mean().item() for k in range(1, 7)]
    # Mean and variance of x^k under N(0, 1).
    for k, (moment, expected) in enumerate(zip(moments, (0, 1, 0, 3, 0, 15), strict=True), 1):
        variance = math.prod(range(1, 2 * k, 2)) - expected**2
        assert abs(moment - expected) <= 4 * math.sqrt(variance / count), k
    # Of every row, the worst of 64.
    assert (sample.mean(1).abs() <= 4.5 / 256).all()
    assert ((sample.square().mean(1) - 1).abs() <= 4.5 * math.sqrt(2) / 256).all()


def test_distribution(sample):
    ordered = sample.flatten().sort().values
    count = ordered.numel()
    normal = torch.special.ndtr(ordered)
    ranks = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((normal - ranks[:-1]).max(), (ranks[1:] - normal).max())
    # Kolmogorov-Smirnov: exceeded with probability 2 exp(-2 z^2) = 7e-4.
    assert distance <= 2.0 / math.sqrt(count)
    # The same of each of the four normals of a counter.
    for lane in range(4):
        normal = torch.special.ndtr(sample[:, lane::4].flatten().sort().values)
        assert (normal - ranks[2::4]).abs().max() <= 2.0 / math.sqrt(count / 4)


def test_tails(sample):
    for threshold in (2.0, 3.0, 4.0, 4.5):
        for tail in (sample > threshold, sample < -threshold):
            expected = sample.numel() * torch.special.ndtr(torch.tensor(-threshold, dtype=torch.float64)).item()
            assert abs(tail.sum().item() - expected) <= 4 * math.sqrt(expected), threshold
    largest = sample.abs().max().item()
    # Of four million, the largest lies between these with probability 0.999.
    assert 4.7 < largest < min(6.4, LARGEST_RADIUS)


def test_samples_are_independent(sample):
    rows, elements = sample.shape
    correlation = sample @ sample.T / elements
    squares = (sample.square() - 1) / math.sqrt(2)
    for gram in (correlation, squares @ squares.T / elements):
        assert (gram - torch.diag(gram.diag())).abs().max() <= 5 / math.sqrt(elements)
    for values in (sample, squares):
        for lag in (1, 2, 3, 4, 7, 8, 16, 64, 4096):
            assert (values[:, lag:] * values[:, :-lag]).mean().abs() <= 4 / math.sqrt(rows * elements), lag


def test_seeds_that_look_alike_share_nothing():
    seeds = [0, 1, 2, 2**31, 2**32, 2**32 + 1, -1, -2, 2**63 - 1, -(2**63)]
    drawn = noise_of(seeds, 16_384).double()
    gram = drawn @ drawn.T / 16_384
    assert (gram - torch.diag(gram.diag())).abs().max() <= 4.5 / 128
    assert torch.equal(noise_of([7, 7], 100)[0], noise_of([7], 100)[0])
    # A longer sample begins with the shorter one: an element's noise is its index's.
    assert torch.equal(noise_of([7], 5003)[:, :1001], noise_of([7], 1001))


# ---------------------------------------------------------------------------------------------------------------------
# As a PyTorch operator


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype, drawn, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 is served on CPU")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    v, x, noise = latents((2, 3, 5), 3, dtype, device)
    coef = coefficients(2, dtype=accumulate, device=device)
    source = (None, torch.tensor([1, 2], device=device)) if drawn else (noise, None)
    torch.library.opcheck(raw_op, (v, x, coef, *source))
    torch.library.opcheck(raw_op, (v.transpose(1, 2), x.transpose(1, 2), coef, None, torch.zeros(2).long().to(device)))
    torch.library.opcheck(raw_op, (v, x, coef, *source), {"dtype": torch.bfloat16})


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_compiles_without_graph_breaks(drawn, device):
    v, x, noise = latents((3, 5, 7), 3, torch.bfloat16, device)
    source = (None, torch.arange(3, device=device)) if drawn else (noise, None)
    arguments = (v, x, coefficients(3, device=device), *source, torch.float16)
    compiled = torch.compile(sde_step_op, fullgraph=True, backend="aot_eager")
    assert same_step(compiled(*arguments), sde_step_op(*arguments))


def test_fake_cuda_tensors_need_no_gpu():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 8, 6, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        coef, seeds = torch.empty(4, 3, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        x_next, eps, deviation_sq = sde_step_op(x, x, coef, None, seeds, torch.bfloat16)
    assert x_next.shape == eps.shape == (4, 6, 8) and deviation_sq.shape == (4,)
    assert (x_next.dtype, eps.dtype, deviation_sq.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert x_next.is_contiguous() and x_next.device.type == "cuda"


def test_no_gradient_flows_and_none_is_promised(device):
    v, x, noise = latents((2, 5), 3, device=device)
    v.requires_grad_()
    coef = coefficients(2, device=device)
    assert not any(part.requires_grad for part in sde_step_op(v, x, coef, noise, None, None))
    with pytest.raises(RuntimeError, match="sde_step is not implemented"):
        raw_op(v, x, coef, noise, None)[0].sum().backward()


def test_misuse_is_refused_in_a_sentence(device):
    v, x, noise = latents((2, 5), 3, device=device)
    coef, seeds = coefficients(2, device=device), torch.tensor([1, 2], device=device)
    for arguments, sentence in (
        ((v, x, coef, noise, seeds), r"Both of noise and seed given; accepted is exactly one of them"),
        ((v, x, coef, None, None), r"Neither of noise and seed given; accepted is exactly one of them"),
        ((v, x[:1], coef, noise, None), r"x has shape \[1, 5\]; accepted is the shape of v, \[2, 5\]"),
        ((v, x, coef, noise[:, :4], None), r"noise has shape \[2, 4\]; accepted is the shape of v, \[2, 5\]"),
        ((v, x.int(), coef, noise, None), r"x has dtype Int; accepted are float32, float16, bfloat16 and float64"),
        ((v[0, 0], x[0, 0], coef, noise[0, 0], None), r"v has no dimension; accepted is a batch of samples"),
        ((v, x, coef[:, :2], noise, None), r"coef has shape \[2, 2\]; accepted is \[2, 3\]"),
        ((v, x, coef.double(), noise, None), r"coef has dtype Double; accepted is the accumulate type .*, Float"),
        ((v, x, coef, None, seeds[:1]), r"seed has shape \[1\]; accepted is \[2\]"),
        ((v, x, coef, None, seeds.int()), r"seed has dtype Int; accepted is int64"),
        ((v, x, coef, noise, None, torch.int32), r"dtype is Int; accepted are float32, float16, bfloat16 and float64"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            raw_op(*arguments)


@pytest.mark.gpu
def test_misuse_of_devices():
    v, x, noise = latents((2, 5), 3, device="cuda")
    coef, seeds = coefficients(2, device="cuda"), torch.tensor([1, 2], device="cuda")
    for arguments, sentence in (
        ((v, x.cpu(), coef, noise, None), r"x is on cpu; accepted is the device of v, cuda:0"),
        ((v, x, coef.cpu(), noise, None), r"coef is on cpu; accepted is the device of v, cuda:0"),
        ((v, x, coef, None, seeds.cpu()), r"seed is on cpu; accepted is the device of v, cuda:0"),
        ((v.double(), x, coef.double(), noise, None), r"sde_step received float64 on CUDA; accepted there are float32"),
        ((v, x, coef.double(), noise, None, torch.float64), r"sde_step received float64 on CUDA"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            raw_op(*arguments)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0, 2)])
def test_nothing_to_do_launches_nothing(shape, device):
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    v = torch.empty(shape, device=device)
    x_next, eps, deviation_sq = sde_step_op(v, v, coefficients(shape[0], device=device), v, None, torch.bfloat16)
    assert x_next.shape == eps.shape == shape and (x_next.dtype, eps.dtype) == (torch.bfloat16, torch.float32)
    assert deviation_sq.shape == shape[:1] and not deviation_sq.any()
    assert module.launch_count() == 0


def test_a_step_is_one_native_launch(device):
    module = _native.module
    assert module is not None
    v, x = latents((2, 5), 2, device=device)
    module.reset_launch_count()
    sde_step_op(v, x, coefficients(2, device=device), None, torch.tensor([1, 2], device=device), None)
    assert module.launch_count() == 1


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU can show


@pytest.mark.gpu
def test_both_devices_draw_the_same_noise():
    torch.testing.assert_close(
        noise_of([3, -4], 65_537, "cuda").cpu(), noise_of([3, -4], 65_537, "cpu"), rtol=1e-6, atol=1e-7
    )


@pytest.mark.gpu
def test_never_waits_for_the_device():
    v, x = latents((4, 4096), 2, torch.bfloat16, "cuda")
    coef, seeds = coefficients(4, device="cuda"), torch.arange(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sde_step_op(v, x, coef, None, seeds, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_seeds():
    v, x = latents((4, 4096), 2, torch.bfloat16, "cuda")
    coef, seeds = coefficients(4, device="cuda"), torch.arange(4, device="cuda")
    sde_step_op(v, x, coef, None, seeds, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sde_step_op(v, x, coef, None, seeds, None)
    seeds += 100
    graph.replay()
    assert same_step(out, sde_step_op(v, x, coef, None, seeds, None))
