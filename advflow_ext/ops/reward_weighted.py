"""Reward-weighted flow matching: ORW-CFM-W2, RWR and RAFT, on the native forward-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.ops._forward import native_output
from advflow_ext.reference.reward_weighted import REWARD_METHODS, UNBOUNDED, reward_weighted_arguments


@any_batch
def reward_weighted_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    rewards: Tensor,
    *,
    method: str = "exp",
    tau: Number = 0.5,
    group_size: int | None = None,
    v_ref: Tensor | None = None,
    kl_weight: Number = 1.0,
    policy_weight: Number = 1.0,
    reduction: str = "mean",
) -> LossOutput:
    """Flow matching on the policy's own samples, each weighted by its reward.

    Per sample, with u = noise - x0, D elements and <.> the mean over them::

        loss_i = weight <(v-u)^2> + kl_weight <(v-v_ref)^2>
        d loss_i / dv = (2 / D) [ weight (v-u) + kl_weight (v-v_ref) ]

    ======== =========================== ======================================================================
    method   weight                      source
    ======== =========================== ======================================================================
    "exp"    exp(tau R)                  ORW-CFM-W2: markerthu/orw-cfm, whose ``w2_coefficient`` is ``kl_weight``
    "linear" R                           RWR: yifan123/flow_grpo, ``stat_tracking.py`` type "rwr"
    "best"   1 if R is its group's       RAFT: yifan123/flow_grpo, ``train_sd3_sft.py``
             largest (each of equals), else 0
    ======== =========================== ======================================================================

    Arguments:
        v, x0, noise, t, v_ref, reduction: as in :func:`advantage_flow_loss`; v is the only tensor with a gradient, and
            t is only checked.
        rewards: ``[B]``, as scored. A negative sum of weight and kl_weight ("linear" alone can have it) makes a
            sample's loss unbounded below, which is warned of once as in :func:`advantage_flow_loss`.
        method: a row of the table.
        tau: of "exp", above 0; 0.5 in the ORW-CFM-W2 code.
        group_size: of "best", which needs it: B is made of whole groups of consecutive images of one prompt. A reward
            that is not finite is never the largest.
        kl_weight: weight of the reference term, at least 0. ORW-CFM-W2 recommends 1 or more; RWR and RAFT have no such
            term, which is ``v_ref=None``.
        policy_weight: multiplies the weight of every method, at least 0.

    Dtypes, layouts, precision, non-finite samples, t outside (0, 1] and errors: as in :func:`advantage_flow_loss`. In
    the metrics A stands for the reward, ``policy_term`` for the weighted term and ``rollout_deviation`` is 0.
    """
    if not _native.serves(v, x0, noise, t, rewards, v_ref):
        return reference.reward_weighted_loss(
            v, x0, noise, t, rewards,
            method=method, tau=tau, group_size=group_size, v_ref=v_ref, kl_weight=kl_weight,
            policy_weight=policy_weight, reduction=reduction,
        )  # fmt: skip
    dtype, _, given = reward_weighted_arguments(
        v, x0, noise, t, rewards, method, tau, group_size, v_ref, kl_weight, policy_weight, reduction
    )
    checks.require_native_dtype(dtype, v, "reward_weighted_loss")
    numbers = (*given, float(group_size or 1))
    choices = (REWARD_METHODS.index(method),)
    return native_output(
        "reward_weighted", (v, x0, noise, None, v_ref), t, rewards, numbers, choices, reduction, unbounded=UNBOUNDED
    )
