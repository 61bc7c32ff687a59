"""A table outlives the mode it was made in, and is copied and pickled as what it is."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import advflow_ext as af
from advflow_ext.testing.transition_strategies import shifted
from tests.contract.published_steps import COLUMNS, same_rows

# ---------------------------------------------------------------------------------------------------------------------
# A table outlives the mode it was made in


def assert_is_plain(table):
    tensors = [table.sigmas, table._rows, *table._copies.values(), *(getattr(table, name) for name in COLUMNS)]
    for tensor in tensors:
        assert type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not tensor.is_inference()
    assert all(tensor.dtype == torch.float64 for tensor in [table.sigmas, table._rows])
    assert same_rows(table, af.StepTable(shifted(10)))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_defaults_and_modes_of_the_caller_do_not_reach_it(as_tensor):
    second, sigmas = float(shifted(10)[1]), shifted(10) if as_tensor else shifted(10).tolist()
    modes = [torch.device("meta"), torch.inference_mode(), torch.no_grad()]
    if not as_tensor:
        modes.append(FakeTensorMode())
    for mode in modes:
        with mode:
            table = af.StepTable(sigmas)
            steps = af.StepTable.from_steps(sigmas[:-1], sigmas[1:], sigma_1=second)
            pickled = pickle.loads(pickle.dumps(table)) if isinstance(mode, torch.device) else table
        assert_is_plain(table)
        assert_is_plain(pickled)
        assert same_rows(steps, table)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            assert_is_plain(af.StepTable(sigmas))
        finally:
            torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        assert_is_plain(af.StepTable(sigmas, stochastic_steps=range(10)))
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("sigmas", [torch.ones(3, device="meta"), FakeTensorMode().from_tensor(torch.ones(3))])
def test_sigmas_without_numbers_are_refused(sigmas):
    with pytest.raises(ValueError, match=r"^sigmas is .*accepted are \[T \+ 1\] numbers"):
        af.StepTable(sigmas)


def trains(table):
    """An eager training step finds what it needs, whatever used the table before."""
    assert_is_plain(table)
    v = torch.randn(4, 6, requires_grad=True)
    af.gaussian_kl_from_velocity(v, v.detach() + 0.1, table, torch.tensor([0, 1, 2, 3])).sum().backward()
    (v * table.kappa[:4, None]).sum().backward()
    assert torch.isfinite(v.grad).all() and v.grad.all()
    for column in table.rows(torch.tensor([1, 2])):
        assert type(column) is torch.Tensor and not column.is_inference()


def test_first_used_in_inference_mode():
    with torch.inference_mode():
        table = af.StepTable(shifted(10))
        table.rows(torch.tensor([0, 3]))
    trains(table)


def test_first_used_by_fake_tensors():
    table = af.StepTable(shifted(10))
    with FakeTensorMode() as mode:
        rows = table.rows(torch.tensor([0, 3]))
    assert all(isinstance(column, FakeTensor) and column.shape == (2,) for column in rows)
    outside = table.rows(mode.from_tensor(torch.tensor([0, 3])), torch.float64)
    assert outside.kappa.dtype == torch.float64 and isinstance(outside.kappa, FakeTensor)
    trains(table)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_first_used_by_make_fx(tracing_mode):
    table = af.StepTable(shifted(10))
    traced = make_fx(lambda index: table.columns(index), tracing_mode=tracing_mode)(torch.tensor([0, 3, 12]))
    trains(table)
    index = torch.tensor([2, -1, 9])
    torch.testing.assert_close(traced(index), table.columns(index), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strict", [False, True])
def test_first_used_by_export(strict):
    class Rows(torch.nn.Module):
        def forward(self, index):
            return table.columns(index)

    table = af.StepTable(shifted(10))
    exported = torch.export.export(Rows(), (torch.tensor([0, 3, 12]),), strict=strict)
    trains(table)
    index = torch.tensor([2, -1, 9])
    torch.testing.assert_close(exported.module()(index), table.columns(index), rtol=0, atol=0, equal_nan=True)


def test_first_used_by_compiled_code():
    table = af.StepTable(shifted(10))
    torch._dynamo.reset()
    compiled = torch.compile(table.columns, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        compiled(torch.tensor([0, 3]))
    assert torch.equal(compiled(torch.tensor([0, 3])), table.columns(torch.tensor([0, 3])))
    trains(table)


def test_a_copy_of_a_table_is_the_table():
    table = af.StepTable(shifted(10))
    table.rows(torch.tensor([1], device="meta"))  # a device that the reader may not have
    buffer = io.BytesIO()
    torch.save(table, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(table), pickle.loads(pickle.dumps(table)), torch.load(buffer, weights_only=False)
    for again in copies:
        trains(again)
        assert repr(again) == repr(table) and again.stochastic_steps == table.stochastic_steps


@pytest.mark.gpu
def test_a_copy_leaves_its_device_behind():
    table = af.StepTable(shifted(10))
    index = torch.tensor([0, 3], device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(table.columns, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(compiled(index).cpu(), table.columns(index.cpu()))
    with torch.inference_mode():
        table.rows(index)
    assert {where.type for where, _ in pickle.loads(pickle.dumps(table))._copies} == {"cpu"}
    assert not table._copies[index.device, torch.float32].is_inference()
