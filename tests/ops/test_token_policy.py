"""The policy loss of tokens: right to 1e-6, clipped and overflowing sequences too; damage stays where it is."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import advflow_ext as af
from advflow_ext.kernels import linear_softmax
from advflow_ext.testing import relative_error
from tests.ops.token_draws import draw, mapped, naive, of_sequences, value_and_gradients, wide

FORMS = [
    dict(zip(("level", "surrogate", "kl"), form, strict=True))
    for form in product(("sequence", "token"), ("ppo", "released"), ("k3", "exact"))
]
WEIGHTS = {"kl_weight": 0.7, "entropy_weight": 0.05}
WITHOUT_REFERENCE = [
    {name: word for name, word in form.items() if name != "kl"} for form in FORMS if form["kl"] == "k3"
]
each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
each_ratio = pytest.mark.parametrize("form", WITHOUT_REFERENCE, ids=lambda form: "-".join(form.values()))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Two parts a sequence of 5 tokens."""
    monkeypatch.setattr(linear_softmax, "PART", 3 * 19)


def clipped_and_overflowing(call):
    """Log-ratios of 8 sequences: 2 inside the range, the others off either way, by up to what overflows."""
    shift = torch.tensor([0.0, 0.02, 0.5, -0.5, 2.0, -2.0, 120.0, -120.0]).to(call["log_prob_old"])
    return call | {"log_prob_old": call["log_prob_old"] - shift[:, None]}


