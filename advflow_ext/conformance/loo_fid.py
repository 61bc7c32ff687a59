"""bugrabaran/ar-policy-tuning: leave-one-out FID."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import Inputs, Row

RawMoments = tuple[Tensor, Tensor]  # means of the features and of their squares, [d] or [N, d]


def raw_moments(features: Tensor) -> RawMoments:
    return features.mean(0), features.square().mean(0)


def moved(old: RawMoments, new: RawMoments, beta: float) -> RawMoments:
    """update_from_moments of its EMADiagMoments."""
    return beta * old[0] + (1 - beta) * new[0], beta * old[1] + (1 - beta) * new[1]


def diagonal_fid(generated: RawMoments, reference: af.FeatureMoments) -> Tensor:
    mean, squares = generated
    std = ((squares - mean.square()).clamp(min=0) + 1e-12).sqrt()
    return (mean - reference.mean).square().sum(-1) + (std - reference.covariance.diagonal().sqrt()).square().sum(-1)


def leave_one_out(features: Tensor, old: RawMoments, beta: float, reference: af.FeatureMoments) -> Tensor:
    """InceptionDiagFIDEMAReward, "ema_loo"; "loo_batch" for a beta of 0."""
    count = len(features)
    without = (
        (features.sum(0) - features) / (count - 1),
        (features.square().sum(0) - features.square()) / (count - 1),
    )
    after = moved(old, raw_moments(features), beta)
    return diagonal_fid(moved(old, without, beta), reference) - diagonal_fid(after, reference)


def loo_fid(inputs: Inputs) -> Iterator[Row]:
    """Its rewards over what an image's share of the weight is, and the moments that it starts from."""
    reference = af.FeatureMoments.of(inputs.x0.flatten(1))
    before, features = inputs.v.flatten(1), inputs.x.flatten(1) / 2
    old = raw_moments(before)
    for beta, quantity in ((0.5, "ema_loo"), (0.99, "ema_loo, beta 0.99"), (0.0, "loo_batch")):
        distance = af.LeaveOneOutFID(reference, beta)
        distance.update(before)
        theirs = leave_one_out(features, old, beta, reference) * (len(features) - 1) / (1 - beta)
        quantity = f"{quantity}: reward (N-1)/(1-beta)"
        call = f"LeaveOneOutFID(reference, beta={beta}).reward(features)"
        yield Row("ar-policy-tuning", quantity, call, (distance.reward(features),), (theirs,))

    distance = af.LeaveOneOutFID(reference, 0.5)
    for batch in (before, features):
        distance.update(batch)
    # As launched, with statistics to start from: loaded for a division by 1 - beta^t that is switched off.
    started = moved((old[0] / 2, old[1] / 2), raw_moments(features), 0.5)
    yield Row(
        "ar-policy-tuning", "FID of the moments after an update", "LeaveOneOutFID(reference, beta=0.5).fid()",
        (distance.fid(),), (diagonal_fid(started, reference),),
        "a quarter of the weight is missing, as it starts from saved statistics times 1 - beta without debias_ema",
    )  # fmt: skip
