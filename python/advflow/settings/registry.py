"""What a run chooses by name, where the code of each is, and which section of the settings it is made with.

Code is named as "package.module:Class" and imported when a run needs it: naming a method loads no torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from advflow.settings.methods import (
    AdvantageFlowConfig,
    AWMConfig,
    DiffusionNFTConfig,
    FlowAWRConfig,
    FlowCPSConfig,
    FlowDPPOConfig,
    FlowGRPOConfig,
    GRPOGuardConfig,
    RewardWeightedConfig,
)


@dataclass(frozen=True)
class Method:
    """A policy-improvement method: its process, its class in `advflow.algorithms`, its settings.

    `section` is where those stand in the settings of a run; None: under the method's own name.
    """

    process: Literal["forward", "reverse"]
    code: str
    settings: type
    section: str | None = None


@dataclass(frozen=True)
class Family:
    """A model family: its class in `advflow.models`."""

    code: str


METHODS: dict[str, Method] = {
    "advantage_flow": Method("forward", "advflow.algorithms.advantage_flow:AdvantageFlow", AdvantageFlowConfig),
    "diffusion_nft": Method("forward", "advflow.algorithms.diffusion_nft:DiffusionNFT", DiffusionNFTConfig),
    "awm": Method("forward", "advflow.algorithms.awm:AWM", AWMConfig),
    "flow_awr": Method("forward", "advflow.algorithms.flow_awr:FlowAWR", FlowAWRConfig),
    "reward_weighted": Method("forward", "advflow.algorithms.reward_weighted:RewardWeighted", RewardWeightedConfig),
    "flow_grpo": Method("reverse", "advflow.algorithms.flow_grpo:FlowGRPO", FlowGRPOConfig),
    # DanceGRPO and MixGRPO are Flow-GRPO's loss on another sampler and another window of steps.
    "dance_grpo": Method("reverse", "advflow.algorithms.flow_grpo:FlowGRPO", FlowGRPOConfig, section="flow_grpo"),
    "mix_grpo": Method("reverse", "advflow.algorithms.flow_grpo:FlowGRPO", FlowGRPOConfig, section="flow_grpo"),
    "flow_cps": Method("reverse", "advflow.algorithms.flow_cps:FlowCPS", FlowCPSConfig),
    "grpo_guard": Method("reverse", "advflow.algorithms.grpo_guard:GRPOGuard", GRPOGuardConfig),
    "flow_dppo": Method("reverse", "advflow.algorithms.flow_dppo:FlowDPPO", FlowDPPOConfig),
}


FAMILIES: dict[str, Family] = {"sd3": Family("advflow.models.sd3:SD3")}


def section_of(method: str) -> str:
    """The section of the settings that `method` is made with."""
    entry = METHODS.get(method)
    return method if entry is None or entry.section is None else entry.section


def load_code(code: str) -> Any:
    """The object called "package.module:name"."""
    module, _, name = code.partition(":")
    return getattr(importlib.import_module(module), name)
