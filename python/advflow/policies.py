"""The three policies of a run: the learner, the rollout policy that follows it, and the frozen reference."""

from __future__ import annotations

import copy
import warnings
from typing import Literal, Protocol

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from advflow.batch import Needs
from advflow.config import ModelConfig
from advflow.sampling import PromptEmbeddings, velocity

Role = Literal["learner", "rollout", "reference"]


class Policies(Protocol):
    """Three sets of weights of one transformer. `learner` and `rollout` hold parameters in the same order."""

    learner: list[torch.nn.Parameter]
    rollout: list[torch.nn.Parameter]

    def transformer(self, role: Role) -> SD3Transformer2DModel:
        """The transformer with the weights of `role` in force, until the next call."""
        ...


def make_policies(transformer: SD3Transformer2DModel, config: ModelConfig, seed: int) -> Policies:
    """Sets up the three policies, equal at first, on a freshly loaded transformer. `seed` is for new adapters."""
    transformer.requires_grad_(False)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.trainable == "full":
        return FullPolicies(transformer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LoraPolicies(transformer, config)


class FullPolicies:
    """Every weight is trained: three copies of the transformer."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        self._transformers: dict[Role, SD3Transformer2DModel] = {
            "learner": transformer,
            "rollout": copy.deepcopy(transformer),
            "reference": copy.deepcopy(transformer),
        }
        transformer.float().requires_grad_(True)
        self._transformers["rollout"].float()
        self.learner = list(transformer.parameters())
        self.rollout = list(self._transformers["rollout"].parameters())

    def transformer(self, role: Role) -> SD3Transformer2DModel:
        return self._transformers[role]


class LoraPolicies:
    """Two PEFT adapters on one frozen base; the reference is the base with its adapters switched off."""

    _ADAPTERS = ("learner", "rollout")  # named after their roles

    def __init__(self, transformer: SD3Transformer2DModel, config: ModelConfig) -> None:
        self._transformer = transformer
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=config.lora_targets,
        )
        with warnings.catch_warnings():
            # PEFT doubts that a second adapter is meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for adapter in self._ADAPTERS:
                transformer.add_adapter(lora, adapter_name=adapter)
        self.learner, self.rollout = (self._parameters_of(adapter) for adapter in self._ADAPTERS)
        with torch.no_grad():
            for learner, rollout in zip(self.learner, self.rollout, strict=True):
                learner.data = learner.data.float()
                rollout.data = learner.data.clone()

    def _parameters_of(self, adapter: str) -> list[torch.nn.Parameter]:
        return [p for name, p in self._transformer.named_parameters() if f".{adapter}." in name]

    def transformer(self, role: Role) -> SD3Transformer2DModel:
        if role == "reference":
            self._transformer.disable_adapters()
        else:
            self._transformer.enable_adapters()
            self._transformer.set_adapter(role)
            # Switching adapters also switches requires_grad; only the learner may ever collect gradients.
            for parameter in self.rollout:
                parameter.requires_grad_(False)
            for parameter in self.learner:
                parameter.requires_grad_(True)
        return self._transformer


def policy_velocities(
    policies: Policies, needs: Needs, x: torch.Tensor, t: torch.Tensor, prompts: PromptEmbeddings
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The learner's velocity at (x, t), with gradients, and those of rollout policy and reference where needed."""

    def frozen(role: Role) -> torch.Tensor:
        with torch.no_grad():
            return velocity(policies.transformer(role), x, t, prompts)

    v_old = frozen("rollout") if needs.old else None
    v_ref = frozen("reference") if needs.reference else None
    # The learner comes last: with adapters, asking for another policy would switch its gradients off.
    return velocity(policies.transformer("learner"), x, t, prompts), v_old, v_ref


@torch.no_grad()
def follow(policies: Policies, rho: float) -> None:
    """Moves the rollout policy towards the learner: theta_old <- rho theta_old + (1 - rho) theta."""
    torch._foreach_lerp_(tuple(policies.rollout), tuple(policies.learner), 1.0 - rho)
