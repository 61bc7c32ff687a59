"""Methods of the reverse process in the trainer, and that every algorithm trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from advflow.algorithms import make_algorithm
from advflow.algorithms.batch import Experience, ReverseBatch
from advflow.processes.reverse import stochastic_steps
from advflow.run.trainer import Trainer
from advflow.samplers.dpm import MultistepDPM
from advflow.samplers.euler import euler_step
from advflow.settings.config import TrainConfig
from advflow.settings.data import RolloutConfig
from advflow.settings.methods import FlowCPSConfig, FlowDPPOConfig, FlowGRPOConfig, GRPOGuardConfig
from advflow.settings.optim import OptimConfig, RolloutPolicyConfig
from advflow.settings.processes import SDEConfig
from advflow.settings.registry import METHODS

import advflow_ext as af
from tests.trainer.runs import OF_FLOWS

Make = Callable[..., TrainConfig]
# On-policy as the published methods are: the rollout policy becomes the learner after every iteration.
ON_POLICY = RolloutPolicyConfig(rate=0.0)


def _trainer(small_config: Make, algorithm: str = "flow_grpo", **changes: object) -> Trainer:
    settings: dict[str, object] = {"algorithm": algorithm, "sde": SDEConfig(steps=2), "rollout_policy": ON_POLICY}
    return Trainer(small_config(**(settings | changes)))


@pytest.mark.parametrize("algorithm", OF_FLOWS)
def test_every_algorithm_moves_the_learner(small_config: Make, algorithm: str) -> None:
    trainer = _trainer(small_config, algorithm)
    before = [p.detach().clone() for p in trainer.policies.learner]
    row = trainer.iterate(0)
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["nonfinite_samples"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policies.learner, strict=True))
    if METHODS[algorithm].process == "reverse":
        # Before the first update both policies are the same network, run in different batches.
        assert row["first_max_log_ratio"] < 1e-5 and row["first_kl"] < 1e-9


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("flow_grpo", FlowGRPOConfig()),
        ("flow_cps", FlowCPSConfig()),
        ("grpo_guard", GRPOGuardConfig()),
        ("flow_dppo", FlowDPPOConfig()),
    ],
)
def test_a_time_weight_scales_the_gradient_of_its_step(algorithm: str, settings: Any) -> None:
    table, index = af.StepTable([0.9, 0.6, 0.3, 0.0]), torch.tensor([1])
    v_old, eps = torch.tensor([[[0.5, -1.0, 2.0]], [[1.0, 1.5, -0.5]]])

    def of(weight: str) -> torch.Tensor:
        v = v_old.clone().requires_grad_()
        method = make_algorithm(algorithm, replace(settings, time_weight=weight))
        loss = method.loss(ReverseBatch(v, v_old, None, eps, table, index, torch.ones(1))).loss
        return torch.autograd.grad(loss, v)[0]

    dt, sigma, kappa = (abs(float(each[1])) for each in (table.dt, table.sigma, table.kappa))
    for weight, factor in {"inverse_dt": 1 / dt, "sigma": sigma, "inverse_kappa": 1 / kappa}.items():
        torch.testing.assert_close(of(weight), factor * of("none"))


def test_windows() -> None:
    def steps(iteration: int = 0, seed: int = 0, **settings: object) -> list[int]:
        return stochastic_steps(SDEConfig(**settings), 10, iteration, seed)  # type: ignore[arg-type]

    assert steps(window="first", steps=9) == list(range(9))
    drawn = [steps(i, window="random", steps=3, within=5) for i in range(60)]
    assert all(len(set(s)) == 3 and s == sorted(s) and max(s) < 5 for s in drawn)
    assert len({tuple(s) for s in drawn}) == 10  # every choice of 3 out of 5
    for window in ("random_window", "branch"):
        drawn = [steps(i, window=window, steps=3, within=5) for i in range(40)]
        assert {s[0] for s in drawn} == {0, 1, 2} and all(s == list(range(s[0], s[0] + 3)) for s in drawn)
    slid = [steps(i, window="sliding", steps=4, shift_every=2)[0] for i in range(16)]
    assert slid == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0, 1, 1]
    assert steps(3, 1, window="random", steps=3) == steps(3, 1, window="random", steps=3)
    # As AdaGRPO's code has them, whatever the iteration.
    assert steps(3, window="branch", steps=1, within=8, branches=4) == [0, 2, 4, 6]


def test_a_window_must_leave_the_last_step_alone(small_config: Make) -> None:
    with pytest.raises(ValueError, match="sde.steps is 3; with rollout.steps=3 at most 2"):
        _trainer(small_config, sde=SDEConfig(steps=3))


def test_a_shared_anchor_needs_one_branch_and_whole_groups(small_config: Make) -> None:
    with pytest.raises(ValueError, match=r"sde.shared_anchor is True; accepted: False, or sde.window branch with"):
        SDEConfig(window="branch", steps=2, shared_anchor=True)
    with pytest.raises(ValueError, match=r"rollout.batch is 6; accepted: a multiple of rollout.images_per_prompt, 4"):
        _trainer(
            small_config,
            sde=SDEConfig(window="branch", steps=1, shared_anchor=True),
            rollout=RolloutConfig(prompts=3, images_per_prompt=4, steps=3, batch=6),
        )


def _rollout(trainer: Trainer) -> Experience:
    rollout, _ = trainer.roll_out(0)
    assert rollout.transitions is not None
    return rollout


def test_a_branch_starts_from_one_trajectory(small_config: Make) -> None:
    rollout = _rollout(_trainer(small_config, sde=SDEConfig(window="branch", steps=1, within=2)))
    groups = rollout.transitions.x[:, 0].unflatten(0, (-1, 4))  # type: ignore[union-attr]
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert not torch.equal(rollout.x0[0], rollout.x0[1])


@pytest.mark.parametrize(("shared", "batch"), [(False, 5), (True, 8)])
def test_groups_part_at_several_steps_in_turn(small_config: Make, shared: bool, batch: int) -> None:
    """Groups 0 and 2 at step 0, as where that is the one stochastic step; 1 and 3 at step 1, with the same noise."""
    rollout = RolloutConfig(prompts=4, images_per_prompt=4, steps=3, batch=batch)
    several = SDEConfig(window="branch", steps=1, within=2, branches=2, shared_anchor=shared)
    found = _rollout(_trainer(small_config, sde=several, rollout=rollout))
    steps = found.transitions
    assert steps is not None and steps.index.view(4, 4).tolist() == [[0] * 4, [1] * 4] * 2
    assert steps.table.stochastic_steps == (0, 1)
    first = _rollout(_trainer(small_config, sde=SDEConfig(steps=1, shared_noise=True), rollout=rollout))
    all_of_them = _rollout(_trainer(small_config, sde=SDEConfig(steps=2, shared_noise=True), rollout=rollout))
    for name in ("x", "v_old", "eps"):
        ours, theirs = (getattr(each.transitions, name)[:, 0].unflatten(0, (4, 4)) for each in (found, first))
        torch.testing.assert_close(ours[::2], theirs[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.x0[:4], first.x0[:4], rtol=1e-4, atol=1e-4)
    # A straight step from where the other groups' first began, one state a group, then noise that no other step had.
    begun, by = (getattr(all_of_them.transitions, name)[4:8, 0] for name in ("x", "v_old"))
    sigmas = [float(each) for each in steps.table.sigmas[:2]]
    torch.testing.assert_close(steps.x[4:8, 0], euler_step(begun, by, *sigmas), rtol=1e-4, atol=1e-5)
    assert torch.equal(steps.x[4:8, 0], steps.x[4:5, 0].expand(4, *steps.x.shape[2:]))
    assert len({row.sum().item() for row in steps.eps[:, 0]}) == 16
    torch.testing.assert_close(steps.eps[4:8, 0], all_of_them.transitions.eps[4:8, 0], rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]


def test_branches_need_a_window_that_has_as_many_steps() -> None:
    for settings in ({"window": "first"}, {"window": "branch", "steps": 2, "within": 4}, {"window": "branch"}):
        with pytest.raises(ValueError, match="sde.branches is 4; accepted: 1, or with sde.window branch and"):
            SDEConfig(**({"steps": 1, "branches": 4} | settings))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sde.branches is 0"):
        SDEConfig(window="branch", steps=1, within=8, branches=0)


def test_branches_are_shared_out_evenly(small_config: Make) -> None:
    with pytest.raises(ValueError, match=r"rollout.prompts is 3; accepted: a multiple of sde.branches, 2, or"):
        small_config(algorithm="flow_grpo", sde=SDEConfig(window="branch", steps=1, within=2, branches=2))


@pytest.mark.parametrize("branches", [1, 2])
def test_a_shared_anchor_is_one_pass_a_group_and_the_same_gradient(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, branches: int
) -> None:
    """4 groups of 4 in micro-batches of 5, with a pull to the reference: the weighted sum of a group's latents is all
    that its gradient depends on."""
    branch = SDEConfig(window="branch", steps=1, within=2, branches=branches, anchor="replay")
    rows, sizes = [], []
    for sde in (branch, replace(branch, shared_anchor=True)):
        rollout = RolloutConfig(prompts=4, images_per_prompt=4, steps=3, batch=8)
        trainer = _trainer(small_config, sde=sde, flow_grpo=FlowGRPOConfig(kl_weight=0.1), rollout=rollout)
        passes: list[int] = []
        velocity = trainer.policies.family.velocity
        monkeypatch.setattr(
            trainer.policies.family,
            "velocity",
            lambda *given, v=velocity, p=passes: p.append(len(given[1])) or v(*given),
        )
        rows.append(trainer.iterate(0))
        sizes.append(sum(passes))
    for name in ("reward", "loss", "grad_norm", "mean_kl_ref", "max_abs_log_ratio", "advantage_rms"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-5), name
    assert sizes[1] < 0.7 * sizes[0]


def test_a_broken_image_stands_for_its_group_where_that_was_whole(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image 0 breaks after its group has parted, all of the second group before: from the state that they share."""
    sde = SDEConfig(window="branch", steps=1, within=2, shared_anchor=True)
    trainer = _trainer(small_config, sde=sde, optim=OptimConfig(micro_batch=12))
    sample = trainer.process.sample

    def breaking(*given: Any) -> Any:
        x0, steps = sample(*given)
        if given[-1] == 0 and steps is not None:  # the first batch, of two groups
            x0[0], x0[4:], steps.x[4:], steps.v_old[4:] = math.nan, math.nan, math.inf, math.nan
        return x0, steps

    monkeypatch.setattr(trainer.process, "sample", breaking)
    rollout = _rollout(trainer)
    steps = rollout.transitions
    assert steps is not None and rollout.advantages.isnan().nonzero().flatten().tolist() == [0, 4, 5, 6, 7]
    assert not steps.x[4:8].any() and steps.x[0].any()
    batch = trainer.process._batch(rollout, steps, torch.arange(12), torch.zeros(12, dtype=torch.long))  # type: ignore[attr-defined]
    told = ~rollout.advantages.isnan()
    torch.testing.assert_close(batch.v[told], batch.v_old[told], rtol=1e-4, atol=1e-4)
    row = trainer.iterate(0)
    assert row["broken_images"] == 5 and row["skipped_steps"] == 0 and row["first_max_log_ratio"] < 1e-5


