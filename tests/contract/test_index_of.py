"""The steps of timesteps: found as schedulers hold them, in every mode, without a word from the device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import advflow_ext as af
from advflow_ext.testing.transition_strategies import shifted
from tests.ops.every_op import no_waiting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_timestep_is_the_step_that_begins_there(dtype, device):
    """As schedulers hold them, and as DanceGRPO cuts them off."""
    table = af.StepTable(shifted(10))
    timesteps = (table.s * 1000).to(device, dtype)
    assert table.index_of(timesteps).tolist() == list(range(10))
    shuffled = timesteps[[3, 9, 0, 3]].view(4, 1)
    found = table.index_of(shuffled)
    assert found.shape == (4, 1) and found.dtype == torch.int64 and found.device == shuffled.device
    assert found.flatten().tolist() == [3, 9, 0, 3] and table.index_of(timesteps[4]).item() == 4


def test_sigmas_are_timesteps_of_scale_1():
    table = af.StepTable(shifted(10))
    assert table.index_of(table.sigmas[:-1].float(), scale=1.0).tolist() == list(range(10))


def test_a_timestep_that_no_step_begins_at_is_none():
    table = af.StepTable([1.0, 0.5, 0.0005, 0.0])
    assert table.index_of(torch.tensor([1000.0, 502.0, 0.0, float("nan"), 0.6, -300.0])).tolist() == [
        0,
        -1,
        2,
        -1,
        2,
        -1,
    ]
    v, x, _ = torch.randn(3, 2, 5).unbind()
    with pytest.raises(ValueError, match=r"index\[1\] is -1, outside the table of 3 steps"):
        af.sde_step(v, x, table, table.index_of(torch.tensor([500.0, 700.0])))


def test_timesteps_are_found_in_a_compiled_graph():
    table = af.StepTable(shifted(10))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: table.index_of(t), fullgraph=True, backend="eager")
    assert compiled((table.s * 1000).float()).tolist() == list(range(10))


def test_index_of_says_what_is_wrong():
    table = af.StepTable(shifted(4))
    for call, sentence in (
        (lambda: table.index_of([1.0]), r"timesteps is a list; accepted is a tensor of real numbers"),
        (lambda: table.index_of(torch.tensor([True])), r"timesteps is torch.bool; accepted"),
        (lambda: table.index_of(table.s, scale=0.0), r"scale is 0.0; accepted is a finite number above 0"),
        (
            lambda: af.StepTable.from_steps([0.9, 0.9], [0.8, 0.7]).index_of(torch.tensor([900.0])),
            r"several steps that begin at one s",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_timesteps_are_found_in_any_graph(mode):
    table = af.StepTable(shifted(10))
    timesteps = (table.s[[3, 9, 0, 3]] * 1000).float().view(2, 2)
    traced = make_fx(lambda t: table.index_of(t), tracing_mode=mode)(timesteps)
    assert traced(timesteps).tolist() == [[3, 9], [0, 3]]


def test_timesteps_without_values_have_a_shape():
    table = af.StepTable(shifted(10))
    with FakeTensorMode() as mode:
        found = table.index_of(mode.from_tensor(torch.rand(3, 2)))
    assert found.shape == (3, 2) and found.dtype == torch.int64


def test_timesteps_of_inference_mode_are_found_outside_it():
    table = af.StepTable(shifted(10))
    with torch.inference_mode():
        timesteps = table.s * 1000
    assert table.index_of(timesteps).tolist() == list(range(10))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    table = af.StepTable(shifted(10))
    timesteps = (table.s * 1000).float().cuda()
    v, x = torch.randn(2, 10, 8, device="cuda")
    af.sde_step(v, x, table, table.index_of(timesteps))  # the device gets its copies on first use
    with no_waiting("cuda"):
        steps = table.index_of(timesteps)
        out = af.sde_step(v, x, table, steps)
    assert steps.tolist() == list(range(10)) and out.x_next.isfinite().all()
