"""Recorded calls against the calls themselves. On a CPU a recording is the call again, into the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import advflow_ext as af
from advflow_ext.testing import relative_error
from tests.nn.kernel_checks import KERNEL_DEVICE

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from tests.nn.lora_models import inputs, with_adapters

ROLES = {"learner": "one", "rollout": "two", "reference": None}
# The library may choose another algorithm for a matrix product in a recording.
SAME = 1e-6


@pytest.fixture(autouse=True)
def recorded(recordings: list[Callable[[], None]]) -> list[Callable[[], None]]:
    return recordings


@pytest.fixture
def model() -> Any:
    return with_adapters("one", "two").to(KERNEL_DEVICE)


def graphs_of(model: nn.Module, **options: Any) -> af.CudaGraphs:
    def run(*tensors: Tensor) -> Tensor:
        velocity: Tensor = model(*tensors, return_dict=False)[0]
        return velocity

    return af.CudaGraphs(run, model, **options)


def batch(seed: int = 0) -> tuple[Tensor, ...]:
    """Like `inputs`, other numbers."""
    return tuple(tensor.to(KERNEL_DEVICE) + 0.1 * seed for tensor in inputs())


def gradients(parameters: list[nn.Parameter]) -> Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return relative_error(a, b) < SAME


def test_without_gradients_each_policy_is_replayed(model: Any, recorded: list[Any]) -> None:
    policies, graphs = af.PolicySet(model, ROLES, merged_bytes=2**30), graphs_of(model)
    for seed in range(3):
        found = {}
        for role in ROLES:
            with torch.no_grad(), policies.use(role):
                expected = model(*batch(seed), return_dict=False)[0]
                found[role] = graphs(role, *batch(seed))
            assert same(found[role], expected) and not found[role].requires_grad
        assert not same(found["learner"], found["rollout"]) and not same(found["rollout"], found["reference"])
    assert len(recorded) == 3


def test_gradients_add_up_as_without(model: Any, recorded: list[Any]) -> None:
    policies, graphs = af.PolicySet(model, ROLES), graphs_of(model)
    parameters = policies.parameters("learner")
    for seed in range(3):
        model(*batch(seed), return_dict=False)[0].square().sum().backward()
    expected = gradients(parameters)
    for seed in range(3):
        velocity = graphs("learner", *batch(seed))
        assert velocity.requires_grad
        velocity.square().sum().backward()
    assert same(gradients(parameters), expected)
    assert len(recorded) == 2
    assert all(parameter.grad is None for parameter in policies.parameters("rollout"))


def test_a_gradient_is_not_written_over_by_the_next(model: Any) -> None:
    policies, graphs = af.PolicySet(model, ROLES), graphs_of(model)
    parameters = policies.parameters("learner")
    graphs("learner", *batch()).sum().backward()
    first = [parameter.grad for parameter in parameters]
    kept = torch.cat([gradient.flatten() for gradient in first if gradient is not None]).clone()
    for parameter in parameters:
        parameter.grad = None
    graphs("learner", *batch(1)).square().sum().backward()
    assert torch.equal(torch.cat([gradient.flatten() for gradient in first if gradient is not None]), kept)


def test_a_result_is_not_written_over_by_the_next(model: Any) -> None:
    graphs = graphs_of(model)
    with torch.no_grad():
        first = graphs("base", *batch())
        kept = first.clone()
        assert not same(graphs("base", *batch(1)), kept)
        assert torch.equal(first, kept)


def test_steps_and_followers_are_seen(model: Any, recorded: list[Any]) -> None:
    policies, graphs = af.PolicySet(model, ROLES, merged_bytes=2**30), graphs_of(model)
    optimizer = torch.optim.AdamW(policies.parameters("learner"), lr=0.1)
    for seed in range(3):
        with torch.no_grad(), policies.use("rollout"):
            assert policies.merged
            assert same(graphs("rollout", *batch(seed)), model(*batch(seed), return_dict=False)[0])
        policies.activate("learner", merged=False)
        velocity = graphs("learner", *batch(seed))
        assert same(velocity.detach(), model(*batch(seed), return_dict=False)[0].detach())
        velocity.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        policies.follow("learner", "rollout", 0.5)
    assert len(recorded) == 3


def test_other_shapes_and_modes_are_recorded_on_their_own(model: Any, recorded: list[Any]) -> None:
    graphs = graphs_of(model)
    small = tuple(tensor[:1] for tensor in batch())
    with torch.no_grad():
        for _ in range(2):
            assert same(graphs("base", *batch()), model(*batch(), return_dict=False)[0])
            assert same(graphs("base", *small), model(*small, return_dict=False)[0])
        assert len(recorded) == 2
        with torch.autocast(KERNEL_DEVICE, dtype=torch.bfloat16):
            expected = model(*batch(), return_dict=False)[0]
            assert relative_error(graphs("base", *batch()), expected) < 1e-2
        assert len(recorded) == 3
        model.train(not model.training)
        graphs("base", *batch())
        assert len(recorded) == 4


def test_other_weights_are_recorded_anew(model: Any, recorded: list[Any]) -> None:
    graphs = graphs_of(model)
    with torch.no_grad():
        graphs("base", *batch())
        model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
        assert same(graphs("base", *batch()), model(*batch(), return_dict=False)[0])
        assert len(recorded) == 2
        graphs.forget()
        graphs("base", *batch())
        assert len(recorded) == 3


def test_the_least_recently_used_recording_goes_first(model: Any, recorded: list[Any]) -> None:
    graphs = graphs_of(model, most=2)
    with torch.no_grad():
        for policy in ("a", "b", "a", "c", "a"):
            graphs(policy, *batch())
        assert len(recorded) == 3
        graphs("b", *batch())
        assert len(recorded) == 4


def test_where_nothing_is_trained_there_is_no_gradient(model: Any, recorded: list[Any]) -> None:
    model.requires_grad_(False)
    assert not graphs_of(model)("base", *batch()).requires_grad
    assert len(recorded) == 1


def test_a_backward_pass_that_comes_too_late_is_refused(model: Any) -> None:
    graphs = graphs_of(model)
    first, second = graphs("learner", *batch()), graphs("learner", *batch(1))
    with pytest.raises(RuntimeError, match="accepted is one backward pass, before the next forward pass"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="accepted is one backward pass, before the next forward pass"):
        second.sum().backward()


def test_what_cannot_be_recorded_is_refused(model: Any, recorded: list[Any]) -> None:
    graphs = graphs_of(model)
    x, *rest = batch()
    with pytest.raises(ValueError, match=r"tensor 0 requires a gradient; accepted are tensors that do not\."):
        graphs("learner", x.clone().requires_grad_(), *rest)
    with (
        af.nn.ModulationCache(model),
        pytest.raises(RuntimeError, match=r"a ModulationCache is on; accepted is a recording outside its with block\."),
    ):
        graphs("learner", x, *rest)
    model.register_buffer("sharded", TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(RuntimeError, match=r"the model has a TwoTensor parameter; accepted are plain ones\."):
        graphs("learner", x, *rest)
    assert recorded == []


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "two"])
def test_a_number_of_recordings_that_is_none_is_refused(model: Any, most: Any) -> None:
    with pytest.raises(ValueError, match=r"most is .*; accepted is a positive integer\."):
        graphs_of(model, most=most)


def test_on_a_cpu_the_call_itself_is_made(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model, arguments = model.cpu(), tuple(tensor.cpu() for tensor in batch())
    assert torch.equal(graphs_of(model)("base", *arguments), model(*arguments, return_dict=False)[0])


@pytest.mark.skipif(KERNEL_DEVICE != "cuda", reason="needs a CUDA device")
def test_a_replayed_dropout_draws_anew() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout()).cuda()
    graphs = af.CudaGraphs(model, model)
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        assert not torch.equal(graphs("a", x), graphs("a", x))


@pytest.mark.skipif(KERNEL_DEVICE != "cuda", reason="needs a CUDA device")
def test_a_call_that_waits_for_the_device_is_refused_in_a_sentence() -> None:
    model = nn.Linear(4, 4).cuda()
    graphs = af.CudaGraphs(lambda x: model(x) * x.sum().item(), model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="the call cannot be recorded as a CUDA graph"):
        graphs("a", torch.ones(2, 4, device="cuda"))


def test_recorded_blocks_are_the_fused_ones(model: Any) -> None:
    policies = af.PolicySet(model, ROLES)
    af.apply_to_sd3(model)
    graphs = graphs_of(model)
    parameters = policies.parameters("learner")
    for seed in range(2):
        velocity = graphs("learner", *batch(seed))
        velocity.square().sum().backward()
        found = gradients(parameters)
        expected = model(*batch(seed), return_dict=False)[0]
        expected.square().sum().backward()
        assert same(velocity.detach(), expected.detach()) and same(found, gradients(parameters))
