"""What only a GPU can show of the loss core: streams, graph capture, repeatability, 64-bit offsets."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_harness import STATS, Inputs, ResidualKernels, poisoned

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kernels", ["cuda"], indirect=True)]


def random_inputs(batch: int, elements: int, target_is_eps: bool = False) -> Inputs:
    v, target, noise, v_old, v_ref = torch.randn(5, batch, elements, device="cuda").bfloat16().unbind()
    if target_is_eps:
        return Inputs(v, target, None, v_old, v_ref, target_is_eps=True)
    return Inputs(v, target, noise, v_old, v_ref, mix=0.1)


@pytest.mark.parametrize("target_is_eps", [False, True], ids=["forward", "reverse"])
def test_same_bits_every_time(kernels: ResidualKernels, target_is_eps: bool) -> None:
    inputs, coef = random_inputs(64, 65_536, target_is_eps), torch.randn(64, 3, device="cuda")
    stats, grad = kernels.stats(inputs), kernels.grad(inputs, coef)
    for _ in range(20):
        assert torch.equal(kernels.stats(inputs), stats)
        assert torch.equal(kernels.grad(inputs, coef), grad)


def test_graph_replay_follows_new_inputs(kernels: ResidualKernels) -> None:
    batch, elements = 8, 65_536
    inputs, coef = random_inputs(batch, elements), torch.randn(batch, 3, device="cuda")
    workspace = poisoned(kernels.workspace_bytes(batch, elements) // 4, torch.float32, "cuda")
    stats = poisoned(batch * STATS, torch.float32, "cuda")
    grad = poisoned(batch * elements, torch.bfloat16, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert kernels.try_stats(inputs, workspace, stats) == 0
        assert kernels.try_grad(inputs, coef, grad) == 0
    for _ in range(3):
        inputs.map(lambda tensor: tensor.normal_())
        coef.normal_()
        graph.replay()
        assert torch.equal(stats.view(batch, STATS), kernels.stats(inputs))
        assert torch.equal(grad.view(batch, elements), kernels.grad(inputs, coef))


def test_work_is_ordered_on_the_stream_it_was_given(kernels: ResidualKernels) -> None:
    inputs, coef = random_inputs(8, 65_536), torch.randn(8, 3, device="cuda")
    expected = kernels.grad(inputs, coef)
    late = inputs.map(torch.zeros_like)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that a launch on any other stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        for name, tensor in inputs.tensors().items():
            getattr(late, name).copy_(tensor)
        grad = torch.empty_like(late.v)
        assert kernels.try_grad(late, coef, grad) == 0
    stream.synchronize()
    assert torch.equal(grad, expected)


def test_offsets_beyond_32_bits(kernels: ResidualKernels) -> None:
    batch, elements = 3, 2**30  # the last row begins at element 2^31
    needed = 4 * batch * elements * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    v = torch.randn(batch, elements, device="cuda", dtype=torch.bfloat16)
    inputs = Inputs(v=v, target=torch.randn_like(v))
    coef = torch.randn(batch, 3, device="cuda")
    last = inputs.map(lambda tensor: tensor[-1:])
    grad = torch.empty_like(v)
    assert kernels.try_grad(inputs, coef, grad) == 0
    assert torch.equal(grad[-1:], kernels.grad(last, coef[-1:].contiguous()))
    assert torch.equal(kernels.stats(inputs)[-1:], kernels.stats(last))
