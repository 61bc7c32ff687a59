"""bugrabaran/ar-policy-tuning: leave-one-out FID, and the policy loss of its autoregressive models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.rows import Inputs, Row, loss_row

CLIP, KL, ENTROPY = 0.05, 3.0, 2.2e-3
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
    yield from policy_loss(inputs)


def of_sequences(values: Tensor) -> Tensor:
    return values.sum(1) / values.shape[1]


def released_policy_loss(
    logits: Tensor, logits_ref: Tensor, tokens: Tensor, log_prob_old: Tensor, A: Tensor, A_fid: Tensor
) -> Tensor:
    """grpo_train_step's two losses, each with a forward pass of its own there, of what it calls one g."""
    log_p = logits.log_softmax(-1)
    log_prob, log_prob_ref = (
        of_sequences(each.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]) for each in (logits, logits_ref)
    )
    ratio = (log_prob - of_sequences(log_prob_old)).exp()

    def policy(advantages: Tensor) -> Tensor:
        return torch.min(-ratio * advantages, -ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()

    delta = log_prob_ref - log_prob
    entropy = of_sequences((-log_p.exp() * log_p).sum(-1)).mean()
    return policy(A) - ENTROPY * entropy + KL * (delta.exp() - delta - 1).mean() + 2 * policy(A_fid)


def policy_loss(inputs: Inputs) -> Iterator[Row]:
    """18 sequences of 4 tokens out of a vocabulary of 64."""
    weight = inputs.x0.flatten(0, 1).flatten(1)[:64] / 8
    hidden, hidden_old, hidden_ref = (4 * each.flatten(2) for each in (inputs.v, inputs.v_old, inputs.v_ref))
    tokens = inputs.x.flatten(2).argmax(-1)
    log_prob_old = af.token_log_prob(hidden_old, weight, tokens)
    advantages = (inputs.A, 2 * inputs.A.flip(0))

    def theirs(states: Tensor) -> Tensor:
        logits, logits_ref = states @ weight.T, hidden_ref @ weight.T
        return released_policy_loss(logits, logits_ref, tokens, log_prob_old, inputs.A, inputs.A.flip(0))

    options = {"clip": CLIP, "hidden_ref": hidden_ref, "kl_weight": KL, "entropy_weight": ENTROPY}
    given = (hidden, weight, tokens, log_prob_old, advantages)
    for surrogate, departs in (
        ("released", ""),
        ("ppo", "it takes the smaller of PPO's two terms: a ratio is pushed on beyond the clip, not back"),
    ):
        yield loss_row(
            "ar-policy-tuning", "loss of one g", af.token_policy_loss, given, theirs, departs,
            **options, surrogate=surrogate,
        )  # fmt: skip