@each_form
@pytest.mark.parametrize("guided", [False, True])
def test_value_and_gradients_are_those_of_the_formula(form, guided):
    call = clipped_and_overflowing(draw(batch=8, guided=guided))
    call["mask"] = torch.rand(8, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    call["mask"][:, 1] = True
    # The overflowing ratio is held by the clip where its advantages ask for more of it (of less, in the released form).
    held = 1.0 if form["surrogate"] == "ppo" else -1.0
    for A in call["advantages"]:
        A[6] = held * A[6].abs()
    exact = wide(call)
    out, grads = value_and_gradients(af.token_policy_loss, call, **form, **WEIGHTS, reduction="none")
    total, expected = value_and_gradients(naive, of_sequences(exact, [0, 1, 2, 3, 4, 5, 7]), **form, **WEIGHTS)
    losses, truths = value_and_gradients(af.reference.token_policy_loss, exact, **form, **WEIGHTS, reduction="none")

    others = [0, 1, 2, 3, 4, 5, 7]
    assert relative_error(losses.loss[others], total) < 1e-12
    for truth, right in zip(truths, expected, strict=True):
        # The overflowing sequence adds the gradients of its entropy and its reference term, to weight and its own rows.
        if truth.dim() == 3:
            assert relative_error(truth[others], right) < 1e-12
    assert out.loss.isfinite().all() and out.metrics.as_dict()["nonfinite_samples"] == 0
    assert (out.loss - losses.loss).abs().max() <= 1e-6 * losses.loss.abs().mean()
    for grad, truth in zip(grads, truths, strict=True):
        assert relative_error(grad, truth) <= 1e-6


@each_ratio
def test_a_ratio_that_overflows_and_is_clipped_pushes_nowhere(form):
    call = draw(reference=False)
    call["log_prob_old"] = call["log_prob_old"] - 800.0
    sign = 1.0 if form["surrogate"] == "ppo" else -1.0
    call["advantages"] = sign * torch.tensor([1.0, 2.0, 0.5])
    out, (d_hidden, d_weight) = value_and_gradients(af.token_policy_loss, call, **form, reduction="none")
    torch.testing.assert_close(out.loss, -1.2 * call["advantages"])
    assert torch.equal(d_hidden, torch.zeros_like(d_hidden)) and torch.equal(d_weight, torch.zeros_like(d_weight))
    metrics = out.metrics.as_dict()
    assert metrics["nonfinite_samples"] == 0 and metrics["clipped_fraction"] == metrics["clipped_above"] == 1


@each_ratio
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_that_overflows_and_is_not_clipped_is_dropped_and_counted(form, dtype):
    call = draw(reference=False, dtype=dtype)
    call["log_prob_old"][1] -= 800.0
    sign = -1.0 if form["surrogate"] == "ppo" else 1.0
    call["advantages"] = sign * torch.tensor([1.0, 2.0, 0.5])
    out, grads = value_and_gradients(af.token_policy_loss, call, **form, entropy_weight=0.1, reduction="none")
    assert out.loss[1] == 0 and not grads[0][1].any() and out.metrics.as_dict()["nonfinite_samples"] == 1
    alone, expected = value_and_gradients(
        af.token_policy_loss, of_sequences(call, [0, 2]), **form, entropy_weight=0.1, reduction="none"
    )
    assert torch.equal(out.loss[[0, 2]], alone.loss) and torch.equal(grads[0][[0, 2]], expected[0])
    assert torch.equal(grads[1], expected[1])


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_reference_out_of_sight_is_dropped_and_counted(level):
    call = draw(dtype=torch.float64)
    call["hidden_ref"], call["weight_ref"] = None, None
    call["log_prob_ref"] = call["log_prob_old"] + torch.tensor([0.1, 900.0, 0.1])[:, None]
    for weight, dropped in ((0.5, 1), (0.0, 0)):
        out, grads = value_and_gradients(af.token_policy_loss, call, level=level, kl_weight=weight, reduction="none")
        assert out.metrics.as_dict()["nonfinite_samples"] == dropped
        assert out.loss.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        assert bool(grads[0][1].any()) is (not dropped)


DAMAGE = {
    "a hidden state": ("hidden", (1, 2, 3), math.nan),
    "an infinite one": ("hidden", (1, 0, 0), math.inf),
    "one that overflows": ("hidden", (1, 4), 3e38),
    "an old log-probability": ("log_prob_old", (1, 2), -math.inf),
    "the reference": ("hidden_ref", (1, 2, 3), math.nan),
    "an advantage": ("advantages", (1,), math.nan),
}


@pytest.mark.parametrize("space", [af, af.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[7]], ids=["sequence-k3", "token-exact"])
def test_damage_stays_in_its_sequence(space, what, form):
    name, place, value = DAMAGE[what]
    call = draw(several=False)
    with torch.no_grad():
        call[name][place] = value
    out, grads = value_and_gradients(space.token_policy_loss, call, **form, **WEIGHTS, reduction="none")
    rest = of_sequences(call, [0, 2])
    alone, expected = value_and_gradients(space.token_policy_loss, rest, **form, **WEIGHTS, reduction="none")
    assert out.loss[1] == 0 and not grads[0][1].any()
    if space is af:
        assert torch.equal(out.loss[[0, 2]], alone.loss) and torch.equal(grads[0][[0, 2]], expected[0])
    else:  # whose products take all sequences at once, and on several threads round by how many they are
        torch.testing.assert_close(out.loss[[0, 2]], alone.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grads[0][[0, 2]], expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[1], expected[1], rtol=1e-6, atol=1e-7)
    numbers, others = out.metrics.as_dict(), alone.metrics.as_dict()
    assert numbers.pop("nonfinite_samples") == 1 and others.pop("nonfinite_samples") == 0
    assert numbers == pytest.approx(others, rel=1e-6)


@pytest.mark.parametrize("space", [af, af.reference], ids=["ours", "reference"])
def test_a_damaged_head_trains_nobody(space):
    call = draw()
    with torch.no_grad():
        call["weight"][4, 2] = math.inf
    out, grads = value_and_gradients(space.token_policy_loss, call, **WEIGHTS)
    assert out.loss == 0 and out.metrics.as_dict()["nonfinite_samples"] == 3
    assert not any(grad.any() for grad in grads)


def test_a_gradient_too_large_for_half_precision_is_dropped_and_counted():
    call = mapped(draw(reference=False, several=False), lambda x: x.half() if x.dim() == 3 else x)
    call["advantages"] = torch.tensor([1.0, -1e6, 0.5])
    out, grads = value_and_gradients(af.token_policy_loss, call, reduction="none")
    assert out.metrics.as_dict()["nonfinite_samples"] == 1 and not grads[0][1].any() and grads[0][[0, 2]].any()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("space", [af, af.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[7]], ids=["sequence-k3", "token-exact"])
def test_what_the_mask_leaves_out_is_never_looked_at(space, form):
    call = draw(batch=4)
    call["mask"] = torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    clean, expected = value_and_gradients(space.token_policy_loss, call, **form, **WEIGHTS)
    dead = ~call["mask"]
    with torch.no_grad():
        for name in ("hidden", "hidden_ref", "log_prob_old"):
            call[name][dead] = math.nan
        call["tokens"][dead] = -100
    out, grads = value_and_gradients(space.token_policy_loss, call, **form, **WEIGHTS)
    assert torch.equal(out.loss, clean.loss) and torch.equal(out.metrics.values, clean.metrics.values)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, expected, strict=True))
    assert not grads[0][dead].any() and out.metrics.as_dict()["invalid_sequences"] == 1  # the one without a token


@each_form
def test_gradcheck(form):
    call = draw(batch=2, tokens=3, width=4, vocabulary=7, dtype=torch.float64, guided=True)

    def loss(hidden, weight, hidden_uncond):
        given = call | {"hidden": hidden, "weight": weight, "hidden_uncond": hidden_uncond}
        return af.token_policy_loss(**given, **form, **WEIGHTS).loss

    assert torch.autograd.gradcheck(loss, [call[name] for name in ("hidden", "weight", "hidden_uncond")])


