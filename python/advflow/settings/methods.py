"""Each method's own section; what its numbers may be is said by its op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from advflow.settings.numbers import require

TimeWeight: TypeAlias = Literal["none", "inverse_dt", "sigma", "inverse_kappa"]

# Of the rollout policy, for gamma "auto": where it keeps less, what is between it and the learner is the last step
# alone, whose length Adam decides, not gamma.
LEAST_RHO = 0.2


@dataclass
class AdvantageFlowConfig:
    """AdvantageFlow; see `advflow_ext.advantage_flow_loss`.

    Args:
        gamma: rollout regularisation, a number, "1-A", "beta(beta-A)", or "auto": begins at 0.5 and moves so that the
            learner goes `target_move` in an iteration; larger for a sample that would be left with a curvature below
            0.1. The whole loss is scaled by 0.5 / gamma. Needs a rollout policy that keeps a fifth of itself or more:
            gamma first moves once rollout_policy.rate times the optimiser steps since its start has reached 0.2.
        target_move: of gamma "auto": root of the mean <(v - v_old)^2> over the mean <(v - u)^2>, at the highest
            learning rate; in proportion to the rate at a smaller one.
        lam: reference regularisation; 1e-3 in the paper.
        weighting: "prediction" (t^2), "velocity" (1) or "adaptive" (t^2 over the detached prediction error).
        beta: weight of the data term.
        offset: added to every advantage. Advantages of a group sum to zero, so that nothing in the loss asks the
            velocity to be the mean of u on the policy's own images, as flow matching does; an offset above 0 does, with
            itself as the weight. The paper has none.
    """

    gamma: float | Literal["1-A", "beta(beta-A)", "auto"] = 1.1
    target_move: float = 0.035
    lam: float = 1e-2
    weighting: Literal["prediction", "velocity", "adaptive"] = "prediction"
    beta: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        # The op takes any number, which one a sample may be below 0; one for all samples drives the policy away.
        require(
            isinstance(self.gamma, str) or self.gamma >= 0,
            "advantage_flow.gamma",
            self.gamma,
            'zero, a positive number, "1-A", "beta(beta-A)" or "auto"',
        )
        require(self.target_move > 0, "advantage_flow.target_move", self.target_move, "a positive number")
        require(self.offset >= 0, "advantage_flow.offset", self.offset, "zero or a positive number")


@dataclass
class DiffusionNFTConfig:
    """DiffusionNFT; see `advflow_ext.diffusion_nft_loss`.

    Args:
        beta: how far the implicit positive and negative policies stand from the rollout policy.
        adv_clip_max: advantages are clipped to this.
        kl_weight: reference regularisation, in velocity space.
        adaptive: divide each branch by its detached prediction error.
        mode: which advantages are used.
    """

    beta: float = 1.0
    adv_clip_max: float = 5.0
    kl_weight: float = 1e-4
    adaptive: bool = True
    mode: Literal["all", "positive", "negative", "one", "binary"] = "all"


@dataclass
class AWMConfig:
    """Advantage-weighted matching; see `advflow_ext.awm_loss`. The rollout policy is its EMA anchor.

    Args:
        weighting: how the matching error becomes a log-probability.
        power: exponent of "ghuber".
        ema_weight: pull towards the EMA policy.
        kl_weight: pull towards the reference.
    """

    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"
    power: float = 0.25
    ema_weight: float = 1.0
    kl_weight: float = 1e-3


@dataclass
class FlowAWRConfig:
    """FlowAWR; see `advflow_ext.flow_awr_loss`.

    Args:
        kl_weight: pull towards the reference, in velocity space; 1e-4 in its code.
        weighting: "adaptive" (t^2 over the detached prediction error: its code), "prediction" (t^2) or "velocity" (1).
    """

    kl_weight: float = 1e-4
    weighting: Literal["adaptive", "prediction", "velocity"] = "adaptive"


@dataclass
class RewardWeightedConfig:
    """Reward-weighted flow matching; see `advflow_ext.reward_weighted_loss`.

    Args:
        method: weight exp(tau R) (ORW-CFM-W2), R itself (RWR), or 1 for the best of a group and else 0 (RAFT).
        of: what stands for R: "rewards" as they are (ORW-CFM-W2), or "advantages", which have no unit, so that one tau
            serves every reward.
        tau: inverse temperature of "exp".
        kl_weight: pull towards the reference.
    """

    method: Literal["exp", "linear", "best"] = "exp"
    of: Literal["rewards", "advantages"] = "rewards"
    tau: float = 0.5
    kl_weight: float = 1.0


@dataclass
class FlowGRPOConfig:
    """Flow-GRPO, and DanceGRPO and MixGRPO, which differ in the sampler; see `advflow_ext.flow_grpo_loss`.

    Args:
        clip: the mean-reduced ratio is clipped to 1 +- this.
        kl_weight: weight of the KL divergence to the reference.
        kl_convention: which public trainer's KL divergence.
        time_weight: of a step's policy term by the step: "none", "inverse_dt" (its length), "sigma" (its deviation) or
            "inverse_kappa" (what a velocity moves it by, in deviations).
    """

    clip: float = 1e-4
    kl_weight: float = 0.0
    kl_convention: Literal["exact", "dt", "two_sigma_squared"] = "exact"
    time_weight: TimeWeight = "none"


@dataclass
class GRPOGuardConfig:
    """GRPO-Guard; see `advflow_ext.grpo_guard_loss`.

    Args:
        clip: the normalised ratio is clipped to 1 +- this.
        kl_weight: weight of the KL divergence to the reference.
        time_weight: of a step's policy term by the step: "none", "inverse_dt" (its length), "sigma" (its deviation) or
            "inverse_kappa" (what a velocity moves it by, in deviations).
    """

    clip: float = 2e-6
    kl_weight: float = 0.0
    time_weight: TimeWeight = "inverse_dt"


@dataclass
class FlowCPSConfig:
    """Flow-CPS; see `advflow_ext.flow_cps_loss`.

    Args:
        clip: the ratio, without its variance, is clipped to 1 +- this.
        kl_weight: weight of the KL divergence to the reference.
        time_weight: of a step's policy term by the step: "none", "inverse_dt" (its length), "sigma" (its deviation) or
            "inverse_kappa" (what a velocity moves it by, in deviations).
    """

    clip: float = 1e-4
    kl_weight: float = 0.0
    time_weight: TimeWeight = "none"


@dataclass
class FlowDPPOConfig:
    """Flow-DPPO; see `advflow_ext.flow_dppo_loss`.

    Args:
        threshold: mean-reduced KL divergence from which an outward step is masked.
        direction: what tells outward from corrective.
        mask: threshold the divergence as it is, or as it would be after the step.
        step_size: size of that step, for mask "predictive".
        kl_weight: weight of the KL divergence to the reference.
        time_weight: of a step's policy term by the step: "none", "inverse_dt" (its length), "sigma" (its deviation) or
            "inverse_kappa" (what a velocity moves it by, in deviations).
    """

    threshold: float = 1e-6
    direction: Literal["ratio", "log_ratio_minus_kl"] = "ratio"
    mask: Literal["current", "predictive"] = "current"
    step_size: float | None = None
    kl_weight: float = 0.0
    time_weight: TimeWeight = "none"


@dataclass
class TokenGRPOConfig:
    """GRPO of image tokens; see `advflow_ext.token_policy_loss`.

    Args:
        clip: ratios are clipped to 1 +- this.
        level: whose ratio: a "sequence"'s, of the mean log-probability of its tokens, or each "token"'s.
        surrogate: "ppo", or "released", which takes the smaller of PPO's two terms, as the released trainer does.
        kl_weight: weight of the KL divergence to the reference; 3 in the released trainer.
        kl: "k3", of the tokens that were drawn, or "exact", over the vocabulary.
    """

    clip: float = 0.2
    level: Literal["sequence", "token"] = "sequence"
    surrogate: Literal["ppo", "released"] = "ppo"
    kl_weight: float = 0.0
    kl: Literal["k3", "exact"] = "k3"
