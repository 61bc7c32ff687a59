"""What a reverse-process loss does with bad transitions, and what it tells the caller."""

from __future__ import annotations

import math

import pytest
import torch

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing.transition_strategies import TABLES, TransitionBatch, shifted
from tests.ops.transitions import (
    BOTH,
    FULL,
    LOSSES,
    closed_form,
    draw_transitions,
    native,
    reference,
    select,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# ---------------------------------------------------------------------------------------------------------------------
# Bad transitions

BAD = [
    (name, value)
    for name in ("v", "v_old", "eps", "v_ref", "advantages")
    for value in (float("nan"), float("inf"), -float("inf"))
]
BAD += [(name, 3e38) for name in ("v", "v_old", "eps", "v_ref")]  # finite, but its square is not


def spoil(batch: TransitionBatch, name: str, value: float, row: int) -> TransitionBatch:
    broken = select(batch, slice(None))
    tensor = broken.options[name] if name in broken.options else getattr(broken, name)
    with torch.no_grad():
        tensor[row].view(-1)[-1] = value
    return broken


def assert_one_is_dropped(clean, clean_grad, out, grad, row):
    others = torch.tensor([k for k in range(len(clean.loss)) if k != row], device=grad.device)
    assert out.loss[row] == 0 and not grad[row].any()
    assert torch.equal(out.loss[others], clean.loss[others]) and torch.equal(grad[others], clean_grad[others])
    metrics = out.metrics.as_dict()
    assert metrics["nonfinite_samples"] == 1 and metrics["invalid_steps"] == 0
    assert all(math.isfinite(number) for number in metrics.values())
    assert metrics["loss"] == pytest.approx(clean.loss[others].mean().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("loss", "options"), FULL)
@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("kl_weight", [0.04, 0.0])
def test_a_bad_transition_is_dropped_and_touches_no_other(name, value, loss, options, kl_weight, resolve, device):
    batch = draw_transitions(4, device=device, **options)
    batch.options["kl_weight"] = kl_weight
    clean, clean_grad = value_and_grad(batch, resolve(loss))
    assert clean.loss.any()
    out, grad = value_and_grad(spoil(batch, name, value, 1), resolve(loss))
    assert_one_is_dropped(clean, clean_grad, out, grad, 1)


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(("loss", "options"), FULL)
@pytest.mark.parametrize("row", [0, 1, 2, 3])
@pytest.mark.parametrize("log_ratio", [95.0, 1e4])
def test_an_overflowing_ratio_is_dropped_whatever_its_advantage(loss, options, row, log_ratio, resolve, device):
    batch = draw_transitions(4, device=device, drift=1.0, **options)
    batch.advantages.copy_(torch.tensor([0.7, -0.7, 0.0, -1e-30]))
    clean, clean_grad = value_and_grad(batch, resolve(loss))
    step = batch.table.rows(batch.index)
    slope = {"flow_cps": 2 * step.sigma * step.c_v, "grpo_guard": step.c_v}.get(loss, step.kappa)
    broken = select(batch, slice(None))
    delta = (batch.v - batch.v_old).detach()[row]
    broken.eps[row] = (log_ratio / (slope[row] * delta.square().mean()) + step.kappa[row]) * delta
    out, grad = value_and_grad(broken, resolve(loss))
    assert_one_is_dropped(clean, clean_grad, out, grad, row)


def test_a_gradient_that_overflows_is_dropped_with_its_loss(device):
    quiet = af.StepTable(shifted(10), noise_level=1e-3)  # kappa^2 / 2 of 10^5
    batch = draw_transitions(3, (64,), device=device, table=quiet, drift=1e-3, with_reference=False, reduction="none")
    clean, clean_grad = value_and_grad(batch, native("flow_dppo"))
    batch.advantages[1] = -1
    kappa = batch.table.rows(batch.index).kappa[1]
    delta = (batch.v - batch.v_old).detach()[1]
    batch.eps[1] = (86 / (kappa * delta.square().mean()) + kappa / 2) * delta  # a ratio of 2e37 is still a number
    out, grad = value_and_grad(batch, native("flow_dppo"))
    assert out.loss[1] == 0 and not grad[1].any() and out.metrics.as_dict()["nonfinite_samples"] == 1
    assert torch.equal(out.loss[[0, 2]], clean.loss[[0, 2]]) and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_a_vanishing_ratio_is_an_ordinary_number(name, resolve, device):
    batch = draw_transitions(2, device=device, drift=1.0, with_reference=False, reduction="none")
    step = batch.table.rows(batch.index)
    slope = {"flow_cps": 2 * step.sigma * step.c_v, "grpo_guard": step.c_v}.get(name, step.kappa)
    delta = (batch.v - batch.v_old).detach()
    batch.eps[0] = -1e4 / (slope[0] * delta[0].square().mean()) * delta[0]
    batch.advantages.fill_(0.5)
    out, grad = value_and_grad(batch, resolve(name))
    assert out.loss[0] == 0 and not grad[0].any() and out.metrics.as_dict()["nonfinite_samples"] == 0


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("step", "reason"),
    [(9, r"a deterministic step \(sigma = 0\)"), (10, "outside the table of 10 steps"), (-1, "outside the table of")],
)
def test_a_step_that_cannot_be_trained_is_named(name, step, reason, resolve):
    batch = draw_transitions(4, table=TABLES[3])  # CPS ends in a deterministic step
    batch.index[3] = step
    sentence = rf"index\[3\] is {step}, {reason}.*; accepted are the stochastic steps 0, 1, 2, 3, 4, 5, 6, 7, 8\."
    with pytest.raises(ValueError, match=sentence):
        resolve(name)(*batch.arguments(), **batch.options)


