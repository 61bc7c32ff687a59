"""The account of bytes on modules small enough to count by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.roofline.account import GRADIENT_SUMS, Account, Event, Origin, tensor_bytes, trace


def innermost(origin: Origin) -> str:
    return origin.forward_site or (origin.modules[-1][0] if origin.modules else "outside")


def account(step: Callable[[], Tensor], model: nn.Module | None = None, *, backward: bool = False) -> Account:
    return trace(step, model or nn.Module(), innermost, backward=backward)


def events(step: Callable[[], Tensor], model: nn.Module | None = None) -> list[Event]:
    return account(step, model).events


def the_event(step: Callable[[], Tensor]) -> Event:
    (event,) = events(step)
    return event


X = torch.randn(4, 6)
SIZE = X.nbytes


def test_an_add_reads_both_and_writes_one() -> None:
    y = torch.randn(4, 6)
    event = the_event(lambda: X + y)
    assert (event.launches, event.read, event.written, event.flops) == (1, 2 * SIZE, SIZE, 0)
    assert (event.op, event.kind, event.phase) == ("aten.add.Tensor", "elementwise", "forward")


def test_what_is_read_twice_by_one_kernel_counts_once() -> None:
    assert the_event(lambda: X * X).read == SIZE
    assert the_event(lambda: X * X.view(4, 6)).read == SIZE
    assert the_event(lambda: X[:2] * X[2:]).read == SIZE


def test_a_broadcast_operand_is_read_once() -> None:
    row = torch.randn(1, 6)
    assert the_event(lambda: X * row).read == SIZE + row.nbytes
    assert the_event(lambda: X * row.expand(4, 6)).read == SIZE + row.nbytes


def test_views_are_free_and_a_copy_of_one_costs_its_elements() -> None:
    assert events(lambda: X.view(2, 2, 6).transpose(0, 1).unsqueeze(0)[..., :3].detach()) == []
    event = the_event(lambda: X.t()[:3].contiguous())
    assert (event.launches, event.read, event.written) == (1, SIZE // 2, SIZE // 2)


def test_allocations_are_free_and_filling_reads_nothing() -> None:
    assert events(lambda: torch.empty_like(X)) == []
    for step in (lambda: torch.zeros_like(X), lambda: X.new_ones(4, 6), lambda: torch.empty(4, 6).zero_()):
        event = the_event(step)
        assert (event.launches, event.read, event.written) == (1, 0, SIZE)


def test_in_place_reads_what_it_changes_unless_it_overwrites() -> None:
    y = torch.randn(4, 6)
    changed, copied = the_event(lambda: y.mul_(2)), the_event(lambda: y.copy_(X))
    assert (changed.read, changed.written) == (SIZE, SIZE)
    assert (copied.read, copied.written) == (SIZE, SIZE)


def test_a_cast_reads_one_dtype_and_writes_the_other() -> None:
    event = the_event(lambda: X.bfloat16())
    assert (event.read, event.written) == (SIZE, SIZE // 2)


def test_a_norm_of_a_strided_view_pays_for_its_copy() -> None:
    heads = torch.randn(2, 3, 4, 8).transpose(1, 2)
    size, statistics = heads.nbytes, 2 * 2 * 3 * 4 * 4
    strided = the_event(lambda: nn.functional.layer_norm(heads, (8,)))
    assert (strided.launches, strided.read, strided.written) == (2, 2 * size, 2 * size + statistics)
    dense = torch.randn(2, 4, 3, 8)
    plain = the_event(lambda: nn.functional.layer_norm(dense, (8,)))
    assert (plain.launches, plain.read, plain.written) == (1, size, size + statistics)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_with_and_without_weight_gradients(frozen: bool) -> None:
    linear = nn.Sequential(nn.Linear(6, 5)).requires_grad_(not frozen)
    x = torch.randn(4, 6, requires_grad=True)
    traced = account(lambda: linear(x).sum(), linear, backward=True)
    gemms = [event for event in traced.events if event.kind == "gemm"]
    weight, bias, out = 4 * 30, 4 * 5, 4 * 20
    assert (gemms[0].read, gemms[0].written, gemms[0].flops) == (SIZE + weight + bias, out, 2 * 4 * 6 * 5)
    # Backward: the gradient, of a sum and so one number, times the weight; with a trainable weight, times x as well.
    assert [(event.phase, event.read, event.written) for event in gemms[1:]] == [
        ("backward", 4 + weight, SIZE),
        *([] if frozen else [("backward", 4 + SIZE, weight)]),
    ]
    assert {event.site for event in gemms} == {"0"}
    # The weight itself does not count, and without its gradient nobody needs x.
    assert traced.saved == ({} if frozen else {"0": SIZE})


def test_the_gradient_of_a_slice_is_zeros_and_a_copy() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    traced = account(lambda: x[:, :3].sum(), backward=True)
    (event,) = [event for event in traced.events if "slice_backward" in event.op]
    assert (event.launches, event.read, event.written) == (2, 4, SIZE + 4)


def test_a_storage_saved_twice_counts_once_and_at_the_first() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Exp(), Sin()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    class Sin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().cos()

    model, x = Model(), torch.randn(4, 6, requires_grad=True)
    traced = account(lambda: model(x).sum(), model, backward=True)
    # exp saves its result, which sin saves as its input; cos saves the result of sin.
    assert traced.saved == {"first": SIZE, "second": SIZE}
    backward = [(event.op, event.site) for event in traced.events if event.phase == "backward"]
    assert {site for op, site in backward if "ones_like" not in op} == {"first", "second"}
    assert backward[-1][1] == "first"


def test_a_saved_view_holds_its_whole_storage() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    assert account(lambda: (2 * x)[:, :1].sin().sum()).saved == {"outside": SIZE}


def test_what_no_backward_pass_needs_any_more_is_not_held() -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def step() -> Tensor:
        (2 * x).sin()
        return (3 * x).sum()

    assert account(step).saved == {}
    with torch.no_grad():
        assert account(lambda: (2 * x).sin().sum()).saved == {}


def test_parameters_and_buffers_do_not_count_as_saved() -> None:
    model = nn.Linear(6, 5)
    model.register_buffer("mask", torch.ones(4, 5))
    y, mask = torch.randn(4, 6, requires_grad=True), model.get_buffer("mask")
    assert account(lambda: (nn.functional.linear(y, model.weight.detach()) * mask).sum(), model).saved == {}


def test_gradients_of_what_is_used_twice_are_summed_by_nobody_in_particular() -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def step() -> Tensor:
        y = x.exp()
        return (y.sin() + y.cos()).sum()

    sums = [event for event in account(step, backward=True).events if event.site == GRADIENT_SUMS]
    assert [(event.op, event.phase, event.read, event.written) for event in sums] == [
        ("aten.add.Tensor", "backward", 2 * SIZE, SIZE)
    ]


def test_an_operator_of_a_python_backward_belongs_to_its_forward() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad + grad

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Doubled.apply(x)
            return out

    model, x = nn.Sequential(Model()), torch.randn(4, 6, requires_grad=True)
    traced = account(lambda: model(x).sum(), model, backward=True)
    assert [event.site for event in traced.events if event.op == "aten.add.Tensor"] == ["0"]


def test_what_a_node_without_operators_saves_is_somewhere() -> None:
    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad

    x = torch.randn(4, 6, requires_grad=True)
    assert sum(account(lambda: Kept.apply(2 * x).sum(), backward=True).saved.values()) == SIZE


def test_an_error_in_the_step_leaves_no_hooks_behind() -> None:
    def step() -> Tensor:
        raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        account(step)
    assert not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks


@given(st.data())
def test_bytes_of_a_view_are_those_of_its_distinct_elements(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    view = torch.arange(math.prod(shape)).view(shape)
    for dim, size in enumerate(shape):
        step = data.draw(st.integers(1, size))
        view = view[(slice(None),) * dim + (slice(data.draw(st.integers(0, size)), None, step),)]
    view = view.permute(data.draw(st.permutations(range(view.dim()))))
    view = view.expand(data.draw(st.integers(1, 3)), *view.shape)
    assert tensor_bytes(view) == 8 * view.unique().numel()


def test_fake_tensors_give_the_account_of_real_ones() -> None:
    def run() -> Account:
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
        x = torch.randn(5, 4, 6)
        return account(lambda: (model(x)[:, :2].float() ** 2).mean(), model, backward=True)

    real = run()
    with FakeTensorMode():
        fake = run()
    assert real.events == fake.events and real.saved == fake.saved
    assert sum(real.saved.values()) > 0 and {event.phase for event in real.events} == {"forward", "backward"}
