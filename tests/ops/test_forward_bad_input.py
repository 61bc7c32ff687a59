"""What a forward-process loss does with bad samples, and what it tells the caller."""

from __future__ import annotations

import warnings

import pytest
import torch

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.strategies import Batch
from tests.ops.forward_family import (
    ANCHOR,
    BOTH,
    NAMES,
    NATIVE,
    REFERENCE,
    both,
    draw,
    every_variant,
)
from tests.ops.helpers import select, value_and_grad

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Bad samples


def bad_inputs(name, options):
    anchor = ANCHOR.get(name, "v_old")
    latents = ["v", "x0", "noise", "v_ref", *([anchor] if anchor else [])]
    scalars = ["t", "advantages", *(["log_prob_old"] if options.get("off_policy") else [])]
    values = (float("nan"), float("inf"), -float("inf"))
    yield from ((tensor, value) for tensor in latents + scalars for value in values)
    # Finite, but the square is not.
    yield from ((tensor, 3e38) for tensor in latents if tensor != "noise")


@both
@every_variant
def test_a_bad_sample_is_dropped_and_touches_no_other(losses, name, options, device):
    loss = losses[name]
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    clean, clean_grad = value_and_grad(batch, loss)
    others = torch.tensor([0, 2, 3], device=device)
    for tensor_name, value in bad_inputs(name, options):
        broken = select(batch, slice(None))
        tensor = broken.options[tensor_name] if tensor_name in broken.options else getattr(broken, tensor_name)
        with torch.no_grad():
            tensor[1].view(-1)[-1] = value
        out, grad = value_and_grad(broken, loss)
        case = (tensor_name, value)
        assert out.loss[1] == 0 and not grad[1].any(), case
        assert torch.equal(out.loss[others], clean.loss[others]), case
        assert torch.equal(grad[others], clean_grad[others]), case
        metrics = out.metrics.as_dict()
        assert metrics["nonfinite_samples"] == 1, case
        assert all(number == number for number in metrics.values()), case
        assert metrics["loss"] == pytest.approx(clean.loss[others].mean().item(), rel=1e-6), case


@both
@every_variant
def test_a_bad_sample_stays_in_the_denominator(losses, name, options, device):
    batch = draw(name, options, 4, (3, 5), device=device)
    clean_grad = value_and_grad(batch, losses[name])[1]
    batch.x0[1] = float("nan")
    grad = value_and_grad(batch, losses[name])[1]
    assert torch.equal(grad[[0, 2, 3]], clean_grad[[0, 2, 3]])


@both
@every_variant
@pytest.mark.parametrize("value", [0.0, -0.25, 1.0001])
def test_t_out_of_range(losses, name, options, value, device):
    batch = draw(name, options, 4, (3, 5), device=device, reduction="none")
    batch.t[2] = value
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"t\[2\] is {value:.6g}; accepted is 0 < t <= 1"):
            losses[name](*batch.arguments(), **batch.options)
    else:
        out, grad = value_and_grad(batch, losses[name])
        assert out.loss[2] == 0 and not grad[2].any() and out.metrics.as_dict()["invalid_timesteps"] == 1


@both
@every_variant
@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0), (2, 4, 0)])
def test_empty_batch_and_empty_samples(losses, name, options, shape, device):
    for reduction in ("mean", "sum", "none"):
        batch = draw(name, options, shape[0], shape[1:], device=device, reduction=reduction)
        out, grad = value_and_grad(batch, losses[name])
        assert grad.shape == shape and out.loss.isfinite().all()
        metrics = out.metrics.as_dict()
        assert metrics["nonfinite_samples"] == 0 and metrics["target_error"] == 0
        if shape[0] == 0:
            assert not out.loss.any()


# ---------------------------------------------------------------------------------------------------------------------
# What the caller is told


def cases(name, *changes):
    return [(name, change, sentence) for change, sentence in changes]


