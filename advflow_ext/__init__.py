"""Exact, fused losses for reinforcement learning of rectified-flow models. Needs torch alone."""

from advflow_ext import _native, nn, reference
from advflow_ext.contract.outputs import LossMetrics, LossOutput, SdeStep
from advflow_ext.contract.step_table import StepTable
from advflow_ext.distribution.loo_fid import LeaveOneOutFID
from advflow_ext.distribution.moments import FeatureMoments, frechet_distance
from advflow_ext.distribution.quality import (
    ModeCoverage,
    PrecisionRecall,
    mode_coverage,
    precision_recall,
    vendi_score,
)
from advflow_ext.ops.advantage_flow import advantage_flow_loss
from advflow_ext.ops.advantages import group_advantages, softmax_advantages
from advflow_ext.ops.awm import awm_log_prob, awm_loss
from advflow_ext.ops.capability import CapabilityTracker, CrossLevelAdvantages, cross_level_advantages
from advflow_ext.ops.diffusion_nft import diffusion_nft_loss
from advflow_ext.ops.distillation import distillation_loss
from advflow_ext.ops.flow_awr import flow_awr_loss
from advflow_ext.ops.flow_cps import flow_cps_loss
from advflow_ext.ops.flow_dppo import flow_dppo_loss
from advflow_ext.ops.flow_grpo import flow_grpo_loss
from advflow_ext.ops.gaussian_kl import gaussian_kl, gaussian_kl_from_velocity
from advflow_ext.ops.grpo_guard import grpo_guard_loss
from advflow_ext.ops.modules import (
    AdvantageFlowLoss,
    AWMLoss,
    DiffusionNFTLoss,
    DistillationLoss,
    FlowAWRLoss,
    FlowCPSLoss,
    FlowDPPOLoss,
    FlowGRPOLoss,
    GRPOGuardLoss,
    RewardWeightedLoss,
    TokenPolicyLoss,
)
from advflow_ext.ops.reward_weighted import reward_weighted_loss
from advflow_ext.ops.sde_step import sde_step
from advflow_ext.ops.token_policy import token_log_prob, token_policy_loss
from advflow_ext.ops.transition_log_prob import from_means, transition_log_prob, transition_noise
from advflow_ext.patches._patch import TransformerPatch
from advflow_ext.patches.flux import apply_to_flux
from advflow_ext.patches.qwen_image import apply_to_qwen_image
from advflow_ext.patches.sd3 import apply_to_sd3
from advflow_ext.policies.cuda_graphs import CudaGraphs
from advflow_ext.policies.mismatch import Mismatch
from advflow_ext.policies.policy_set import PolicySet

__version__ = "0.1.0" + _native.LABEL

__all__ = [
    "AWMLoss",
    "AdvantageFlowLoss",
    "CapabilityTracker",
    "CrossLevelAdvantages",
    "CudaGraphs",
    "DiffusionNFTLoss",
    "DistillationLoss",
    "FeatureMoments",
    "FlowAWRLoss",
    "FlowCPSLoss",
    "FlowDPPOLoss",
    "FlowGRPOLoss",
    "GRPOGuardLoss",
    "LeaveOneOutFID",
    "LossMetrics",
    "LossOutput",
    "Mismatch",
    "ModeCoverage",
    "PolicySet",
    "PrecisionRecall",
    "RewardWeightedLoss",
    "SdeStep",
    "StepTable",
    "TokenPolicyLoss",
    "TransformerPatch",
    "advantage_flow_loss",
    "apply_to_flux",
    "apply_to_qwen_image",
    "apply_to_sd3",
    "awm_log_prob",
    "awm_loss",
    "cross_level_advantages",
    "diffusion_nft_loss",
    "distillation_loss",
    "flow_awr_loss",
    "flow_cps_loss",
    "flow_dppo_loss",
    "flow_grpo_loss",
    "frechet_distance",
    "from_means",
    "gaussian_kl",
    "gaussian_kl_from_velocity",
    "group_advantages",
    "grpo_guard_loss",
    "mode_coverage",
    "nn",
    "precision_recall",
    "reference",
    "reward_weighted_loss",
    "sde_step",
    "softmax_advantages",
    "token_log_prob",
    "token_policy_loss",
    "transition_log_prob",
    "transition_noise",
    "vendi_score",
]
