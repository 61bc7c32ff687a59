"""Batches cut out of a trainer's [B, T, ...], dense samples with their rows apart: read where they lie, not copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.doctor import every_op
from advflow_ext.testing.strategies import HALVES_AND_FLOAT
from tests.ops.every_op import same_bits

pytestmark = pytest.mark.skipif(_native.module is None, reason="nothing compiled")

raw = torch.ops.advflow


def step_of(tensor: Tensor) -> Tensor:
    """The same numbers as one step of [B, T, ...] whose other steps are NaN."""
    steps = tensor.new_full((tensor.shape[0], 3, *tensor.shape[1:]), float("nan"))
    steps[:, 1] = tensor
    return steps[:, 1]


def odd_rows(tensor: Tensor) -> Tensor:
    """Rows an odd number of elements apart, so that most begin off every vector's alignment."""
    padded = tensor.new_full((tensor.shape[0], tensor[0].numel() + 1 + tensor[0].numel() % 2), float("nan"))
    rows = padded[:, : tensor[0].numel()]
    rows.copy_(tensor.flatten(1))
    return rows.unflatten(1, tensor.shape[1:])


def shared(tensor: Tensor) -> Tensor:
    """One sample for the whole batch: one noise or reference for a group."""
    return tensor[:1].expand_as(tensor)


def channels_first(tensor: Tensor) -> Tensor:
    """Dense in another order than the shape's: what has to be copied still."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


READ_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"step": step_of, "odd rows": odd_rows, "shared": shared}
LAYOUTS = {**READ_IN_PLACE, "contiguous": lambda x: x, "copied": channels_first}

SHAPES = [(1, 3, 5), (3, 16), (3, 2, 24), (4, 3, 5, 7), (2, 4097), (3, 16, 32, 17)]


def calls(v: Tensor, target: Tensor, noise: Tensor, v_old: Tensor, v_ref: Tensor) -> list[Tensor]:
    """Every raw operator that reads latents; float64 where v is."""
    batch = len(v)
    accumulate = torch.float64 if v.dtype == torch.float64 else torch.float32
    coef = torch.linspace(-1, 1, 3 * batch, dtype=accumulate).view(batch, 3)
    step = coef.abs() + 0.1
    return [
        raw.residual_stats(v, target, noise, v_old, v_ref, 0.7),
        raw.residual_stats(v, target, None, None, None),
        raw.residual_grad(v, target, noise, v_old, v_ref, coef),
        raw.residual_grad(v, target, None, None, v_ref, coef),
        raw.transition_stats(v, target, v_old, v_ref),
        raw.transition_grad(v, target, v_old, None, coef, coef[:, 1]),
        *raw.sde_step(v, target, step, noise, None),
        *raw.sde_step(v, target, step, None, torch.arange(batch), torch.bfloat16),
        *raw.sde_step(v, target, step * torch.tensor([1, 1, 0]), noise, None),
    ]


@given(st.data(), st.sampled_from(SHAPES), st.integers(0, 2**31))
@settings(max_examples=150)
def test_where_the_rows_lie_does_not_change_a_bit(data, shape, seed):
    tensors: list[Tensor] = []
    for latent in torch.randn(5, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64):
        dtype = data.draw(st.sampled_from([*HALVES_AND_FLOAT, *([] if tensors else [torch.float64])]))
        tensors.append(LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](latent.to(dtype)))
    dense = [x.contiguous() for x in tensors]
    for ours, theirs in zip(calls(*tensors), calls(*dense), strict=True):
        assert ours.is_contiguous() and torch.equal(ours, theirs)


def test_rows_may_be_far_apart():
    """Farther than 32 bits count elements; nothing but the two rows is ever touched."""
    far = torch.empty(2**31 + 32, dtype=torch.bfloat16).as_strided((2, 16), (2**31 + 9, 1))
    far.copy_(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    dense = far.contiguous()
    for ours, theirs in zip(calls(*[far] * 5), calls(*[dense] * 5), strict=True):
        assert torch.equal(ours, theirs)


def inputs_of(name: str, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    given_ = every_op.Drawing((4, 3, 5, 8), dtype, "cpu").inputs(name)
    with torch.no_grad():
        arranged = {key: LAYOUTS[layout](given_[key].detach()) for key in every_op.LATENTS[name]}
    return given_ | {key: x.requires_grad_(given_[key].requires_grad) for key, x in arranged.items()}


def copies(call: Callable[[], Any], elements: int) -> list[str]:
    """The copies of at least one sample that PyTorch made, in C++ too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    names = ("aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy")

    def size(shapes: list[list[int]]) -> int:
        return max((torch.Size(shape).numel() for shape in shapes if shape), default=0)

    events = [event for event in profile.events() if event.name in names]
    return [f"{event.name} of {event.input_shapes}" for event in events if size(event.input_shapes) >= elements]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", READ_IN_PLACE)
@pytest.mark.parametrize("name", [name for name in every_op.NAMES if name != "from_means"])  # it is PyTorch in float64
def test_no_latent_is_copied(name, layout, dtype):
    inputs = inputs_of(name, layout, dtype)
    dense = every_op.mapped(inputs, lambda x: x.contiguous())
    assert same_bits(every_op.run(name, inputs), every_op.run(name, dense))
    assert copies(lambda: every_op.run(name, inputs), elements=3 * 5 * 8) == []


def test_what_has_gaps_inside_a_sample_is_copied_and_seen():
    # Of the test above: the copies it looks for do show.
    inputs = inputs_of("advantage_flow_loss", "copied", torch.float32)
    found = copies(lambda: every_op.run("advantage_flow_loss", inputs), elements=3 * 5 * 8)
    assert len([event for event in found if event.startswith("aten::clone")]) == 10  # five latents, there and back


@pytest.mark.parametrize("layout", READ_IN_PLACE)
def test_what_is_saved_for_backward_is_the_view(layout):
    inputs = inputs_of("advantage_flow_loss", layout, torch.float32)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        af.advantage_flow_loss(**inputs)
    assert {inputs[key].data_ptr() for key in every_op.LATENTS["advantage_flow_loss"]} <= set(saved)
