"""What a run chooses by name, where the code of each is, and which section of the settings it is made with.

A plugin adds its own here, by the same line. Code is named as "package.module:Class" and imported when a run needs it:
choosing a name loads no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
    TokenGRPOConfig,
)


@dataclass(frozen=True)
class Choice:
    """What has a name: its class, by path or itself, and the dataclass of the settings that it is made with, if any.

    Those stand in the section of its name, or in another one's `section`.
    """

    code: str | Callable[..., Any]
    settings: type | None = None
    section: str | None = None


@dataclass(frozen=True)
class Method(Choice):
    """A policy-improvement method; `process` is what it learns from."""

    process: Literal["forward", "reverse", "tokens"] = "forward"


@dataclass(frozen=True)
class TokenFamily(Choice):
    """A model family whose images are tokens, drawn one after another; every other one has a flow."""


C = TypeVar("C", bound=Choice)


class Choices(dict[str, C]):
    def add(self, name: str, choice: C) -> None:
        """Adds what a plugin brings. Raises ValueError for a name that is taken, or none for a setting."""
        if not name.isidentifier():
            raise ValueError(f"{name!r} cannot be chosen by name: accepted are letters, digits and underscores")
        if name in self:
            raise ValueError(f"{name!r} is there already; accepted: a name other than {', '.join(self)}")
        self[name] = choice

    def section_of(self, name: str) -> str:
        """Where the settings of what is called `name` stand; the name itself where nothing is."""
        return (self[name].section if name in self else None) or name

    def make(self, name: str, settings: object) -> Any:
        """What is called `name`, with its section of the settings, which counts only where it has one."""
        choice = self[name]
        code = load_code(choice.code) if isinstance(choice.code, str) else choice.code
        return code() if choice.settings is None else code(settings)


_FLOW_GRPO = "advflow.algorithms.flow_grpo:FlowGRPO"
METHODS = Choices[Method](
    advantage_flow=Method("advflow.algorithms.advantage_flow:AdvantageFlow", AdvantageFlowConfig),
    diffusion_nft=Method("advflow.algorithms.diffusion_nft:DiffusionNFT", DiffusionNFTConfig),
    awm=Method("advflow.algorithms.awm:AWM", AWMConfig),
    flow_awr=Method("advflow.algorithms.flow_awr:FlowAWR", FlowAWRConfig),
    reward_weighted=Method("advflow.algorithms.reward_weighted:RewardWeighted", RewardWeightedConfig),
    flow_grpo=Method(_FLOW_GRPO, FlowGRPOConfig, process="reverse"),
    # DanceGRPO and MixGRPO are Flow-GRPO's loss on another sampler and another window of steps.
    dance_grpo=Method(_FLOW_GRPO, FlowGRPOConfig, section="flow_grpo", process="reverse"),
    mix_grpo=Method(_FLOW_GRPO, FlowGRPOConfig, section="flow_grpo", process="reverse"),
    flow_cps=Method("advflow.algorithms.flow_cps:FlowCPS", FlowCPSConfig, process="reverse"),
    grpo_guard=Method("advflow.algorithms.grpo_guard:GRPOGuard", GRPOGuardConfig, process="reverse"),
    flow_dppo=Method("advflow.algorithms.flow_dppo:FlowDPPO", FlowDPPOConfig, process="reverse"),
    token_grpo=Method("advflow.algorithms.token_grpo:TokenGRPO", TokenGRPOConfig, process="tokens"),
)
"""`algorithm`."""

REWARDS = Choices[Choice](
    embedded=Choice("advflow.rewards.embedded:EmbeddedReward"),
    shapes=Choice("advflow.rewards.shapes:ShapesReward"),
    redness=Choice("advflow.rewards.redness:Redness"),
    compressibility=Choice("advflow.rewards.jpeg:Compressibility"),
    incompressibility=Choice("advflow.rewards.jpeg:Incompressibility"),
    pickscore=Choice("advflow.rewards.pickscore:PickScore"),
    clipscore=Choice("advflow.rewards.clipscore:CLIPScore"),
    hpsv2=Choice("advflow.rewards.hpsv2:HPSv2"),
    aesthetic=Choice("advflow.rewards.aesthetic:Aesthetic"),
    imagereward=Choice("advflow.rewards.imagereward:ImageReward"),
    ocr=Choice("advflow.rewards.ocr:OCR"),
    geneval=Choice("advflow.rewards.geneval:GenEval"),
    remote=Choice("advflow.rewards.remote:RemoteReward"),
)
"""`data.reward`."""

SAMPLERS = Choices[Choice](
    euler=Choice("advflow.samplers.euler:Euler"),
    dpm=Choice("advflow.samplers.dpm:DPM"),
)
"""`rollout.solver`."""

STOCHASTIC_SAMPLERS = Choices[Choice](
    flow_sde=Choice("advflow.samplers.stochastic:FlowSDE"),
    dance_sde=Choice("advflow.samplers.stochastic:DanceSDE"),
    cps=Choice("advflow.samplers.stochastic:CPS"),
)
"""`sde.sampler`."""

FAMILIES = Choices[Choice](
    sd3=Choice("advflow.models.sd3:SD3"),
    llamagen=TokenFamily("advflow.models.llamagen:LlamaGenFamily"),
)
"""`model.family`."""


def load_code(code: str) -> Any:
    """The object called "package.module:name"."""
    module, _, name = code.partition(":")
    return getattr(importlib.import_module(module), name)
