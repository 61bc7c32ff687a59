"""The DiffusionNFT loss (arXiv 2509.16117) as released, on the native forward-process core."""

from __future__ import annotations

from torch import Tensor

from advflow_ext import _native, reference
from advflow_ext.contract import checks
from advflow_ext.contract.batches import any_batch
from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import LossOutput
from advflow_ext.ops._forward import native_output
from advflow_ext.reference.diffusion_nft import NFT_MODES, NFT_SPELLINGS, diffusion_nft_arguments


@any_batch
def diffusion_nft_loss(
    v: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    *,
    v_old: Tensor,
    v_ref: Tensor | None = None,
    beta: Number = 1.0,
    adv_clip_max: Number = 5.0,
    kl_weight: Number = 1e-4,
    policy_weight: Number = 1.0,
    adaptive: bool = True,
    mode: str = "all",
    reduction: str = "mean",
) -> LossOutput:
    """Negative-aware fine-tuning with two implicit policies, as coded in NVlabs/DiffusionNFT (train_nft_sd3.py).

    Per sample, with u = noise - x0, D elements, <.> the mean over them, c = ``adv_clip_max``, A clipped to [-c, c],
    r = 1/2 + A / (2c) and the implicit policies v+ = v_old + beta (v - v_old), v- = v_old - beta (v - v_old)::

        loss_i = (c / beta) t^2 [ r <(v+ - u)^2> / w+  +  (1-r) <(v- - u)^2> / w- ] + kl_weight <(v - v_ref)^2>
        w+- = max(t <|v+- - u|>, 1e-5), treated as a constant

    which is what the released code computes from x0-predictions, whose residuals are -t times these. With P+ = r / w+,
    P- = (1-r) / w- and m = c t^2 the gradient is::

        d loss_i / dv = (2 / D) [ m (P+ - P-) (v-u) + m ((beta-1) P+ + (beta+1) P-) (v-v_old) + kl_weight (v-v_ref) ]

    The two data coefficients add up to m beta (P+ + P-) > 0: every sample's loss has a minimum, whatever its advantage.

    Arguments:
        v, x0, noise, t, v_ref, reduction: as in :func:`advantage_flow_loss`; v is the only tensor with a gradient.
        advantages: ``[B]``, centred and divided by a deviation but not yet by ``adv_clip_max``: the released code's are
            ``group_advantages(rewards, K, norm="raw_global_std", clip=None)``.
        v_old: velocity of the rollout policy, shaped like v.
        beta: how far the implicit policies stand from the rollout policy, above 0 (released configurations: 1, or 0.1).
        adv_clip_max: c, above 0.
        kl_weight: weight of the reference term, at least 0, in velocity space (the trainer's ``train.beta``).
        policy_weight: of everything but the reference term, at least 0.
        adaptive: False drops w+-, which leaves the paper's loss in prediction space at the code's scale. Its gradient
            is that of ``c * advantage_flow_loss(A / c, gamma="beta(beta-A)", beta=beta, lam=0) / beta``.
        mode: the trainer's ``adv_mode``, applied to the clipped advantages: "all"; "positive" and "negative" set the
            others to 0; "one" makes positive ones 1 and the others 0; "binary" keeps the sign. Its "positive_only",
            "negative_only" and "one_only" are taken too.

    Dtypes, layouts, precision, non-finite samples, t outside (0, 1] and errors: as in :func:`advantage_flow_loss`. The
    released code rounds v+- to half precision under autocast and takes w+- in float64; here neither is rounded below
    float32. ``policy_term`` is the loss without the reference term; ``min_curvature`` includes the weights m and P+-.
    """
    if not _native.serves(v, x0, noise, t, advantages, v_old, v_ref):
        return reference.diffusion_nft_loss(
            v, x0, noise, t, advantages,
            v_old=v_old, v_ref=v_ref, beta=beta, adv_clip_max=adv_clip_max, kl_weight=kl_weight,
            policy_weight=policy_weight, adaptive=adaptive, mode=mode, reduction=reduction,
        )  # fmt: skip
    mode = checks.spelled(mode, NFT_SPELLINGS)
    dtype, _, given = diffusion_nft_arguments(
        v, x0, noise, t, advantages, v_old, v_ref, beta, adv_clip_max, kl_weight, policy_weight, adaptive, mode,
        reduction,
    )  # fmt: skip
    checks.require_native_dtype(dtype, v, "diffusion_nft_loss")
    choices = (NFT_MODES.index(mode), int(adaptive))
    return native_output("diffusion_nft", (v, x0, noise, v_old, v_ref), t, advantages, given, choices, reduction)
