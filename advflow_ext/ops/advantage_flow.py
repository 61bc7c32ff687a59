"""The AdvantageFlow loss (arXiv 2605.26013, eq. 5) on the native forward-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.ops._forward import native_output
from advflow_ext.reference.advantage_flow import GAMMA_FORMS, advantage_flow_arguments


@any_batch
def advantage_flow_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    gamma: Number | str = 1.1,
    lam: Number = 1e-3,
    beta: Number = 1.0,
    weighting: str = "prediction",
    reduction: str = "mean",
) -> LossOutput:
    """Advantage-weighted flow matching with rollout and reference regularisation (AdvantageFlow, eq. 5).

    Per sample, with u = noise - x0, D elements and <.> the mean over them::

        loss_i = m [ beta A <(v-u)^2> + gamma <(v-v_old)^2> + lam <(v-v_ref)^2> ]
        d loss_i / dv = (2 m / D) [ beta A (v-u) + gamma (v-v_old) + lam (v-v_ref) ]

    Arguments:
        v: policy velocity ``[B, ...]``, any rank from 2: the only tensor that receives a gradient.
        x0, noise: clean latent and noise, shaped like v (t = 0 is data, t = 1 is noise; x_t is never needed).
        t: ``[B]``, or ``[]`` for all, in (0, 1]. advantages: ``[B]``, see :func:`group_advantages`.
        v_old: velocity of the rollout policy, shaped like v.
        v_ref: velocity of the reference policy, shaped like v, or None for no such term.
        gamma: weight of the rollout term: a number, a ``[B]`` tensor, "1-A" (the paper's adaptive variant), or
            "beta(beta-A)", which with ``beta`` has the gradient of plain DiffusionNFT (Proposition 3).
        lam: weight of the reference term, at least 0.
        beta: weight of the data term, above 0. The paper's "AdvantageFlow(0.01-0.1A)" is beta = 0.1 and
            gamma = "beta(beta-A)". One a sample, it is a weight on the advantages.
        weighting: "prediction" (m = t^2, the paper's prediction-space loss), "velocity" (m = 1), or "adaptive"
            (m = t^2 / w with w = max(t <|v-u|>, 1e-5) treated as a constant: MeanFlowAdvantage's shared scale).
        reduction: "mean" over B, "sum", or "none" for ``[B]``.

    Numbers a sample may have the shapes in which trainers hold them: dimensions of size 1 behind, or ``[B, S]`` beside
    latents ``[B, S, ...]``, S draws of an image, B*S to this loss. ``[B]`` then stands for all S, and "none" gives
    ``[B, S]``.

    Every number may also be a tensor ``[]`` or ``[B]``, and may change at every step under torch.compile without being
    compiled anew. Out of range it is an error where it can be read, and drops its samples on CUDA and under
    torch.compile, as a value of one sample that is not finite does everywhere.

    Latents may mix float32, float16 and bfloat16 freely and have any strides; sums are float32, and v's gradient is
    rounded once, to v's dtype. On CPU, one float64 latent makes everything float64. The result is deterministic, and a
    sample's loss and gradient are bitwise independent of the batch around it.

    A sample with a non-finite input or loss has zero loss and gradient, is counted in ``metrics`` and leaves every
    other sample untouched. beta A + gamma + lam <= 0 makes a sample's loss unbounded below: warned of once with the
    numbers (on CUDA when the metrics are read, since a step never waits for the device).

    Raises ValueError, naming argument, value and what is accepted, for wrong shapes, dtypes, devices, names and
    numbers, and on CPU for t outside (0, 1]; on CUDA and under torch.compile such samples are dropped and counted.
    """
    if not _native.serves(v, x0, noise, t, advantages, v_old, v_ref):
        return reference.advantage_flow_loss(
            v, x0, noise, t, advantages,
            v_old=v_old, v_ref=v_ref, gamma=gamma, lam=lam, beta=beta, weighting=weighting, reduction=reduction,
        )  # fmt: skip
    dtype, _, given = advantage_flow_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, gamma, lam, beta, weighting, reduction
    )
    checks.require_native_dtype(dtype, v, "advantage_flow_loss")
    form = 1 + GAMMA_FORMS.index(given.gamma) if isinstance(given.gamma, str) else 0
    number = 0.0 if isinstance(given.gamma, str) else given.gamma
    return native_output(
        "advantage_flow", (v, x0, noise, v_old, v_ref), t, advantages, (number, given.lam, given.beta),
        (checks.WEIGHTINGS.index(weighting), form), reduction, unbounded=given.unbounded,
    )  # fmt: skip
