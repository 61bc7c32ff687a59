"""The gradient of a reverse-process loss: where it flows, what it keeps, and the same under autocast and compile."""

from __future__ import annotations

import pytest
import torch

from advflow_ext import _native
from advflow_ext.testing import assert_close_to_truth
from tests.ops.transitions import (
    BOTH,
    FULL,
    LOSSES,
    VARIANTS,
    draw_transitions,
    native,
    reference,
    truth,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize(("name", "options"), FULL)
def test_gradcheck(name, options):
    batch = draw_transitions(4, (3, 2), torch.float64, drift=0.3, **options)
    assert torch.autograd.gradcheck(
        lambda v: native(name)(v, *batch.arguments()[1:], **batch.options).loss, (batch.v,), nondet_tol=0.0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_flows_to_v_only(name, device):
    batch = draw_transitions(device=device)
    leaves = [batch.v_old, batch.eps, batch.advantages, batch.options["v_ref"]]
    for leaf in leaves:
        leaf.requires_grad_()
    for resolve in BOTH.values():
        resolve(name)(*batch.arguments(), **batch.options).loss.backward()
        assert all(leaf.grad is None for leaf in leaves) and batch.v.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_without_grad_nothing_is_recorded(name, device):
    batch = draw_transitions(device=device)
    with torch.no_grad():
        assert not native(name)(*batch.arguments(), **batch.options).loss.requires_grad
    out = native(name)(batch.v.detach(), *batch.arguments()[1:], **batch.options)
    assert not out.loss.requires_grad and not out.metrics.values.requires_grad


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_only_inputs_and_per_transition_numbers_are_saved(name, options, device):
    batch = draw_transitions(4, (16, 8, 8), device=device, **options)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        native(name)(*batch.arguments(), **batch.options)
    inputs = {x.data_ptr() for x in (batch.v, batch.v_old, batch.eps, batch.options["v_ref"])}
    assert {x.data_ptr() for x in saved} >= inputs
    assert all(x.numel() <= 4 * 3 for x in saved if x.data_ptr() not in inputs)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_forward_is_two_native_launches_and_backward_one(name, options, batch_size, device):
    batch = draw_transitions(batch_size, device=device, **options)
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    out = native(name)(*batch.arguments(), **batch.options)
    assert module.launch_count() == 2
    out.loss.backward()
    assert module.launch_count() == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_is_refused(name, device):
    batch = draw_transitions(device=device)
    out = native(name)(*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss, batch.v, create_graph=True)
    with pytest.raises(RuntimeError, match="transition_grad is not implemented"):
        torch.autograd.grad(grad.sum(), batch.v)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_may_be_changed_in_place(name, reduction, device):
    batch = draw_transitions(device=device, reduction=reduction)
    loss = native(name)(*batch.arguments(), **batch.options).loss
    (whole,) = torch.autograd.grad(loss.sum(), batch.v)
    loss = native(name)(*batch.arguments(), **batch.options).loss
    loss /= 4
    (quarter,) = torch.autograd.grad(loss.sum(), batch.v)
    assert torch.equal(quarter, whole / 4)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_scale_reaches_the_gradient_before_its_rounding(name, device):
    batch = draw_transitions(8, (16, 64, 64), torch.float16, device, with_reference=False)
    with torch.no_grad():
        batch.v.copy_(batch.v_old)  # on-policy: nothing is clipped
    batch.advantages.fill_(1e-3)
    scale = 2.0**16
    out = native(name)(*batch.arguments())
    (grad,) = torch.autograd.grad(out.loss * scale, batch.v)
    _, expected = truth(name, batch)
    assert_close_to_truth(grad, expected * scale, 3e-3)  # of subnormals, some
    # Rounded first and scaled later, most of it would be lost.
    assert (expected.half() == 0).double().mean() > 0.5 and (grad != 0).double().mean() > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name, device):
    batch = draw_transitions(dtype=torch.bfloat16, device=device)
    out, grad = value_and_grad(batch, native(name))
    with torch.autocast(device, torch.bfloat16):
        inside, inside_grad = value_and_grad(batch, native(name))
    assert inside.loss.dtype == torch.float32
    assert torch.equal(out.loss, inside.loss) and torch.equal(grad, inside_grad)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, and what only a GPU can show


PREDICTIVE = {"mask": "predictive", "step_size": 0.01, "threshold": 1e-3, "direction": "log_ratio_minus_kl"}


@pytest.mark.parametrize(
    ("resolve", "name", "options"),
    [
        *[(native, name, {}) for name in LOSSES],
        (native, "flow_dppo", PREDICTIVE),
        (native, "flow_grpo", {"kl_convention": "two_sigma_squared"}),
        (reference, "grpo_guard", {}),
        (reference, "flow_dppo", PREDICTIVE),
    ],
)
def test_compiles_without_graph_breaks(resolve, name, options, device):
    batch = draw_transitions(device=device, **options)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(resolve(name), fullgraph=True, backend="aot_eager"))
    expected, expected_grad = value_and_grad(batch, resolve(name))
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics.values, expected.metrics.values)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_with_inductor(name, device):
    torch.use_deterministic_algorithms(False)
    batch = draw_transitions(device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(native(name), fullgraph=True))
    expected, expected_grad = value_and_grad(batch, native(name))
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_training_step_never_waits_for_the_device(name, options):
    batch = draw_transitions(device="cuda", **options)
    native(name)(*batch.arguments(), **batch.options)  # the table's copy is made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        native(name)(*batch.arguments(), **batch.options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
