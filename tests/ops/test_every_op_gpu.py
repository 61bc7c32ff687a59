"""What every op promises of a GPU. The same bodies run on the CPU, where a graph is a second call and a stream nothing,
so that they are known to work before a GPU sees them."""

from __future__ import annotations

import contextlib

import pytest
import torch

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.doctor.every_op import FORWARD, LATENTS, NAMES, REVERSE, Drawing, mapped, run
from advflow_ext.doctor.every_op import truth as exact
from advflow_ext.testing import UNIT_ROUNDOFF, assert_rounded_once
from advflow_ext.testing.layouts import LAYOUTS
from tests.ops.every_op import no_waiting, overwrite, recorded, same_bits

pytestmark = pytest.mark.skipif(not _native.serves(torch.empty(1)), reason="without kernels there is nothing to see")

every_op = pytest.mark.parametrize("name", NAMES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# One element, odd sizes, ranks 2 to 5, and the neighbours of the vector, tile and chunk lengths.
SMALL = [(3, 1), (2, 33), (3, 5, 7), (2, 3, 5, 7), (2, 2, 3, 5, 3), (2, 4097), (1, 12291)]


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_inputs_match_the_truth(name, dtype, device):
    """Every rank, odd sizes, strided and misaligned inputs; small enough for compute-sanitizer."""
    first = NAMES.index(name) + DTYPES.index(dtype)  # over all ops every shape meets every layout
    for place, shape in enumerate(SMALL):
        layout = LAYOUTS[(first + place) % len(LAYOUTS)]
        inputs = Drawing(shape, dtype, device, layout, seed=place).inputs(name)
        assert_matches(name, run(name, inputs), exact(name, inputs), dtype)


def assert_matches(name, outputs, truth, dtype):
    for key, output in outputs.items():
        expected = truth[key].to(output.device)
        if key.startswith("grad"):
            assert_rounded_once(output, expected, 1e-5)
        elif name == "sde_step" and dtype != torch.float32:
            # eps and its density are those of the rounded next x, which test_sde_step_op.py takes apart.
            rounding = 4 * UNIT_ROUNDOFF[dtype]
            if key == "x_next":
                torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=rounding)
        else:
            size = expected.abs().mean().item()
            torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=1e-6 + 1e-5 * size)


@every_op
def test_nothing_waits_for_the_device(name, device):
    inputs = Drawing((4, 16, 33), torch.bfloat16, device).inputs(name)
    expected = run(name, inputs)  # and a table's copy on the device is made
    with no_waiting(device):
        outputs = run(name, inputs)
    assert same_bits(outputs, expected)


@pytest.mark.parametrize("norm", ["batch_rms", "group_std", "raw_global_std"])
def test_advantages_do_not_wait_for_the_device(norm, device):
    rewards = torch.rand(24, device=device)
    with no_waiting(device):
        advantages = af.group_advantages(rewards, 8, norm=norm)
    with no_waiting(device):
        af.softmax_advantages(rewards, 8)
    torch.testing.assert_close(advantages.cpu(), af.group_advantages(rewards.cpu(), 8, norm=norm))


def test_capability_does_not_wait_for_the_device(device):
    scores, rewards = torch.rand(10, device=device), torch.rand(24, device=device)
    trackers = [af.CapabilityTracker(), af.CapabilityTracker()]
    with no_waiting(device):
        for _ in range(2):
            trackers[0].observe(scores)
        kept = trackers[0].pick(scores, 3)
        out = af.cross_level_advantages(rewards, 8, mean=trackers[0].mean, variance=trackers[0].variance)
    for _ in range(2):
        trackers[1].observe(scores.cpu())
    assert torch.equal(kept.cpu(), trackers[1].pick(scores.cpu(), 3))
    known = af.cross_level_advantages(rewards.cpu(), 8, mean=trackers[1].mean, variance=trackers[1].variance)
    for ours, theirs in zip(out, known, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs)


