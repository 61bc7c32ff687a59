"""Every public loss: what a loop, a bench and the tests have to know of it beside its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrustRegion:
    """What keeps the learner near the rollout policy: an option, and the metric that it is held against."""

    option: str
    metric: str
    of_ratio: bool  # the option bounds the ratio, and so log(1 + option) the metric


@dataclass(frozen=True)
class Loss:
    """``af.NAME``, and ``af.reference.NAME``."""

    name: str
    family: Literal["forward", "reverse"]
    latents: tuple[str, ...]  # arguments of one shape, v first
    trust_region: TrustRegion | None = None


_CLIP = TrustRegion("clip", "max_abs_log_ratio", of_ratio=True)
_SAMPLES = ("v", "x0", "noise", "v_old", "v_ref")
_TRANSITIONS = ("v", "v_old", "eps", "v_ref")

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("advantage_flow_loss", "forward", _SAMPLES),
        Loss("diffusion_nft_loss", "forward", _SAMPLES),
        Loss("awm_loss", "forward", ("v", "x0", "noise", "v_ema", "v_ref")),
        Loss("flow_awr_loss", "forward", _SAMPLES),
        Loss("reward_weighted_loss", "forward", ("v", "x0", "noise", "v_ref")),
        Loss("flow_grpo_loss", "reverse", _TRANSITIONS, _CLIP),
        Loss("grpo_guard_loss", "reverse", _TRANSITIONS, _CLIP),
        Loss("flow_cps_loss", "reverse", _TRANSITIONS, _CLIP),
        Loss("flow_dppo_loss", "reverse", _TRANSITIONS, TrustRegion("threshold", "mean_kl_old", of_ratio=False)),
    )
}