@pytest.mark.parametrize("name", LOSSES)
def test_where_values_cannot_be_read_such_a_step_is_dropped_and_counted(name, device):
    """On CUDA, and on every device under torch.compile."""
    batch = draw_transitions(5, device=device, table=TABLES[3], reduction="none")
    clean, clean_grad = value_and_grad(batch, native(name))
    batch.index[:3] = torch.tensor([9, 10, -1])
    with torch.no_grad():
        batch.v[0].fill_(float("nan"))  # counts once more, as what it is
    loss = native(name)
    if device == "cpu":
        torch._dynamo.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out, grad = value_and_grad(batch, loss)
    assert not out.loss[:3].any() and not grad[:3].any()
    torch.testing.assert_close(out.loss[3:], clean.loss[3:])
    torch.testing.assert_close(grad[3:], clean_grad[3:])
    metrics = out.metrics.as_dict()
    assert metrics["invalid_steps"] == 3 and metrics["nonfinite_samples"] == 1
    assert metrics["loss"] == pytest.approx(clean.loss[3:].mean().item(), rel=1e-5)


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 8, 8), (3, 0), (2, 4, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_and_empty_transitions(name, resolve, shape, reduction, device):
    batch = draw_transitions(shape[0], shape[1:], device=device, reduction=reduction)
    out, grad = value_and_grad(batch, resolve(name))
    assert grad.shape == shape and torch.isfinite(out.loss).all()
    metrics = out.metrics.as_dict()
    assert metrics["nonfinite_samples"] == 0 and all(math.isfinite(number) for number in metrics.values())


# ---------------------------------------------------------------------------------------------------------------------
# What the caller is told


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_metrics_say_what_happened(name, resolve, device):
    bound = {"flow_dppo": {"threshold": 1e-3}}.get(name, {"clip": 1e-4})
    # The kernels take no float64 on CUDA.
    dtype = torch.float32 if device == "cuda" and resolve is native else torch.float64
    allowed = {"rel": 1e-9, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-3, "abs": 1e-8}
    batch = draw_transitions(8, dtype=dtype, device=device, seed=9, reduction="sum", **bound)
    out = resolve(name)(*batch.arguments(), **batch.options)
    batch = batch.to(torch.float64)
    form = closed_form(name, batch)
    assert out.metrics.values.shape == (len(out.metrics.names),) and out.metrics.values.device.type == device
    numbers = out.metrics.as_dict()
    assert tuple(numbers) == out.metrics.names
    step = batch.table.rows(batch.index, torch.float64)
    kl_ref = step.kappa.square() / 2 * (batch.v.detach() - batch.options["v_ref"]).square().mean((1, 2, 3))
    A = batch.advantages.double()
    away = A * form.log_ratio > 0
    if name == "flow_dppo":
        masked = away & (form.kl > 1e-3)
        policy = torch.where(masked, 0, -A * form.log_ratio.exp())
    else:
        masked = away & (form.log_ratio.abs() > 1e-4)
        weight = -1 / step.dt if name == "grpo_guard" else 1
        policy = weight * torch.where(masked, -A * (1 + 1e-4 * A.sign()), -A * form.log_ratio.exp())
    ratio = form.log_ratio.exp()
    assert 0 < masked.sum() < 8 and -form.log_ratio.min() > form.log_ratio.max()
    expected = {
        "loss": (policy + 0.04 * kl_ref).mean(),
        "policy_term": policy.mean(),
        "unweighted_policy": (policy * -step.dt if name == "grpo_guard" else policy).mean(),
        "mean_log_ratio": form.log_ratio.mean(),
        "mean_kl_old": form.kl.mean(),
        "mean_kl_ref": kl_ref.mean(),
        "mean_advantage": A.mean(),
        "mean_abs_advantage": A.abs().mean(),
        "max_abs_log_ratio": form.log_ratio.abs().max(),
        "masked_samples": masked.sum(),
        "nonfinite_samples": 0,
        "invalid_steps": 0,
        "contrast_alive": 1,
        "approx_kl": form.log_ratio.square().mean() / 2,
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(correction=0),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clipped_above": 0 if name == "flow_dppo" else (ratio > 1 + 1e-4).double().mean(),
        "clipped_below": 0 if name == "flow_dppo" else (ratio < 1 - 1e-4).double().mean(),
    }
    assert tuple(expected) == tuple(numbers)
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(float(value), **allowed), key


MISUSE = [
    ({"v": torch.randn(4)}, r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
    ({"v": [1.0]}, r"v is a list; accepted is a floating-point torch.Tensor"),
    ({"v_old": torch.randn(4, 5)}, r"v_old has shape \[4, 5\]; accepted is the shape of v, \[4, 6\]"),
    ({"v_old": None}, r"v_old is a NoneType"),
    ({"eps": torch.ones(4, 6, dtype=torch.int64)}, r"eps has dtype torch.int64; accepted are float32"),
    ({"eps": torch.randn(4, 6, device="meta")}, r"eps is on meta; accepted is the device of v, cpu"),
    ({"v_ref": torch.randn(4, 6, 1)}, r"v_ref has shape \[4, 6, 1\]"),
    ({"table": [1.0, 0.0]}, r"table is a list; accepted is a StepTable"),
    ({"index": 3.0}, r"index is 3.0; accepted are the steps 0 to 9 and an int64 or int32 tensor \[\] or \[N\]"),
    ({"index": torch.zeros(4)}, r"index is torch.float32; accepted is an int64 or int32 tensor"),
    ({"index": torch.zeros(3, dtype=torch.int64)}, r"index has shape \[3\]; accepted is one step a transition, \[4\]"),
    ({"index": torch.zeros(4, dtype=torch.int64, device="meta")}, r"index is on meta; accepted is the device of v"),
    ({"index": torch.tensor([0, 1, 10, 2])}, r"index\[2\] is 10, outside the table of 10 steps; accepted are the"),
    ({"advantages": torch.rand(3)}, r"advantages has shape \[3\]"),
    ({"kl_weight": -1.0}, r"kl_weight is -1.0; accepted is a finite number of at least 0"),
    ({"kl_weight": 0.1, "v_ref": None}, r"kl_weight is 0.1 without v_ref; accepted are 0, or v_ref beside it"),
    ({"reduction": "avg"}, r"reduction is 'avg'; accepted are 'mean', 'sum', 'none'"),
]
CLIP_MISUSE = [
    ({"clip": -1e-4}, r"clip is -0.0001; accepted is a finite number of at least 0"),
    ({"clip": 1.0}, r"clip is 1.0; accepted is a number of at least 0 and below 1"),
]
CONVENTION_MISUSE = [({"kl_convention": "approx"}, r"kl_convention is 'approx'; accepted are 'exact', 'dt', 'two_sig")]
OWN_MISUSE = {
    "flow_grpo": CLIP_MISUSE + CONVENTION_MISUSE,
    "flow_cps": CLIP_MISUSE + CONVENTION_MISUSE,
    "grpo_guard": [*CLIP_MISUSE, ({"time_weight": "dt"}, r"time_weight is 'dt'; accepted are 'inverse_dt', 'none'")],
    "flow_dppo": [
        ({"threshold": -1.0}, r"threshold is -1.0; accepted is a finite number of at least 0"),
        ({"direction": "kl"}, r"direction is 'kl'; accepted are 'ratio', 'log_ratio_minus_kl'"),
        ({"mask": "old"}, r"mask is 'old'; accepted are 'current', 'predictive'"),
        ({"mask": "predictive"}, r"step_size is None; accepted is a finite number above 0"),
        ({"mask": "predictive", "step_size": 0.0}, r"step_size is 0.0; accepted is a finite number above 0"),
        ({"step_size": 0.1}, r"step_size is 0.1; accepted with mask 'current' is None"),
    ],
}


@pytest.mark.parametrize("resolve", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_misuse_is_said_in_a_sentence(name, resolve):
    batch = draw_transitions(4, (6,))
    names = ("v", "v_old", "eps", "table", "index", "advantages")
    arguments = {**dict(zip(names, batch.arguments(), strict=True)), **batch.options}
    for change, sentence in MISUSE + OWN_MISUSE[name]:
        with pytest.raises(ValueError, match=sentence):
            resolve(name)(**{**arguments, **change})


def test_a_table_without_stochastic_steps_says_so():
    batch = draw_transitions(2, (6,), with_reference=False)
    table = af.StepTable(shifted(10), sampler="ode")
    with pytest.raises(ValueError, match=r"accepted are the stochastic steps \(none in this table\)"):
        af.flow_grpo_loss(batch.v, batch.v_old, batch.eps, table, batch.index, batch.advantages)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_float64_on_cuda_is_refused_in_a_sentence(name):
    batch = draw_transitions(2, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match=rf"a latent is float64 on CUDA.*everywhere by .*\.{name}_loss"):
        native(name)(*batch.arguments())


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_device_is_served_by_the_reference(name, monkeypatch):
    batch = draw_transitions()
    expected = value_and_grad(batch, reference(name))
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        out, grad = value_and_grad(batch, native(name))
    assert torch.equal(out.loss, expected[0].loss) and torch.equal(grad, expected[1])
