"""AWM's own algebra: log-probabilities, ratio and clip, AdvantageFlow as its on-policy uniform case."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext.testing import assert_close_to_truth
from advflow_ext.testing.strategies import Batch
from tests.ops.forward_family import NATIVE, REFERENCE, draw
from tests.ops.helpers import value_and_grad

NAME = "awm_loss"
WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")
BOTH = {"native": af, "reference": af.reference}
both = pytest.mark.parametrize("side", BOTH.values(), ids=BOTH)

seeds = st.integers(0, 1000)


@both
@given(seeds, st.floats(0, 1))
def test_uniform_on_policy_is_advantage_flow_with_gamma_one_in_velocity_space(side, seed, kl):
    batch = draw(NAME, {"weighting": "uniform", "kl_weight": kl}, 3, (4, 6), torch.float64, seed=seed)
    options = {"v_old": batch.options["v_ema"], "v_ref": batch.options["v_ref"]}
    family = Batch(*batch.arguments(), options | {"gamma": 1.0, "lam": kl, "weighting": "velocity"})
    assert_close_to_truth(
        value_and_grad(batch, side.awm_loss)[1], value_and_grad(family, side.advantage_flow_loss)[1], 1e-12
    )


@both
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_on_policy_value_is_minus_the_advantage_and_the_pulls(side, weighting):
    batch = draw(NAME, {"weighting": weighting, "kl_weight": 0.3, "ema_weight": 0.7, "reduction": "none"})
    v = batch.v.detach()
    pulls = [(v - batch.options[anchor]).square().mean((1, 2, 3)) for anchor in ("v_ema", "v_ref")]
    out = side.awm_loss(*batch.arguments(), **batch.options)
    torch.testing.assert_close(out.loss.detach(), -batch.advantages + 0.7 * pulls[0] + 0.3 * pulls[1])
    numbers = out.metrics.as_dict()
    assert numbers["mean_log_ratio"] == 0 and numbers["clipped_fraction"] == 0


@both
def test_log_prob_by_hand(side):
    """<(v-u)^2> is 4 and 9 here, t is 1/2 and 1."""
    v, x0 = torch.tensor([[3.0, -1.0], [4.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    noise, t = torch.tensor([[2.0, 2.0], [1.0, 1.0]]), torch.tensor([0.5, 1.0])
    expected = {
        "uniform": [-4.0, -9.0],
        "t": [-2.0, -9.0],
        "t2": [-1.0, -9.0],
        "huber": [-0.5 * (2 - 1e-5), -(3 - 1e-5)],
        "ghuber": [-2 * (2**0.5 - 10**-2.5), -4 * (3**0.5 - 10**-2.5)],
    }
    for weighting, numbers in expected.items():
        log_prob = side.awm_log_prob(v.requires_grad_(), x0, noise, t, weighting=weighting)
        torch.testing.assert_close(log_prob, torch.tensor(numbers))
    # The generalised Huber weighting contains others.
    for power, weighting, factor in ((0.5, "huber", 2), (1.0, "t", 1)):
        torch.testing.assert_close(
            side.awm_log_prob(v, x0, noise, t, weighting="ghuber", power=power),
            factor * side.awm_log_prob(v, x0, noise, t, weighting=weighting),
        )


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_log_prob_dtype_and_bad_samples(side, dtype):
    batch = draw(NAME, {}, 3, (4, 6), dtype)
    clean = side.awm_log_prob(*batch.arguments()[:4])
    assert clean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, bad in (("v", math.nan), ("x0", math.inf), ("noise", -math.inf), ("t", math.nan)):
        tensor = getattr(batch, name)
        with torch.no_grad():
            kept = tensor[1].clone()
            tensor[1] = bad
            log_prob = side.awm_log_prob(*batch.arguments()[:4])
            tensor[1] = kept
        assert not log_prob[1].isfinite() and torch.equal(log_prob[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unchanged_policy_has_ratio_exactly_one(weighting, dtype, device):
    batch = draw(NAME, {"weighting": weighting, "reduction": "none"}, 38, (3, 7), dtype, device)
    out, grad = value_and_grad(batch, NATIVE[NAME])
    arguments = batch.arguments()[:4]
    # Stored in other microbatches than those trained on.
    parts = [af.awm_log_prob(*(x[k : k + 5] for x in arguments), weighting=weighting) for k in range(0, 38, 5)]
    batch.options["log_prob_old"] = torch.cat(parts)
    off_policy, off_policy_grad = value_and_grad(batch, NATIVE[NAME])
    assert torch.equal(out.loss, off_policy.loss) and torch.equal(grad, off_policy_grad)


@both
@pytest.mark.parametrize("clip", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_clip_by_hand(side, weighting, clip):
    A = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0])
    log_ratio = torch.tensor([3.0, 0.1, -3.0, 3.0, 0.1, -3.0, 0.1])
    batch = draw(NAME, {"weighting": weighting, "clip": clip, "reduction": "none", "v_ref": None}, 7, (5,))
    batch.options["v_ema"] = None
    batch.advantages.copy_(A)
    stored = side.awm_log_prob(*batch.arguments()[:4], weighting=weighting) - log_ratio
    batch.options["log_prob_old"] = stored
    out, grad = value_and_grad(batch, side.awm_loss)
    ratio = log_ratio.exp()
    expected = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-5, atol=1e-6)
    clips_below = clip < 1  # exp(-3) is above 1 - clip otherwise
    moves = [False, True, True, True, True, not clips_below, False]
    assert grad.ne(0).any(1).tolist() == moves
    numbers = out.metrics.as_dict()
    assert numbers["clipped_fraction"] == pytest.approx((1 + clips_below) / 7)
    assert numbers["mean_log_ratio"] == pytest.approx(float(log_ratio.mean()), abs=1e-5)


@both
def test_a_ratio_that_overflows_is_clipped_or_dropped(side):
    batch = draw(NAME, {"reduction": "none", "v_ref": None}, 4, (5,))
    batch.options["log_prob_old"] = af.awm_log_prob(*batch.arguments()[:4])
    clean, clean_grad = value_and_grad(batch, side.awm_loss)
    batch.advantages[1], batch.advantages[2] = 0.5, -0.5
    batch.options["log_prob_old"][1:3] -= 1000
    out, grad = value_and_grad(batch, side.awm_loss)
    ema = (batch.v.detach() - batch.options["v_ema"]).square().mean(1)
    assert out.loss[1].item() == pytest.approx(-0.5 * 2 + ema[1].item(), rel=1e-6)
    torch.testing.assert_close(grad[1], 2 / 5 * (batch.v.detach() - batch.options["v_ema"])[1])
    assert out.loss[2] == 0 and not grad[2].any() and out.metrics.as_dict()["nonfinite_samples"] == 1
    assert torch.equal(out.loss[[0, 3]], clean.loss[[0, 3]]) and torch.equal(grad[[0, 3]], clean_grad[[0, 3]])


@both
def test_a_gradient_that_overflows_drops_the_sample(side):
    batch = draw(NAME, {"reduction": "none", "v_ref": None}, 3, (5,))
    with torch.no_grad():
        batch.v[1] = (batch.noise - batch.x0)[1] + 1e-4  # omega is about 1e6 there
    batch.t[1], batch.advantages[1] = 1.0, -0.5
    batch.options["log_prob_old"] = af.awm_log_prob(*batch.arguments()[:4])
    batch.options["log_prob_old"][1] -= 87  # a ratio of 6e37 is still finite
    out, grad = value_and_grad(batch, side.awm_loss)
    assert out.loss[1] == 0 and not grad[1].any() and grad[[0, 2]].any(1).all()
    assert out.metrics.as_dict()["nonfinite_samples"] == 1


@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_a_ratio_on_the_edge_of_the_clip_is_not_clipped(clip):
    batch = draw(NAME, {"clip": clip, "reduction": "none"}, 2, (5,), torch.float64)
    batch.advantages.copy_(torch.tensor([1.0, -1.0]))
    log_prob = af.awm_log_prob(*batch.arguments()[:4])
    inside = torch.tensor([math.log1p(clip), math.log1p(-clip)]) * (1 - 1e-6)
    for factor, clipped in ((1, 0.0), (1 + 2e-6, 1.0)):
        batch.options["log_prob_old"] = log_prob - factor * inside
        for losses in (NATIVE, REFERENCE):
            out = losses[NAME](*batch.arguments(), **batch.options)
            assert out.metrics.as_dict()["clipped_fraction"] == clipped


@both
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"v": torch.randn(4)}, r"v has shape \[4\]; accepted are a batch dimension and at least one more"),
        ({"noise": None}, r"noise is a NoneType; accepted"),
        ({"t": torch.rand(3)}, r"t has shape \[3\]; accepted is one value a sample, \[4\]"),
        ({"t": torch.full((4,), 1.5)}, r"t\[0\] is 1.5; accepted is 0 < t <= 1"),
        ({"weighting": "ELBO"}, r"weighting is 'ELBO'; accepted are 'uniform', 't', 't2', 'huber', 'ghuber'"),
        ({"power": -1.0}, r"power is -1.0; accepted is a finite number above 0"),
    ],
)
def test_misuse_of_log_prob_is_said_in_a_sentence(side, change, sentence):
    batch = draw(NAME, {}, 4, (6,))
    arguments = dict(zip(("v", "x0", "noise", "t"), batch.arguments()[:4], strict=True))
    with pytest.raises(ValueError, match=sentence):
        side.awm_log_prob(**{**arguments, **change})


@both
def test_log_prob_compiles_without_graph_breaks(side):
    batch = draw(NAME, {}, 4, (6,))
    torch._dynamo.reset()
    compiled = torch.compile(side.awm_log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch.arguments()[:4]), side.awm_log_prob(*batch.arguments()[:4]))


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber", "adaptive"])
@pytest.mark.parametrize("space", [af, af.reference], ids=["native", "reference"])
def test_the_log_probability_has_its_gradient(space, weighting):
    generator = torch.Generator().manual_seed(0)
    v, x0, noise = torch.randn(3, 4, 3, 5, generator=generator, dtype=torch.float64).unbind()
    t = torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    v.requires_grad_()
    if weighting != "adaptive":  # whose scale is a constant to the gradient, and none to a difference
        assert torch.autograd.gradcheck(lambda v: space.awm_log_prob(v, x0, noise, t, weighting=weighting), v)
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(space.awm_log_prob(v, x0, noise, t, weighting=weighting), v, upstream)
    # Of the loss on-policy: ratio 1, and -A d ratio/dv is -A d lp/dv.
    options = {"weighting": weighting, "reduction": "none"}
    loss = space.awm_loss(v, x0, noise, t, -upstream, **options).loss
    torch.testing.assert_close(grad, torch.autograd.grad(loss.sum(), v)[0], rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        v[1, 0, 0] = float("nan")
    values = space.awm_log_prob(v, x0, noise, t, weighting=weighting)
    bad = torch.autograd.grad(values, v, upstream)[0]
    assert not values[1].isfinite() and not bad[1].any() and torch.equal(bad[[0, 2, 3]], grad[[0, 2, 3]])
