"""Bujiazi/GRPO-Series: AdaGRPO."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import GROUP, Inputs, Row, shown


def calibrated(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """compute_ema_adv of method_adagrpo.py, of one group."""
    z = (rewards - mean) / (std + 1e-8)
    good, bad = z > 0, z < 0
    if z[good].sum() < 1e-6 or z[bad].abs().sum() < 1e-6:
        return (z - z.mean()).clamp(-5, 5)
    return torch.where(good, z / z[good].sum(), torch.where(bad, z / z[bad].abs().sum(), z)).clamp(-5, 5)


def ada_grpo(inputs: Inputs) -> Iterator[Row]:
    """The state after the scores of four steps, and advantages held against it and against a far better model."""
    tracker = af.CapabilityTracker()
    mean = variance = None
    for scores in inputs.rewards[:4]:
        tracker.observe(scores)
        now, spread = scores.mean(), scores.var(correction=0)
        mean = now if mean is None else 0.8 * mean + 0.2 * now
        variance = spread if variance is None else 0.8 * variance + 0.2 * spread
    assert mean is not None and variance is not None
    ours, theirs = torch.stack([tracker.mean, tracker.variance]), torch.stack([mean, variance])
    yield Row("AdaGRPO", "mean and variance after four steps", "CapabilityTracker(decay=0.8)", (ours,), (theirs,))

    std = variance.clamp(min=1e-8).sqrt()
    local = (
        (inputs.rewards - inputs.rewards.mean(1, keepdim=True)) / (inputs.rewards.std(1, keepdim=True) + 1e-8)
    ).clamp(-5, 5)
    for quantity, level in (("advantages", mean), ("advantages far below the mean", mean + 9)):
        fused = local + torch.stack([calibrated(group, level, std) for group in inputs.rewards])
        options = {"mean": level, "variance": variance}
        out = af.cross_level_advantages(inputs.rewards.flatten(), GROUP, **options)
        yield Row("AdaGRPO", quantity, shown(af.cross_level_advantages, options), (out.advantages,), (fused.flatten(),))