AT_LEAST_0, ABOVE_0 = "accepted is a finite number of at least 0", "accepted is a finite number above 0"
MISUSE = [
    *cases(
        "diffusion_nft_loss",
        ({"v_old": None}, r"v_old is a NoneType; accepted is a floating-point torch.Tensor"),
        ({"v_old": torch.randn(4, 5)}, r"v_old has shape \[4, 5\]; accepted is the shape of v, \[4, 6\]"),
        ({"beta": 0.0}, rf"beta is 0.0; {ABOVE_0}"),
        ({"beta": True}, rf"beta is True; {ABOVE_0}"),
        ({"adv_clip_max": -5.0}, rf"adv_clip_max is -5.0; {ABOVE_0}"),
        ({"kl_weight": -1e-4}, rf"kl_weight is -0.0001; {AT_LEAST_0}"),
        ({"adaptive": "yes"}, r"adaptive is 'yes'; accepted are True and False"),
        ({"mode": "positive only"}, r"mode is 'positive only'; accepted are 'all', 'positive', 'negative', 'one', "),
    ),
    *cases(
        "awm_loss",
        ({"v_ema": torch.randn(3, 6)}, r"v_ema has shape \[3, 6\]; accepted is the shape of v, \[4, 6\]"),
        ({"log_prob_old": torch.randn(1, 4)}, r"log_prob_old has shape \[1, 4\]; accepted is one value a sample"),
        ({"log_prob_old": 0.0}, r"log_prob_old is a float; accepted"),
        ({"weighting": "UNIFORM"}, r"weighting is 'UNIFORM'; accepted are 'uniform', 't', 't2', 'huber', 'ghuber'"),
        ({"power": 0.0}, rf"power is 0.0; {ABOVE_0}"),
        ({"clip": 0.0}, rf"clip is 0.0; {ABOVE_0}"),
        ({"ema_weight": -1.0}, rf"ema_weight is -1.0; {AT_LEAST_0}"),
        ({"kl_weight": float("inf")}, rf"kl_weight is inf; {AT_LEAST_0}"),
    ),
    *cases(
        "flow_awr_loss",
        ({"v_old": None}, r"v_old is a NoneType"),
        ({"kl_weight": None}, rf"kl_weight is None; {AT_LEAST_0}"),
        ({"weighting": "t2"}, r"weighting is 't2'; accepted are 'prediction', 'velocity', 'adaptive'"),
    ),
    *cases(
        "reward_weighted_loss",
        ({"rewards": torch.rand(3)}, r"rewards has shape \[3\]; accepted is one value a sample, \[4\]"),
        ({"rewards": [1.0] * 4}, r"rewards is a list; accepted"),
        ({"method": "softmax"}, r"method is 'softmax'; accepted are 'exp', 'linear', 'best'"),
        ({"method": "best"}, r"group_size is None; accepted is an integer of at least 2"),
        (
            {"method": "best", "group_size": 3},
            r"rewards has shape \[4\]; accepted is \[L\*K\], a multiple of group_size 3",
        ),
        ({"group_size": 1}, r"group_size is 1; accepted is an integer of at least 2"),
        ({"tau": 0.0}, rf"tau is 0.0; {ABOVE_0}"),
        ({"kl_weight": -1.0}, rf"kl_weight is -1.0; {AT_LEAST_0}"),
    ),
]
for _name in NAMES:
    MISUSE += cases(
        _name,
        ({"v": torch.randn(4)}, r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
        ({"x0": torch.randn(4, 5)}, r"x0 has shape \[4, 5\]; accepted is the shape of v"),
        ({"noise": torch.ones(4, 6, dtype=torch.int64)}, r"noise has dtype torch.int64; accepted are float32"),
        ({"v_ref": torch.randn(4, 6, 1)}, r"v_ref has shape \[4, 6, 1\]"),
        ({"x0": torch.randn(4, 6, device="meta")}, r"x0 is on meta; accepted is the device of v, cpu"),
        ({"t": 0.5}, r"t is a float; accepted"),
        ({"t": torch.rand(1, 4)}, r"t has shape \[1, 4\]; accepted is one value a sample, \[4\]"),
        ({"reduction": "avg"}, r"reduction is 'avg'; accepted are 'mean', 'sum', 'none'"),
    )
    if _name != "reward_weighted_loss":
        MISUSE += cases(
            _name,
            ({"advantages": torch.rand(3)}, r"advantages has shape \[3\]"),
            ({"advantages": torch.ones(4, dtype=torch.int32)}, r"advantages has dtype torch.int32"),
        )


@both
@pytest.mark.parametrize(("name", "change", "sentence"), MISUSE)
def test_misuse_is_said_in_a_sentence(losses, name, change, sentence):
    batch = draw(name, {}, 4, (6,))
    scores = "rewards" if name == "reward_weighted_loss" else "advantages"
    arguments = dict(zip(("v", "x0", "noise", "t", scores), batch.arguments(), strict=True)) | batch.options
    with pytest.raises(ValueError, match=sentence):
        losses[name](**{**arguments, **change})


@pytest.mark.skipif("cuda" not in _native.DEVICES, reason="built without CUDA kernels")
@pytest.mark.parametrize("name", [*NAMES, "awm_log_prob"])
def test_float64_on_cuda_is_refused_in_a_sentence(name):
    with torch._subclasses.FakeTensorMode():  # needs no GPU
        v, one = torch.empty(2, 3, device="cuda", dtype=torch.float64), torch.empty(2, device="cuda")
        arguments = [v, v, v, one, *([] if name == "awm_log_prob" else [one])]
        options = {"v_old": v} if name in ("diffusion_nft_loss", "flow_awr_loss") else {}
        with pytest.raises(ValueError, match=rf"a latent is float64 on CUDA; .*advflow_ext.reference.{name}\)"):
            getattr(af, name)(*arguments, **options)


@every_variant
def test_unknown_device_is_served_by_the_reference(name, options, monkeypatch):
    batch = draw(name, options)
    expected = value_and_grad(batch, REFERENCE[name])
    monkeypatch.setattr(_native, "DEVICES", frozenset())
    monkeypatch.setattr(_native, "_devices_warned_of", set())
    with pytest.warns(RuntimeWarning, match="built without cpu kernels"):
        out, grad = value_and_grad(batch, NATIVE[name])
    assert torch.equal(out.loss, expected[0].loss) and torch.equal(grad, expected[1])


@both
def test_only_losses_that_can_lose_their_minimum_warn(losses, device):
    for name in NAMES:
        batch = draw(name, {"v_ref": None}, device=device)
        batch.advantages.fill_(-1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses[name](*batch.arguments(), **batch.options).metrics.as_dict()
    batch = draw("reward_weighted_loss", {"method": "linear", "kl_weight": 0.25}, device=device)
    batch.advantages.copy_(torch.tensor([-0.5, -1.0, -0.25, 0.5]))
    with pytest.warns(UserWarning, match=r"2 sample\(s\) have reward \+ kl_weight < 0 \(smallest -0.75\)"):
        numbers = losses["reward_weighted_loss"](*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["nonconvex_samples"] == 2 and numbers["min_curvature"] == -0.75


# ---------------------------------------------------------------------------------------------------------------------
# AdvantageFlow's beta family


@pytest.mark.parametrize("loss", [af.advantage_flow_loss, af.reference.advantage_flow_loss], ids=BOTH)
def test_advantage_flow_001_01a_weighs_as_its_name_says(loss, device):
    """The paper's "AdvantageFlow(0.01-0.1A)": data weight 0.1 A, rollout weight 0.01 - 0.1 A."""
    batch = draw("advantage_flow_loss", {"gamma": "beta(beta-A)", "beta": 0.1}, device=device)
    out, grad = value_and_grad(batch, loss)
    A = batch.advantages
    by_hand = Batch(*batch.arguments()[:4], 0.1 * A, batch.options | {"gamma": 0.01 - 0.1 * A, "beta": 1.0})
    expected, expected_grad = value_and_grad(by_hand, loss)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-7)
    assert_close_to_truth(grad, expected_grad, 1e-6)
    numbers = out.metrics.as_dict()
    assert numbers["min_curvature"] == pytest.approx(0.01 + 1e-3, rel=1e-5) and numbers["nonconvex_samples"] == 0


@pytest.mark.parametrize("loss", [af.advantage_flow_loss, af.reference.advantage_flow_loss], ids=BOTH)
def test_beta_takes_part_in_the_curvature_check(loss, device):
    """The paper's "AdvantageFlow(0.01)" has rollout weight 0.01 and so no minimum for A < -0.1."""
    batch = draw("advantage_flow_loss", {"gamma": 0.01, "beta": 0.1, "lam": 0.0}, device=device)
    batch.advantages.copy_(torch.tensor([0.5, -0.05, -0.2, -1.0]))
    with pytest.warns(UserWarning, match=r"2 sample\(s\) have beta A \+ gamma \+ lam <= 0 \(smallest -0.09\)"):
        numbers = loss(*batch.arguments(), **batch.options).metrics.as_dict()
    assert numbers["nonconvex_samples"] == 2
    for beta in (0.0, "0.1", float("nan")):
        with pytest.raises(ValueError, match=rf"beta is {beta!r}; accepted is a finite number above 0"):
            loss(*batch.arguments(), **batch.options | {"beta": beta})
    with pytest.raises(ValueError, match=r"gamma is 'beta'; accepted are a number, .* \"1-A\" and \"beta\(beta-A\)\""):
        loss(*batch.arguments(), **batch.options | {"gamma": "beta"})
