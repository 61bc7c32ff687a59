"""Which metrics of a run are shown, under which names, and how many iterations become few enough points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from advflow.report.charts import Values
from advflow.report.data import Row, number

MOST_POINTS = 500  # of one line; a longer run is summed up, so that the page stays small


@dataclass(frozen=True)
class Panel:
    """One metric. `worst` picks the value that stands for several iterations; the mean does where there is none."""

    key: str
    title: str
    note: str
    unit: str = ""
    smoothed: bool = True
    worst: Callable[[Sequence[float]], float] | None = None
    fault: bool = False
    """Whether anything but zero means that something went wrong."""


GROUPS: dict[str, list[Panel]] = {
    "Objective": [
        Panel("loss", "Loss", "mean per sample"),
        Panel("policy_term", "Policy term", "the advantage-weighted part of the loss"),
        Panel("target_error", "Target error", "mean square of v \N{MINUS SIGN} u"),
        Panel("grad_norm", "Gradient norm", "before clipping"),
        Panel("lr", "Learning rate", "of the last optimiser step", smoothed=False),
    ],
    "Distance from other policies": [
        Panel("rollout_deviation", "Rollout deviation", "mean square of v \N{MINUS SIGN} v_old"),
        Panel("learner_move", "Learner's move", "in an iteration, in target errors"),
        Panel("gamma", "Gamma", "weight of the rollout policy, by target_move", smoothed=False),
        Panel("reference_deviation", "Reference deviation", "mean square of v \N{MINUS SIGN} v_ref"),
        Panel("reference_scale", "Reference pull", "weight over what was set; see target_deviation"),
        Panel("rollout_policy_rho", "Rollout policy rho", "share of itself the rollout policy keeps", smoothed=False),
    ],
    "Trust region": [
        Panel("mean_log_ratio", "Mean log-ratio", "of sampler steps, or tokens, under learner and rollout policy"),
        Panel("max_abs_log_ratio", "Largest |log-ratio|", "", worst=max),
        Panel("mean_kl_old", "KL to the rollout policy", "mean over the latent"),
        Panel("mean_kl_ref", "KL to the reference", "mean over the latent"),
        Panel("masked_samples", "Masked steps", "clipped, or outside the trust region; of all in the iteration"),
        Panel("first_max_log_ratio", "First |log-ratio|", "before any update; above 0 is rounding", worst=max),
        Panel("first_kl", "First KL", "before any update; above 0 is rounding", worst=max),
        Panel("clipped_fraction", "Clipped share", "of samples whose ratio is held by the clip"),
    ],
    "Rewards and advantages": [
        Panel("score", "Training score", "of the rollout's images"),
        Panel("uniform_groups", "Uniform groups", "share of prompts whose images all got one reward"),
        Panel("advantage_rms", "Advantage RMS", "after normalising and clipping"),
        Panel("mean_abs_advantage", "Mean |advantage|", "over usable samples"),
        Panel("mean_advantage", "Mean advantage", "over usable samples; near zero is right"),
        Panel(
            "advantage_group_mean_worst",
            "Worst group mean",
            "largest |mean advantage| of a prompt; near zero is right",
            worst=max,
        ),
        Panel("min_curvature", "Smallest curvature", "of a sample's loss in v", worst=min),
    ],
    "Tokens": [
        Panel("mean_entropy", "Entropy", "of a token, in nats"),
        Panel("entropy_share", "Share of entropy", "of the logarithm of the vocabulary"),
        Panel("entropy_weight", "Weight of the entropy", "in the loss", smoothed=False),
        Panel("loo_fid", "Leave-one-out FID", "of the moving distribution of images to real ones", smoothed=False),
    ],
    "Curriculum": [
        Panel("candidate_reward", "Candidates' reward", "mean over one image a candidate prompt"),
        Panel("capability_mean", "Capability", "moving average of that", smoothed=False),
        Panel("capability_std", "Capability deviation", "moving one, between candidates", smoothed=False),
        Panel("kept_distance", "Distance of kept prompts", "from the capability, in its deviations"),
        Panel("two_sided_groups", "Two-sided groups", "share with rewards on both sides of the capability"),
        Panel("sign_flips", "Sign flips", "share of images whose advantage changes its sign by it"),
    ],
    "Time": [
        Panel("seconds_rollout", "Rollout", "sampling, decoding and scoring", unit=" s"),
        Panel("seconds_train", "Update", "optimiser steps", unit=" s"),
        Panel("images_per_second", "Images per second", "drawn in an iteration, over the seconds of both"),
        Panel("gigabytes", "GPU memory", "the most that tensors held", unit=" GB", smoothed=False),
    ],
    "Faults": [
        Panel("nonconvex_samples", "Nonconvex samples", "whose loss curves down", fault=True),
        Panel("nonfinite_samples", "Non-finite samples", "dropped by the loss, of all in the iteration", fault=True),
        Panel("invalid_timesteps", "Invalid timesteps", "dropped: t outside (0, 1]", fault=True),
        Panel("invalid_steps", "Invalid steps", "dropped: not a stochastic step of the sampler", fault=True),
        Panel("invalid_sequences", "Invalid sequences", "dropped: without a token that counts", fault=True),
        Panel("broken_images", "Broken images", "not finite", fault=True),
        Panel("unscored_images", "Unscored images", "whose reward was not finite", fault=True),
        Panel("unscored_candidates", "Unscored candidates", "whose one image has no finite reward", fault=True),
        Panel("skipped_steps", "Skipped steps", "gradient not finite", fault=True),
    ],
}
_SHOWN_ELSEWHERE = ("iteration", "reward")
_EACH_REWARD, _EACH_UNSCORED = "reward/", "unscored/"  # of several rewards, followed by its name


def grouped_panels(rows: Sequence[Row]) -> dict[str, list[Panel]]:
    """The panels of every metric that is in `rows`; those unknown here come last, under their own names."""
    present = dict.fromkeys(key for row in rows for key in row)
    groups = {name: [panel for panel in panels if panel.key in present] for name, panels in GROUPS.items()}
    rewards = [key for key in present if key.startswith(_EACH_REWARD)]
    groups = {
        "Each reward": [Panel(key, key.removeprefix(_EACH_REWARD), "mean of the rollout") for key in rewards]
    } | groups
    groups["Faults"] += [
        Panel(key, f"Unscored by {key.removeprefix(_EACH_UNSCORED)}", "images whose reward was not finite", fault=True)
        for key in present
        if key.startswith(_EACH_UNSCORED)
    ]
    known = {panel.key for panels in groups.values() for panel in panels} | set(_SHOWN_ELSEWHERE)
    groups["Others"] = [
        Panel(key, key.replace("_", " "), "")
        for key in present
        if key not in known and any(number(row.get(key)) is not None for row in rows)
    ]
    return {name: panels for name, panels in groups.items() if panels}


def column(rows: Sequence[Row], key: str) -> Values:
    return [number(row.get(key)) for row in rows]


def bin_size(count: int) -> int:
    """How many of `count` iterations one point stands for."""
    return max(1, -(-count // MOST_POINTS))


def binned(values: Values, size: int, pick: Callable[[Sequence[float]], float] | None = None) -> Values:
    """One value, the mean unless `pick` is given, for each `size` neighbours; None where all of them are."""
    if size == 1:
        return list(values)
    choose = pick or (lambda known: sum(known) / len(known))
    bins = (values[start : start + size] for start in range(0, len(values), size))
    return [choose(known) if (known := [v for v in part if v is not None]) else None for part in bins]