@every_op
def test_work_is_ordered_on_the_current_stream(name, device):
    late = Drawing((8, 65_536), torch.bfloat16, device, seed=1).inputs(name)
    inputs = Drawing((8, 65_536), torch.bfloat16, device, seed=2).inputs(name)
    expected, too_early = run(name, late), run(name, inputs)
    assert not same_bits(expected, too_early)
    stream = contextlib.nullcontext()
    if device == "cuda":
        torch.cuda.synchronize()
        stream = torch.cuda.stream(torch.cuda.Stream())
    with stream:
        if device == "cuda":
            # Long enough that a launch on any other stream would read what was there before.
            torch.cuda._sleep(50_000_000)
        overwrite(inputs, late)
        outputs = run(name, inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    assert same_bits(outputs, expected)


@every_op
def test_a_graph_follows_new_inputs_and_hyper_parameters(name, device):
    """Latents, times, steps, advantages, gamma and standard deviations: whatever is a tensor may change."""
    inputs = Drawing((8, 4099), torch.bfloat16, device).inputs(name)
    outputs, replay = recorded(lambda: run(name, inputs), device)
    seen = []
    for seed in (1, 2, 3):
        overwrite(inputs, Drawing((8, 4099), torch.bfloat16, device, seed=seed).inputs(name))
        replay()
        expected = run(name, inputs)
        assert same_bits(outputs, expected)
        assert not any(same_bits(expected, before) for before in seen)
        seen.append(expected)


@every_op
def test_autocast_changes_nothing(name, device):
    inputs = Drawing((3, 5, 7), torch.float32, device).inputs(name)
    expected = run(name, inputs)
    with torch.autocast(device, torch.bfloat16):
        outputs = run(name, inputs)
    assert same_bits(outputs, expected)
    assert all(outputs[key].dtype == expected[key].dtype for key in outputs)


@every_op
def test_repeats_and_batches_do_not_change_a_bit(name, device):
    inputs = Drawing((9, 65_537), torch.bfloat16, device).inputs(name)
    expected = run(name, inputs)
    for _ in range(5):
        assert same_bits(run(name, inputs), expected)
    rows = torch.tensor([7, 2, 4], device=device)
    some = run(name, mapped(inputs, lambda tensor: tensor[rows].clone()))
    assert same_bits(of_rows(some, slice(None)), of_rows(expected, rows))


def of_rows(outputs, rows):
    """Metrics are of a batch and have no rows."""
    return {key: output[rows] for key, output in outputs.items() if key != "metrics"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*FORWARD, *REVERSE)])
def test_compiles_with_inductor(name, device):
    """Of the losses other tests say the same."""
    inputs = Drawing((4, 33), torch.float32, device).inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(af, name), fullgraph=True)
    outputs, expected = run(name, inputs, op=compiled), run(name, inputs)
    for key in expected:
        torch.testing.assert_close(outputs[key], expected[key])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "from_means"])  # PyTorch, 8 bytes an element
def test_offsets_beyond_32_bits(name, device):
    """On a GPU the last row begins at element 2^31."""
    elements = 2**30 if device == "cuda" else 4099
    needed = 2 * 3 * elements * (len(LATENTS[name]) + 3)  # inputs, and outputs or gradients of their size
    if device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    inputs = Drawing((3, elements), torch.bfloat16, device).inputs(name)
    last = mapped(inputs, lambda tensor: tensor[-1:].clone())
    outputs = of_rows(run(name, inputs), slice(-1, None))
    assert same_bits(outputs, of_rows(run(name, last), slice(None)))
    del inputs, last, outputs
    if device == "cuda":
        torch.cuda.empty_cache()  # other processes share the device


@pytest.mark.gpu
@every_op
def test_a_second_device_is_served_while_another_is_current(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = Drawing((3, 4099), torch.bfloat16, "cuda:0").inputs(name)
    expected = run(name, inputs)
    moved = mapped(inputs, lambda tensor: tensor.to("cuda:1"))
    with torch.cuda.device(0):
        outputs = run(name, moved)
    assert all(output.device == torch.device("cuda:1") for output in outputs.values())
    torch.cuda.synchronize(1)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert same_bits(outputs, expected)
    assert_matches(name, outputs, exact(name, inputs), torch.bfloat16)
