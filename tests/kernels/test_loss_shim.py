"""The CUDA source of whole losses, against their plain PyTorch form in float64.

Runs on the launch shim everywhere and, unchanged, on a GPU (``-m gpu``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import advflow_ext as af
from advflow_ext import _native
from advflow_ext.losses import LOSSES
from advflow_ext.ops import _forward, _reverse
from tests.kernels.kernel_harness import Inputs, LossCall, LossKernels, ResidualKernels

pytestmark = [
    pytest.mark.skipif(_native.module is None, reason="nothing compiled says what a loss hands to the core"),
    pytest.mark.filterwarnings("ignore:.*unbounded below:UserWarning"),
]

# Around a warp of samples, the block's rows, and its second turn.
batches = st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 257, 300]))
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("advantage_flow_loss", {}),
    ("advantage_flow_loss", {"weighting": "velocity", "gamma": "1-A"}),
    ("advantage_flow_loss", {"weighting": "adaptive", "gamma": "beta(beta-A)", "beta": 0.4}),
    ("diffusion_nft_loss", {"beta": 0.3, "adv_clip_max": 0.5, "kl_weight": 0.2, "policy_weight": 0.7}),
    *[("diffusion_nft_loss", {"adaptive": False, "mode": mode}) for mode in ("positive", "negative", "one", "binary")],
    *[("flow_awr_loss", {"kl_weight": 0.3, "weighting": how}) for how in ("adaptive", "prediction", "velocity")],
    ("reward_weighted_loss", {"tau": 0.8, "policy_weight": 0.7}),
    ("reward_weighted_loss", {"method": "linear"}),
    ("flow_grpo_loss", {"clip": (0.2, 0.1), "kl_weight": 0.04}),
    ("flow_grpo_loss", {"clip": 0.05, "kl_weight": 0.3, "kl_convention": "dt", "time_weight": "sigma"}),
    ("flow_cps_loss", {"clip": 0.05, "kl_weight": 0.3, "kl_convention": "two_sigma_squared"}),
    ("grpo_guard_loss", {"clip": 0.05, "kl_weight": 0.3}),
    ("flow_dppo_loss", {"threshold": 0.01, "kl_weight": 0.3, "time_weight": "inverse_kappa"}),
    ("flow_dppo_loss", {"direction": "log_ratio_minus_kl", "mask": "predictive", "step_size": 1e-3}),
]
Kernels = tuple[ResidualKernels, LossKernels]
Arguments = dict[str, Any]
TABLE = af.StepTable([1.0, 0.8, 0.5, 0.2, 0.0], sampler="cps")


def draw(name: str, options: Arguments, batch: int, elements: int, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    latents = {key: torch.randn(batch, elements, generator=generator) for key in LOSSES[name].latents}
    t, A = torch.rand(2, batch, generator=generator).unbind()
    scores = {"rewards" if name == "reward_weighted_loss" else "advantages": 2 * A - 1}
    if LOSSES[name].family == "forward":
        return {**latents, **scores, "t": 0.05 + 0.95 * t, **options}
    latents["v"] = latents["v_old"] + 0.3 * latents["v"]
    steps = torch.tensor(TABLE.stochastic_steps)
    index = steps[torch.randint(len(steps), (batch,), generator=generator)]
    return {**latents, **scores, "table": TABLE, "index": index, **options}


def call_of(name: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> tuple[Inputs, LossCall]:
    """What the public loss hands to the core."""
    calls: list[tuple[Any, ...]] = []
    room, entry = (_forward, "forward_loss") if LOSSES[name].family == "forward" else (_reverse, "reverse_loss")
    core = getattr(room, entry)

    def recorded(*given: Any) -> Any:
        calls.append(given)
        return core(*given)

    with monkeypatch.context() as patch:
        patch.setattr(room, entry, recorded)
        getattr(af, name)(**arguments)
    ((loss, latents, *drawn, advantages, numbers, choices, reduction),) = calls
    module = _native.module
    assert module is not None
    transitions, *_, metrics = module.LOSSES[loss]
    mix = numbers[0] if loss == "diffusion_nft" and choices[1] else 0.0
    if transitions:
        v, eps, v_old, v_ref = latents
        inputs = Inputs(v, eps, None, v_old, v_ref, target_is_eps=True)
    else:
        inputs = Inputs(*latents, mix=mix)
    t, index, steps = (None, *drawn) if transitions else (*drawn, None, None)
    place = list(module.LOSSES).index(loss)
    call = LossCall(place, advantages, t, index, steps, list(numbers), list(choices), reduction, metrics)
    return inputs, call


def run(kernels: Kernels, inputs: Inputs, call: LossCall) -> list[torch.Tensor]:
    residual, loss = kernels

    def there(value: Any) -> Any:
        return value.to(residual.device) if isinstance(value, torch.Tensor) else value

    latents = inputs.map(there)
    moved = replace(call, **{key: there(value) for key, value in vars(call).items()})
    moved = replace(moved, numbers=[there(number) for number in call.numbers])
    value, coef, metrics = loss.loss(moved, residual.partials(latents), inputs.shape[1])
    return [x.cpu() for x in (value, metrics, residual.grad(latents, coef))]


def truth(name: str, arguments: Arguments) -> list[torch.Tensor]:
    wide = {
        key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in arguments.items()
    }
    v = wide["v"].requires_grad_()
    out = getattr(af.reference, name)(**wide)
    (grad,) = torch.autograd.grad(out.loss.sum(), v)
    return [out.loss.detach(), out.metrics.values, grad]


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    variant=st.sampled_from(VARIANTS),
    batch=batches,
    elements=st.sampled_from([1, 33, 300]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    bad=st.lists(st.tuples(st.sampled_from(["v", "v_ref", "t"]), st.integers(0, 999)), max_size=3),
    seed=st.integers(0, 2**31),
)
@example(variant=VARIANTS[0], batch=0, elements=3, reduction="mean", bad=[], seed=0)
@example(variant=VARIANTS[0], batch=2, elements=9000, reduction="none", bad=[], seed=0)
@example(
    variant=("reward_weighted_loss", {"method": "best", "group_size": 3}),
    batch=129, elements=33, reduction="mean", bad=[("v", 5)], seed=0,
)  # fmt: skip
def test_matches_the_plain_form(
    loss_kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    variant: tuple[str, Arguments],
    batch: int,
    elements: int,
    reduction: str,
    bad: list[tuple[str, int]],
    seed: int,
) -> None:
    name, options = variant
    arguments = draw(name, options, batch, elements, seed) | {"reduction": reduction}
    for tensor, sample in bad if batch else []:
        if tensor in arguments:
            arguments[tensor][sample % batch] = math.nan if sample % 2 else math.inf
    found = run(loss_kernels, *call_of(name, arguments, monkeypatch))
    for ours, theirs in zip(found, truth(name, arguments), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-5, atol=5e-6)


MAKES: list[Callable[[float], torch.Tensor]] = [
    lambda x: torch.tensor(x, dtype=torch.float64),
    lambda x: torch.full((40,), x, dtype=torch.float64),
    lambda x: torch.full((40, 2), x, dtype=torch.float64)[:, 1],
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_tensors_are_the_numbers_they_hold(
    loss_kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str, options: Arguments
) -> None:
    inputs, call = call_of(name, draw(name, options, 40, 33, 0), monkeypatch)
    expected = run(loss_kernels, inputs, call)
    for make in MAKES:
        tensors = replace(call, numbers=[make(float(number)) for number in call.numbers])
        assert all(map(torch.equal, run(loss_kernels, inputs, tensors), expected))
    halves = replace(call, numbers=[0.5 for _ in call.numbers])
    single = replace(call, numbers=[torch.full((40,), 0.5) for _ in call.numbers])
    assert all(map(torch.equal, run(loss_kernels, inputs, single), run(loss_kernels, inputs, halves)))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300])
def test_a_number_without_a_meaning_drops_its_sample(
    loss_kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str, options: Arguments, value: float
) -> None:
    inputs, call = call_of(name, draw(name, options, 3, 33, 0) | {"reduction": "none"}, monkeypatch)
    whole = run(loss_kernels, inputs, call)
    for place, number in enumerate(call.numbers):
        harmless = {"advantage_flow_loss": [0], "reward_weighted_loss": [3], "flow_dppo_loss": [3]}.get(name, [])
        if value == -1.0 and place in harmless:
            continue  # every gamma has a meaning; a size of groups or of a step that is not asked for has none
        values = torch.full((3,), float(number), dtype=torch.float64)
        values[1] = value
        numbers = [values if k == place else other for k, other in enumerate(call.numbers)]
        loss, metrics, grad = run(loss_kernels, inputs, replace(call, numbers=numbers))
        assert loss[1] == 0 and not grad[1].any() and metrics.isfinite().all(), place
        assert torch.equal(loss[[0, 2]], whole[0][[0, 2]]) and torch.equal(grad[[0, 2]], whole[2][[0, 2]]), place


def test_a_step_that_cannot_be_trained_drops_its_transition(
    loss_kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, call = call_of("flow_grpo_loss", draw("flow_grpo_loss", {}, 6, 33, 0) | {"reduction": "none"}, monkeypatch)
    whole = run(loss_kernels, inputs, call)
    assert call.index is not None
    wrong = torch.tensor([-(2**63), -1, TABLE.steps - 1, TABLE.steps, 2**63 - 1])
    index = torch.cat([wrong, call.index[5:]])
    loss, metrics, grad = run(loss_kernels, inputs, replace(call, index=index))
    assert not loss[:5].any() and not grad[:5].any() and metrics.isfinite().all()
    assert torch.equal(loss[5], whole[0][5]) and torch.equal(grad[5], whole[2][5])
    numbers = dict(zip(af.flow_grpo_loss(**draw("flow_grpo_loss", {}, 1, 3, 0)).metrics.names, metrics, strict=True))
    assert numbers["invalid_steps"] == 5 and numbers["nonfinite_samples"] == 0


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_same_bits_every_time_and_in_every_batch(
    loss_kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str, options: Arguments
) -> None:
    arguments = draw(name, options, 260, 33, 0) | {"reduction": "none"}
    first = run(loss_kernels, *call_of(name, arguments, monkeypatch))
    assert all(map(torch.equal, first, run(loss_kernels, *call_of(name, arguments, monkeypatch))))
    rows = slice(126, 130)
    alone = {key: x[rows].clone() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    loss, _, grad = run(loss_kernels, *call_of(name, alone, monkeypatch))
    assert torch.equal(loss, first[0][rows]) and torch.equal(grad, first[2][rows])
