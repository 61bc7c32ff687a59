"""The gradient of a forward-process loss: where it flows, what it keeps, and the same under autocast and compile."""

from __future__ import annotations

import pytest
import torch

from advflow_ext import _native
from advflow_ext.testing import assert_rounded_once
from tests.ops.forward_family import (
    NAMES,
    NATIVE,
    both,
    draw,
    every_variant,
    truth,
)
from tests.ops.helpers import value_and_grad

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Autograd and launches


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffusion_nft_loss", {"adaptive": False, "beta": 0.3}),  # the adaptive scales are constants by definition
        # On-policy the value is -A whatever v is; off-policy it is the integral of the gradient.
        *[("awm_loss", {"off_policy": True, "weighting": w}) for w in ("uniform", "t", "t2", "huber", "ghuber")],
        *[("flow_awr_loss", {"kl_weight": 0.5, "weighting": w}) for w in ("prediction", "velocity")],
        ("reward_weighted_loss", {}),
    ],
)
def test_gradcheck(name, options):
    batch = draw(name, options, 2, (3, 2), torch.float64, reduction="none")
    assert torch.autograd.gradcheck(
        lambda v: NATIVE[name](v, *batch.arguments()[1:], **batch.options).loss, (batch.v,), nondet_tol=0.0
    )


@both
@every_variant
def test_gradient_flows_to_v_only(losses, name, options, device):
    batch = draw(name, options, device=device)
    leaves = [*batch.arguments()[1:], *(x for x in batch.options.values() if isinstance(x, torch.Tensor))]
    for leaf in leaves:
        leaf.requires_grad_()
    out = losses[name](*batch.arguments(), **batch.options)
    out.loss.backward()
    assert all(leaf.grad is None for leaf in leaves) and batch.v.grad is not None
    assert not out.metrics.values.requires_grad


@every_variant
def test_only_inputs_and_per_sample_numbers_are_saved(name, options, device):
    batch = draw(name, options, 4, (16, 8, 8), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        NATIVE[name](*batch.arguments(), **batch.options)
    latents = [*batch.arguments()[:3], *(x for k, x in batch.options.items() if k.startswith("v_"))]
    inputs = {x.data_ptr() for x in latents}
    assert {x.data_ptr() for x in saved} >= inputs
    assert all(x.numel() <= 4 * 3 for x in saved if x.data_ptr() not in inputs)


@every_variant
def test_forward_is_two_native_launches_and_backward_one(name, options, device):
    batch = draw(name, options, device=device)
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    out = NATIVE[name](*batch.arguments(), **batch.options)
    assert module.launch_count() == 2
    out.loss.backward()
    assert module.launch_count() == 3


@every_variant
def test_without_grad_nothing_is_recorded(name, options, device):
    batch = draw(name, options, device=device)
    with torch.no_grad():
        assert not NATIVE[name](*batch.arguments(), **batch.options).loss.requires_grad


@every_variant
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_may_be_changed_in_place(name, options, reduction, device):
    batch = draw(name, options, device=device)
    batch.options["reduction"] = reduction
    loss = NATIVE[name](*batch.arguments(), **batch.options).loss
    (whole,) = torch.autograd.grad(loss.sum(), batch.v)
    loss = NATIVE[name](*batch.arguments(), **batch.options).loss
    loss /= 4
    (quarter,) = torch.autograd.grad(loss.sum(), batch.v)
    assert torch.equal(quarter, whole / 4)


@every_variant
def test_loss_scale_reaches_the_gradient_before_its_rounding(name, options, device):
    batch = draw(name, options, 8, (16, 32, 32), torch.float16, device, v_ref=None)
    scale = 2.0**14
    out = NATIVE[name](*batch.arguments(), **batch.options)
    (grad,) = torch.autograd.grad(out.loss * scale, batch.v)
    assert_rounded_once(grad, truth(name, batch)[1] * scale)


@every_variant
def test_autocast_changes_nothing(name, options, device):
    batch = draw(name, options, dtype=torch.bfloat16, device=device)
    out, grad = value_and_grad(batch, NATIVE[name])
    with torch.autocast(device, torch.bfloat16):
        inside, inside_grad = value_and_grad(batch, NATIVE[name])
    assert inside.loss.dtype == torch.float32
    assert torch.equal(out.loss, inside.loss) and torch.equal(grad, inside_grad)


@both
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffusion_nft_loss", {}),
        ("diffusion_nft_loss", {"adaptive": False, "mode": "one"}),
        ("awm_loss", {}),
        ("awm_loss", {"off_policy": True, "weighting": "huber", "clip": 0.2}),
        ("flow_awr_loss", {}),
        ("reward_weighted_loss", {}),
        ("reward_weighted_loss", {"method": "linear"}),
        ("reward_weighted_loss", {"method": "best", "group_size": 2}),
    ],
)
def test_compiles_without_graph_breaks(losses, name, options, device):
    batch = draw(name, options, 4, (6,), device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(losses[name], fullgraph=True, backend="aot_eager"))
    expected, expected_grad = value_and_grad(batch, losses[name])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics.values, expected.metrics.values)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiles_with_inductor(name, device):
    torch.use_deterministic_algorithms(False)
    batch = draw(name, {}, 4, (6,), device=device)
    torch._dynamo.reset()
    out, grad = value_and_grad(batch, torch.compile(NATIVE[name], fullgraph=True))
    expected, expected_grad = value_and_grad(batch, NATIVE[name])
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)
    torch.use_deterministic_algorithms(True)


@pytest.mark.gpu
@every_variant
def test_a_training_step_never_waits_for_the_device(name, options):
    batch = draw(name, options, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        NATIVE[name](*batch.arguments(), **batch.options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
