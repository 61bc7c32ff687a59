"""Number options of every op: Python numbers, 0-dim tensors and one value a sample, eager and compiled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import advflow_ext as af
from advflow_ext.doctor.every_op import OPTIONS, Drawing, Inputs, Outputs, run

SPACES = {"native": af, "reference": af.reference}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)

# Every number option, beside what must be given for it to count: two values of it.
NUMBERS: dict[str, dict[str, tuple[float, float]]] = {
    "advantage_flow_loss": {"gamma": (1.1, 1.7), "lam": (1e-3, 0.4), "beta": (1.0, 0.6)},
    "diffusion_nft_loss": {
        "beta": (1.0, 0.4), "adv_clip_max": (5.0, 0.5), "kl_weight": (1e-4, 0.3), "policy_weight": (1.0, 0.6),
    },
    "awm_loss": {
        "power": (0.25, 0.5), "clip": (0.2, 0.05), "ema_weight": (1.0, 0.4), "kl_weight": (0.2, 0.7),
        "policy_weight": (1.0, 0.6),
    },
    "awm_log_prob": {"power": (0.25, 0.5)},
    "flow_awr_loss": {"kl_weight": (0.2, 0.7), "policy_weight": (1.0, 0.6)},
    "reward_weighted_loss": {"tau": (0.5, 1.5), "kl_weight": (1.0, 0.3), "policy_weight": (1.0, 0.6)},
    "flow_grpo_loss": {"clip": (0.2, 0.01), "kl_weight": (0.04, 0.4), "policy_weight": (1.0, 0.6)},
    "flow_cps_loss": {"clip": (0.2, 0.01), "kl_weight": (0.04, 0.4), "policy_weight": (1.0, 0.6)},
    "grpo_guard_loss": {"clip": (0.2, 0.01), "kl_weight": (0.04, 0.4), "policy_weight": (1.0, 0.6)},
    "flow_dppo_loss": {
        "threshold": (1e-6, 1e-3), "step_size": (1e-4, 1e-2), "kl_weight": (0.04, 0.4), "policy_weight": (1.0, 0.6),
    },
    "distillation_loss": {"policy_weight": (1.0, 0.6)},
}  # fmt: skip
NAMES = tuple(NUMBERS)
OPTION_PAIRS = [(name, option) for name in NAMES for option in NUMBERS[name]]
SIDE = {"step_size": {"mask": "predictive"}}


def inputs_of(name: str, **more: Any) -> Inputs:
    """Every tensor an option needs, and none of the options."""
    given = Drawing((4, 3, 5), torch.float32, "cpu").inputs(name)
    given.pop("gamma", None)
    return {**given, **({"mask": "predictive"} if name == "flow_dppo_loss" else {}), **more}


def call(name: str, inputs: Inputs, space: Any, op: Any = None) -> Outputs:
    """``run`` without the options that every_op chooses."""
    chosen = OPTIONS.pop(name, {})
    try:
        return run(name, inputs, space, op)
    finally:
        if chosen:
            OPTIONS[name] = chosen


def assert_same(one: Outputs, other: Outputs, **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], **tolerance)


@each_space
@pytest.mark.parametrize(("name", "option"), OPTION_PAIRS)
@pytest.mark.parametrize("kind", ["0-dim", "0-dim half", "per sample"])
def test_a_tensor_is_the_number_it_holds(space, name, option, kind):
    value = NUMBERS[name][option][1]
    tensor = {
        "0-dim": torch.tensor(value, dtype=torch.float64),
        "0-dim half": torch.tensor(0.25, dtype=torch.float16),
        "per sample": torch.full((4,), value, dtype=torch.float64),
    }[kind]
    number = float(tensor.flatten()[0])
    inputs = inputs_of(name, **SIDE.get(option, {}))
    if option != "step_size" and name == "flow_dppo_loss":
        inputs["step_size"] = 1e-4
    assert_same(
        call(name, inputs | {option: tensor}, space),
        call(name, inputs | {option: number}, space),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@each_space
@pytest.mark.parametrize(("name", "option"), OPTION_PAIRS)
def test_every_sample_has_its_own_value(space, name, option):
    low, high = NUMBERS[name][option]
    values = torch.tensor([low, high, high, low], dtype=torch.float64)
    inputs = inputs_of(name)
    if name == "flow_dppo_loss" and option != "step_size":
        inputs["step_size"] = 1e-4
    mixed = call(name, inputs | {option: values}, space)
    for value in (low, high):
        rows = values == value
        alone = call(name, inputs | {option: value}, space)
        for key in mixed.keys() - {"metrics"}:
            torch.testing.assert_close(mixed[key][rows], alone[key][rows], rtol=1e-5, atol=1e-6)


COMPILED = ("numbers", "numbers, dynamic", "tensors")


# The reference with numbers alone, whose second graph is dynamic, and one loss of each family: seconds each.
@pytest.mark.parametrize(
    ("name", "space", "mode"),
    [
        pytest.param(name, SPACES[space], mode, id=f"{name}-{space}-{mode}", marks=[pytest.mark.slow] * apart)
        for space in SPACES
        for mode in COMPILED
        for name in NAMES
        for apart in [space == "reference" and (mode != "numbers" or name not in ("awm_loss", "flow_dppo_loss"))]
    ],
)
def test_options_that_change_at_every_step_compile_once(space, name, mode):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        getattr(space, name), fullgraph=True, dynamic=True if "dynamic" in mode else None, backend="aot_eager"
    )
    inputs = inputs_of(name)
    for step in range(5):
        numbers = {key: low + (high - low) * step / 4 for key, (low, high) in NUMBERS[name].items()}
        given: dict[str, Any] = dict(numbers)
        if mode == "tensors":
            given = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
        outputs = call(name, inputs | given, space, compiled)
        assert_same(outputs, call(name, inputs | numbers, space), rtol=1e-5, atol=1e-6)
    # A number is taken for a constant until it first changes.
    assert counters["stats"]["unique_graphs"] <= (2 if mode == "numbers" else 1)


@pytest.mark.parametrize("function", [af.group_advantages, af.softmax_advantages])
def test_advantages_with_an_annealed_clip_compile_once(function):
    torch._dynamo.reset()
    counters.clear()
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for clip in (1.0, 0.9, 0.7, 0.4):
        for eps in (1e-4, 1e-3):
            torch.testing.assert_close(
                compiled(rewards, 4, clip=clip, eps=eps), function(rewards, 4, clip=clip, eps=eps)
            )
    assert counters["stats"]["unique_graphs"] <= 3
    half = torch.tensor(0.5)
    torch.testing.assert_close(function(rewards, 4, clip=half), function(rewards, 4, clip=0.5))
    with pytest.raises(
        ValueError, match=r"clip has shape \[8\]; accepted are a number above 0 and a tensor of shape \[\]"
    ):
        function(rewards, 4, clip=torch.ones(8))


# ---------------------------------------------------------------------------------------------------------------------
# What is not a number of that option


BAD = [float("nan"), float("inf"), -1.0, 1e300, 10**400, True, "1", None, 1j]


@each_space
@pytest.mark.parametrize(("name", "option"), OPTION_PAIRS)
def test_what_is_no_such_number_is_refused(space, name, option):
    inputs = inputs_of(name) | ({"step_size": 1e-4} if name == "flow_dppo_loss" else {})
    for value in BAD:
        if option == "gamma" and value == -1.0:
            continue
        with pytest.raises(ValueError, match=rf"{option} is .*; accepted"):
            call(name, inputs | {option: value}, space)
    for tensor in (torch.tensor(float("nan")), torch.tensor(-1.0), torch.full((4,), -1.0)):
        if option == "gamma" and tensor.isfinite().all():
            continue
        with pytest.raises(ValueError, match=rf"{option}(\[0\])? is (nan|-1); accepted is a finite number"):
            call(name, inputs | {option: tensor}, space)
    for shape in ((3,), (1, 4), (1,)):
        with pytest.raises(ValueError, match=rf"{option} has shape \[.*\]; accepted are a number.*\[\] or \[4\]"):
            call(name, inputs | {option: torch.ones(shape)}, space)
    with pytest.raises(ValueError, match=rf"{option} has dtype torch.int64; accepted are a number"):
        call(name, inputs | {option: torch.tensor(1)}, space)
    with pytest.raises(ValueError, match=rf"{option} is on meta; accepted is the device of v, cpu"):
        call(name, inputs | {option: torch.ones(4, device="meta")}, space)


@each_space
@pytest.mark.parametrize(("name", "option"), [pair for pair in OPTION_PAIRS if pair[0] != "awm_log_prob"])
def test_a_value_that_is_not_finite_drops_its_sample_alone(space, name, option):
    low = NUMBERS[name][option][0]
    inputs = inputs_of(name) | ({"step_size": 1e-4} if name == "flow_dppo_loss" else {})
    whole = call(name, inputs | {option: torch.full((4,), low)}, space)
    values = torch.full((4,), low)
    values[1] = torch.nan
    outputs = call(name, inputs | {option: values}, space)
    names = getattr(space, name)(**(inputs | {option: values})).metrics.names
    assert outputs["values"][1] == 0 and not outputs["grad_v"][1].any()
    assert outputs["metrics"][names.index("nonfinite_samples")] == 1 and outputs["metrics"].isfinite().all()
    others = torch.tensor([0, 2, 3])
    assert torch.equal(outputs["values"][others], whole["values"][others])
    assert torch.equal(outputs["grad_v"][others], whole["grad_v"][others])


# Every gamma has a meaning. The reference with the first of each loss's options alone: seconds each.
@pytest.mark.parametrize(
    ("space", "name", "option"),
    [
        pytest.param(SPACES[space], name, option, id=f"{space}-{name}-{option}", marks=[pytest.mark.slow] * apart)
        for space in SPACES
        for name, option in OPTION_PAIRS
        for apart in [space == "reference" and option != next(key for key in NUMBERS[name] if key != "gamma")]
        if name != "awm_log_prob" and option != "gamma"
    ],
)
def test_a_tensor_out_of_range_that_cannot_be_read_drops_its_samples(space, name, option):
    inputs = inputs_of(name) | ({"step_size": 1e-4} if name == "flow_dppo_loss" else {})
    torch._dynamo.reset()
    compiled = torch.compile(getattr(space, name), fullgraph=True, backend="aot_eager")
    outputs = call(name, inputs | {option: torch.tensor(-1.0)}, space, compiled)
    assert not outputs["values"].any() and not outputs["grad_v"].any()


@each_space
@pytest.mark.parametrize(
    ("name", "weight", "anchor"),
    [
        ("awm_loss", "kl_weight", "v_ref"),
        ("flow_awr_loss", "kl_weight", "v_ref"),
        *[(name, "kl_weight", "v_ref") for name in ("flow_grpo_loss", "flow_cps_loss", "grpo_guard_loss")],
        ("flow_dppo_loss", "kl_weight", "v_ref"),
    ],
)
def test_a_weight_without_its_policy_is_refused(space, name, weight, anchor):
    inputs = inputs_of(name) | {anchor: None} | ({"step_size": 1e-4} if name == "flow_dppo_loss" else {})
    call(name, inputs, space)
    with pytest.raises(ValueError, match=rf"{weight} is 0.5 without {anchor}; accepted are 0, or {anchor} beside it"):
        call(name, inputs | {weight: 0.5}, space)


@each_space
@pytest.mark.parametrize("name", ["advantage_flow_loss", "diffusion_nft_loss", "awm_loss", "reward_weighted_loss"])
def test_a_tensor_weight_without_its_policy_is_refused(space, name):
    weight = "lam" if name == "advantage_flow_loss" else "kl_weight"
    with pytest.raises(ValueError, match=rf"{weight} is a tensor of shape \[\] without v_ref"):
        call(name, inputs_of(name) | {"v_ref": None, weight: torch.tensor(0.5)}, space)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of clips, weights of the policy term and of time


CLIPPED = ("awm_loss", "flow_grpo_loss", "flow_cps_loss", "grpo_guard_loss")


@each_space
@pytest.mark.parametrize("name", CLIPPED)
def test_a_pair_of_clips_bounds_either_side(space, name):
    inputs = inputs_of(name)
    wide = inputs | {"clip": (0.5, 0.6)}
    for narrow, side in (((1e-7, 0.6), "below"), ((0.5, 1e-7), "above")):
        one, other = call(name, inputs | {"clip": narrow}, space), call(name, wide, space)
        changed = (one["grad_v"] != other["grad_v"]).flatten(1).any(1)
        # A ratio below 1 is held for a negative advantage, one above 1 for a positive advantage.
        sign = inputs["advantages"] < 0 if side == "below" else inputs["advantages"] > 0
        assert not (changed & ~sign).any(), side
    assert_same(call(name, inputs | {"clip": (0.3, 0.3)}, space), call(name, inputs | {"clip": 0.3}, space))
    for pair, sentence in (((0.1,), "a pair"), ((0.1, 0.2, 0.3), "a pair"), ((-0.1, 0.2), r"clip\[0\] is -0.1")):
        with pytest.raises(ValueError, match=sentence):
            call(name, inputs | {"clip": pair}, space)


@each_space
def test_a_clip_pair_gives_ppo_s_objective(space):
    """By hand, for ratios on both sides of both bounds."""
    log_ratio = torch.tensor([0.3, 0.3, -0.4, -0.4, 0.05, -0.05]).double()
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -2.0]).double()
    table = af.StepTable([1.0, 0.8, 0.5, 0.2])
    index = torch.full((6,), 1)
    kappa = float(table.kappa[1])
    # One element: log r = kappa eps d - kappa^2 d^2 / 2 with d = 1 is solved for eps.
    v_old = torch.zeros(6, 1).double()
    v = torch.ones(6, 1).double().requires_grad_()
    eps = ((log_ratio + kappa**2 / 2) / kappa)[:, None]
    out = space.flow_grpo_loss(v, v_old, eps, table, index, A, clip=(0.2, 0.1), reduction="none")
    ratio = log_ratio.exp()
    expected = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.1))
    torch.testing.assert_close(out.loss, expected)
    (grad,) = torch.autograd.grad(out.loss.sum(), v)
    active = ~(((A > 0) & (ratio > 1.1)) | ((A < 0) & (ratio < 0.8)))
    torch.testing.assert_close(grad[:, 0], -A * ratio * active * kappa * (eps[:, 0] - kappa))


REVERSE = ("flow_grpo_loss", "flow_cps_loss", "grpo_guard_loss", "flow_dppo_loss")


@each_space
@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.parametrize("time_weight", ["none", "inverse_dt", "sigma", "inverse_kappa"])
def test_time_weights_are_policy_weights_of_the_step(space, name, time_weight):
    inputs = inputs_of(name) | ({"step_size": 1e-4} if name == "flow_dppo_loss" else {})
    rows = inputs["table"].rows(inputs["index"], torch.float64)
    weight = {
        "none": torch.ones(4, dtype=torch.float64),
        "inverse_dt": -1 / rows.dt,
        "sigma": rows.sigma,
        "inverse_kappa": 1 / rows.kappa.abs(),
    }[time_weight]
    assert_same(
        call(name, inputs | {"time_weight": time_weight, "kl_weight": 0.1}, space),
        call(name, inputs | {"time_weight": "none", "policy_weight": weight, "kl_weight": 0.1}, space),
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip


@each_space
@pytest.mark.parametrize("name", [name for name in NAMES if "policy_weight" in NUMBERS[name]])
def test_the_policy_weight_leaves_the_anchors(space, name):
    """The gradient is linear in it, and without it what the anchors pull."""
    inputs = inputs_of(name) | ({"step_size": 1e-4} if name == "flow_dppo_loss" else {})
    if name != "distillation_loss":
        inputs["kl_weight"] = 0.3
    none, one, two = (call(name, inputs | {"policy_weight": w}, space)["grad_v"] for w in (0.0, 1.0, 2.0))
    torch.testing.assert_close(two - one, one - none, rtol=1e-4, atol=1e-6)
    if name not in ("distillation_loss", "awm_loss"):
        v, p = inputs["v"].detach(), inputs["v_ref"]
        scale = 0.3 * torch.ones(4)
        if name in REVERSE:
            scale = 0.3 * inputs["table"].rows(inputs["index"]).kappa.square() / 2
        torch.testing.assert_close(none, scale[:, None, None] * 2 / 15 * (v - p), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Several draws an image


@each_space
@pytest.mark.parametrize("weighting", ["ghuber", "adaptive"])
def test_draws_share_one_ratio_of_the_mean(space, weighting):
    """The gradient of the mean over rows is that of the mean over images of V-GRPO's objective, by autograd."""
    generator = torch.Generator().manual_seed(0)
    v, x0, noise = torch.randn(3, 6, 8, generator=generator, dtype=torch.float64).unbind()
    v = v.requires_grad_()
    t = 0.1 + 0.9 * torch.rand(6, generator=generator, dtype=torch.float64)
    A = torch.tensor([0.7, -1.2]).double().repeat_interleave(3)
    old = af.awm_log_prob(v.detach(), x0, noise, t, weighting=weighting) + 0.3 * torch.randn(6, generator=generator)
    out = space.awm_loss(v, x0, noise, t, A, log_prob_old=old, weighting=weighting, draws=3, clip=(0.1, 0.2))
    (grad,) = torch.autograd.grad(out.loss, v)

    error = (v - (noise - x0)).square().mean(1)
    if weighting == "adaptive":
        scale = (t * (v - (noise - x0)).abs().mean(1)).clamp(min=1e-5).detach()
        log_prob = -t.square() * error / scale
    else:
        log_prob = -4 * t * ((error + 1e-10) ** 0.25 - 1e-10**0.25)
    ratio = (log_prob - old).view(2, 3).mean(1).exp()
    image = A[::3]
    loss = torch.maximum(-image * ratio, -image * ratio.clamp(0.9, 1.2)).mean()
    (expected,) = torch.autograd.grad(loss, v)
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(grad, expected)