def test_log_probabilities_are_right_and_their_bits_make_the_first_ratio_one():
    call = draw(guided=True, reference=False)
    scored = {name: call[name] for name in ("hidden", "weight", "tokens", "hidden_uncond", "guidance")}
    log_prob, grads = value_and_gradients(af.token_log_prob, scored)
    exact, truths = value_and_gradients(af.reference.token_log_prob, wide(scored))
    assert relative_error(log_prob, exact) <= 1e-6
    assert all(relative_error(grad, truth) <= 1e-6 for grad, truth in zip(grads, truths, strict=True))
    first = af.token_policy_loss(**call | {"log_prob_old": log_prob}).metrics.as_dict()
    assert first["ratio_min"] == first["ratio_max"] == 1 and first["approx_kl"] == 0

    scored["tokens"] = scored["tokens"].clone()
    scored["tokens"][1, 2] = 19
    with torch.no_grad():
        scored["hidden"][2, 3, 0] = math.inf
    for space in (af, af.reference):
        log_prob, grads = value_and_gradients(space.token_log_prob, scored)
        assert log_prob.isnan().nonzero().tolist() == [[1, 2], [2, 3]]
        assert not grads[0][log_prob.isnan()].any() and all(grad.isfinite().all() for grad in grads)


def test_a_scored_reference_is_worth_its_hidden_states():
    call = draw()
    given = {"hidden": call["hidden_ref"], "weight": call["weight_ref"], "tokens": call["tokens"]}
    out, grads = value_and_gradients(af.token_policy_loss, call, kl_weight=0.7)
    call |= {"hidden_ref": None, "weight_ref": None, "log_prob_ref": af.token_log_prob(**given)}
    other, others = value_and_gradients(af.token_policy_loss, call, kl_weight=0.7)
    assert torch.equal(out.loss, other.loss) and out.metrics.as_dict()["mean_kl_ref"] > 0
    assert all(torch.equal(grad, each) for grad, each in zip(grads, others, strict=True))


@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_the_reference_gets_no_gradient(kl):
    call = draw()
    for name in ("hidden_ref", "weight_ref"):
        call[name].requires_grad_()
    af.token_policy_loss(**call, kl=kl, **WEIGHTS).loss.backward()
    assert call["hidden"].grad is not None and call["weight"].grad is not None
    assert call["hidden_ref"].grad is None and call["weight_ref"].grad is None


def test_a_frozen_head_is_the_references_too_and_costs_no_gradient():
    call = draw()
    call["weight"] = call["weight"].detach()
    own = call | {"weight_ref": call["weight"].clone()}
    shared = call | {"weight_ref": None}
    losses = [af.token_policy_loss(**each, kl="exact", **WEIGHTS).loss for each in (own, shared)]
    assert torch.equal(*losses)
    losses[1].backward()
    assert call["hidden"].grad.any()


def test_the_released_form_pushes_a_ratio_on_and_ppo_lets_it_be():
    """Trap 3 of the released trainer: at a ratio of 1.5 and an advantage of 1."""
    for surrogate, log_ratio, A, moves in (
        ("ppo", 0.4, 1.0, False), ("released", 0.4, 1.0, True),
        ("ppo", -0.7, -1.0, False), ("released", -0.7, -1.0, True),
        ("ppo", -0.7, 1.0, True), ("released", -0.7, 1.0, False),
        ("ppo", 0.1, 1.0, True), ("released", 0.1, 1.0, True),
    ):  # fmt: skip
        call = draw(batch=1, reference=False)
        old = af.token_log_prob(call["hidden"].detach(), call["weight"].detach(), call["tokens"]) - log_ratio
        call |= {"advantages": torch.tensor([A]), "log_prob_old": old}
        _, grads = value_and_gradients(af.token_policy_loss, call, surrogate=surrogate)
        assert bool(grads[0].any()) is moves, (surrogate, log_ratio, A)


def test_one_loss_of_two_advantages_is_two_losses():
    call = draw(batch=8)
    call = clipped_and_overflowing(call) | {"advantages": tuple(A.abs() for A in call["advantages"])}
    both, grads = value_and_gradients(af.token_policy_loss, call)
    parts = [value_and_gradients(af.token_policy_loss, call | {"advantages": A}) for A in call["advantages"]]
    torch.testing.assert_close(both.loss, sum(out.loss for out, _ in parts))
    for grad, first, second in zip(grads, *(part[1] for part in parts), strict=True):
        torch.testing.assert_close(grad, first + second)