def test_stored_steps_lead_to_the_images(small_config: Make) -> None:
    """mean + sigma eps of the last stochastic step, then Euler: the latent that was scored."""
    trainer = _trainer(small_config)
    rollout = _rollout(trainer)
    steps = rollout.transitions
    assert steps is not None
    rows = steps.table.rows(steps.index.flatten(), torch.float64)
    c_x, c_v, sigma = (c.view(12, 2, 1, 1, 1) for c in (rows.c_x, rows.c_v, rows.sigma))
    after = c_x * steps.x + c_v * steps.v_old + sigma * steps.eps
    torch.testing.assert_close(after[:, 0].float(), steps.x[:, 1], rtol=1e-5, atol=1e-5)


def test_replaying_the_anchor_gives_what_was_stored(small_config: Make) -> None:
    rows = [_trainer(small_config, sde=SDEConfig(steps=2, anchor=anchor)).iterate(0) for anchor in ("stored", "replay")]
    assert rows[1]["first_max_log_ratio"] == 0 and rows[1]["first_kl"] == 0
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)


def test_later_updates_leave_the_anchor(small_config: Make) -> None:
    optim = OptimConfig(micro_batch=24, steps_per_iteration=2, warmup=0)
    row = _trainer(small_config, optim=optim, sde=SDEConfig(steps=2, epochs=2)).iterate(0)
    assert row["mean_kl_old"] > 10 * row["first_kl"]