@each_space
def test_draws_are_checked_and_contained(space):
    inputs = inputs_of("awm_loss")
    inputs["advantages"] = torch.tensor([0.5, 0.5, -1.0, -1.0])
    call_it = space.awm_loss
    for draws in (0, True, 2.0):
        with pytest.raises(ValueError, match=rf"draws is {draws!r}; accepted is an integer of at least 1"):
            call_it(**inputs, draws=draws)
    with pytest.raises(
        ValueError, match=r"advantages has shape \[4\]; accepted is \[N\*draws\], a multiple of draws 3"
    ):
        call_it(**inputs, draws=3)
    uneven = inputs | {"advantages": torch.tensor([0.5, 0.6, 1.0, 1.0])}
    with pytest.raises(ValueError, match=r"advantages\[1\] is 0.6 beside 0.5 of the same image"):
        call_it(**uneven, draws=2)
    whole = run_rows(space, inputs)
    broken = dict(inputs)
    broken["x0"] = inputs["x0"].clone()
    broken["x0"][1, 0, 0] = math.nan
    loss, grad, count = run_rows(space, broken)
    assert count == 2 and not loss[:2].any() and not grad[:2].any()
    assert torch.equal(loss[2:], whole[0][2:]) and torch.equal(grad[2:], whole[1][2:])


def run_rows(space: Any, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, float]:
    out = space.awm_loss(**inputs, draws=2, reduction="none")
    (grad,) = torch.autograd.grad(out.loss.sum(), inputs["v"])
    return out.loss.detach(), grad, out.metrics.as_dict()["nonfinite_samples"]
