"""What only a GPU can show of the sampler step: streams, graph capture, repeatability, 64-bit offsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.kernel_harness import SdeStepKernels, StepInputs, StepOutputs

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("sde_kernels", ["cuda"], indirect=True)]


def random_inputs(batch: int, elements: int, drawn: bool, dtype: torch.dtype = torch.bfloat16) -> StepInputs:
    v, x, noise = (torch.randn(batch, elements, device="cuda").to(dtype) for _ in range(3))
    coef = torch.tensor([[0.9, -0.1, 0.3]], device="cuda").repeat(batch, 1)
    seeds = torch.randint(2**62, (batch,), device="cuda")
    inputs = StepInputs(v, x, coef, dtype=dtype)
    return replace(inputs, seeds=seeds) if drawn else replace(inputs, noise=noise)


def same_step(a: StepOutputs, b: StepOutputs) -> bool:
    return all(torch.equal(one.flatten(), other.flatten()) for one, other in zip(a, b, strict=True))


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_same_bits_every_time(sde_kernels: SdeStepKernels, drawn: bool) -> None:
    inputs = random_inputs(64, 65_536, drawn)
    first = sde_kernels.step(inputs)
    for _ in range(20):
        assert same_step(sde_kernels.step(inputs), first)


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_graph_replay_follows_new_inputs_and_seeds(sde_kernels: SdeStepKernels, drawn: bool) -> None:
    inputs = random_inputs(8, 65_536, drawn)
    workspace, outputs = sde_kernels.buffers(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert sde_kernels.try_step(inputs, workspace, outputs) == 0
    for _ in range(3):
        inputs.v.normal_(), inputs.x.normal_(), inputs.coef.uniform_(0.1, 1.0)
        if inputs.seeds is not None:
            inputs.seeds.random_()
        if inputs.noise is not None:
            inputs.noise.normal_()
        graph.replay()
        assert same_step(outputs, sde_kernels.step(inputs))


def test_work_is_ordered_on_the_stream_it_was_given(sde_kernels: SdeStepKernels) -> None:
    inputs = random_inputs(8, 65_536, drawn=True)
    expected = sde_kernels.step(inputs)
    late = replace(inputs, v=torch.zeros_like(inputs.v))
    workspace, outputs = sde_kernels.buffers(late)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that a launch on any other stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        late.v.copy_(inputs.v)
        assert sde_kernels.try_step(late, workspace, outputs) == 0
    stream.synchronize()
    assert same_step(outputs, expected)


def test_offsets_beyond_32_bits(sde_kernels: SdeStepKernels) -> None:
    batch, elements = 3, 2**30  # the last row begins at element 2^31
    needed = batch * elements * 12  # v, x_next, eps, and a third of each once more
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    v = torch.randn(batch, elements, device="cuda", dtype=torch.bfloat16)
    coef = torch.tensor([[0.9, -0.1, 0.3]], device="cuda").repeat(batch, 1)
    inputs = StepInputs(v, v, coef, seeds=torch.arange(batch, device="cuda"), dtype=torch.bfloat16)
    x_next, eps = torch.empty_like(v), torch.empty_like(v, dtype=torch.float32)
    workspace = torch.empty(sde_kernels.workspace_bytes(batch, elements), dtype=torch.uint8, device="cuda")
    outputs = StepOutputs(x_next, eps, torch.empty(batch, device="cuda", dtype=torch.float64))
    assert sde_kernels.try_step(inputs, workspace, outputs) == 0
    last = sde_kernels.step(inputs.rows(slice(2, 3)))
    assert same_step(StepOutputs(*(out[-1:] for out in outputs)), last)