def test_a_share_of_the_steps(small_config: Make) -> None:
    trainer = _trainer(small_config, sde=SDEConfig(steps=2, trained_share=0.5), optim=OptimConfig(micro_batch=100))
    rollout = _rollout(trainer)
    assert rollout.transitions is not None
    kept = trainer.process._trained(0, rollout, rollout.transitions)  # type: ignore[attr-defined]
    assert kept.index.shape == (12, 1) and set(kept.index.flatten().tolist()) == {0, 1}
    losses = [list(step) for step in trainer.process.steps(0, rollout)]
    assert [[loss.weight for loss in step] for step in losses] == [[1.0]]


def test_a_trust_region_below_the_rounding_is_warned_of(small_config: Make) -> None:
    trainer = _trainer(small_config)
    with pytest.warns(UserWarning, match="sde.anchor=replay"):
        trainer.process.diagnose(
            [(af.LossMetrics(torch.tensor([1e-3, 0.0]), ("max_abs_log_ratio", "mean_kl_old")), 1.0)]
        )


def test_images_of_nan_do_not_poison_the_run(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(small_config)
    starting_noise = trainer.process.starting_noise

    def with_nan(noise: torch.Tensor) -> torch.Tensor:
        noise = starting_noise(noise).clone()
        noise[0] = torch.nan
        return noise

    monkeypatch.setattr(trainer.process, "starting_noise", with_nan)
    row = trainer.iterate(0)
    assert row["broken_images"] == 1 and row["nonfinite_samples"] > 0 and row["skipped_steps"] == 0
    assert all(torch.isfinite(p).all() for p in trainer.policies.learner)


def test_dpm_is_of_second_order_and_beats_euler() -> None:
    """Data N(1.5, 0.5^2): v = E[noise - x0 | x] is linear in x, and x(0) is known from x(1)."""

    def final(steps: int, solver: str) -> float:
        grid = [1.0 - i / steps for i in range(steps)] + [0.0]
        step = MultistepDPM(grid) if solver == "dpm" else euler_step
        x = torch.tensor([[2.0]], dtype=torch.float64)
        for s, following in itertools.pairwise(grid):
            variance = 0.25 * (1 - s) ** 2 + s**2
            centred = x - 1.5 * (1 - s)
            v = s / variance * centred - (1.5 + 0.25 * (1 - s) / variance * centred)
            x = step(x, v, s, following)
        return abs(x.item() - (1.5 + 0.5 * 2.0))

    assert final(20, "dpm") < final(20, "euler") / 3
    assert 2.8 < final(40, "dpm") / final(80, "dpm") < 6.0
    assert 1.8 < final(40, "euler") / final(80, "euler") < 2.3


def test_euler_is_the_ode_of_a_step_table() -> None:
    sigmas = [1.0, 0.8, 0.45, 0.1, 0.0]
    table = af.StepTable(sigmas, sampler="ode")
    v, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        by_table = af.sde_step(v, x, table, step).x_next
        torch.testing.assert_close(euler_step(x, v, sigma, following), by_table, rtol=0, atol=2**-21)


def test_dpm_rollouts_train(small_config: Make) -> None:
    trainer = Trainer(small_config(rollout=RolloutConfig(prompts=3, images_per_prompt=4, steps=4, solver="dpm")))
    assert trainer.iterate(0)["broken_images"] == 0
