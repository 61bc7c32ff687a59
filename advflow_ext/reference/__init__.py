"""Plain PyTorch statements of every op: the fallback where nothing is compiled, the oracle, the bench baseline."""

from advflow_ext.reference.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from advflow_ext.reference.advantage_flow import advantage_flow_loss
from advflow_ext.reference.awm import awm_log_prob, awm_loss
from advflow_ext.reference.diffusion_nft import diffusion_nft_loss
from advflow_ext.reference.distillation import distillation_loss
from advflow_ext.reference.flow_awr import flow_awr_loss
from advflow_ext.reference.flow_cps import flow_cps_loss
from advflow_ext.reference.flow_dppo import flow_dppo_loss
from advflow_ext.reference.flow_grpo import flow_grpo_loss
from advflow_ext.reference.gaussian_kl import gaussian_kl, gaussian_kl_from_velocity
from advflow_ext.reference.grpo_guard import grpo_guard_loss
from advflow_ext.reference.joint_qk_norm import joint_qk_norm
from advflow_ext.reference.lora_linear import lora_linear
from advflow_ext.reference.reward_weighted import reward_weighted_loss
from advflow_ext.reference.sde_step import sde_step
from advflow_ext.reference.token_policy import token_log_prob, token_policy_loss
from advflow_ext.reference.transition_log_prob import from_means, transition_log_prob, transition_noise

__all__ = [
    "advantage_flow_loss",
    "awm_log_prob",
    "awm_loss",
    "diffusion_nft_loss",
    "distillation_loss",
    "flow_awr_loss",
    "flow_cps_loss",
    "flow_dppo_loss",
    "flow_grpo_loss",
    "from_means",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "gaussian_kl",
    "gaussian_kl_from_velocity",
    "grpo_guard_loss",
    "joint_qk_norm",
    "layer_norm_modulate",
    "lora_linear",
    "reward_weighted_loss",
    "sde_step",
    "token_log_prob",
    "token_policy_loss",
    "transition_log_prob",
    "transition_noise",
]
