"""The settings of a run. Every field can be set in YAML and overridden on the command line by its dotted name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from advflow.settings.data import AdvantageConfig, DataConfig, EvalConfig, RolloutConfig
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
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.numbers import require, require_numbers
from advflow.settings.optim import OptimConfig, ReferenceConfig, RolloutPolicyConfig
from advflow.settings.processes import DrawConfig, SDEConfig, require_grid
from advflow.settings.registry import METHODS, section_of

if TYPE_CHECKING:
    Algorithm = str
else:
    Algorithm = Literal[tuple(METHODS)]


@dataclass
class TrainConfig:
    """Everything `advflow train` needs. The defaults post-train the embedded world with AdvantageFlow.

    Args:
        algorithm: which policy-improvement method. Named on the command line or in a file of yours, it also brings in
            that method's own settings, where the built-in config has some for it; what you set yourself wins.
        iterations: rollout-and-update rounds.
        seed: seed of all randomness of the run.
        out: folder of the run.
        checkpoint_every: iterations between two checkpoints.
        device: "auto" is cuda where there is one, else cpu.
    """

    algorithm: Algorithm = "advantage_flow"
    iterations: int = 200
    seed: int = 0
    out: str = "runs/tiny"
    checkpoint_every: int = 20
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    draws: DrawConfig = field(default_factory=DrawConfig)
    sde: SDEConfig = field(default_factory=SDEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rollout_policy: RolloutPolicyConfig = field(default_factory=RolloutPolicyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    advantage_flow: AdvantageFlowConfig = field(default_factory=AdvantageFlowConfig)
    diffusion_nft: DiffusionNFTConfig = field(default_factory=DiffusionNFTConfig)
    awm: AWMConfig = field(default_factory=AWMConfig)
    flow_awr: FlowAWRConfig = field(default_factory=FlowAWRConfig)
    reward_weighted: RewardWeightedConfig = field(default_factory=RewardWeightedConfig)
    flow_grpo: FlowGRPOConfig = field(default_factory=FlowGRPOConfig)
    grpo_guard: GRPOGuardConfig = field(default_factory=GRPOGuardConfig)
    flow_cps: FlowCPSConfig = field(default_factory=FlowCPSConfig)
    flow_dppo: FlowDPPOConfig = field(default_factory=FlowDPPOConfig)

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "zero or a positive integer")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "1 or more")
        if self.process == "reverse":
            self._require_stochastic_steps()
        else:
            self._require_draws()

    def _require_draws(self) -> None:
        """What the forward process asks of settings that stand in different sections."""
        require_grid(self.draws, self.rollout.steps)
        share, rest = divmod(self.draws.per_image, self.optim.steps_per_iteration)
        require(
            share >= 1 and rest == 0,
            "optim.steps_per_iteration",
            self.optim.steps_per_iteration,
            f"a divisor of draws.per_image, which is {self.draws.per_image}",
        )

    def _require_stochastic_steps(self) -> None:
        """What the reverse process asks of them."""
        name, reach = ("within", self.sde.within) if self.sde.within is not None else ("steps", self.sde.steps)
        if reach > self.rollout.steps - 1:
            raise ValueError(
                f"sde.{name} is {reach}; with rollout.steps={self.rollout.steps} at most {self.rollout.steps - 1} is "
                "accepted (the last step ends at sigma 0, where it has no density)"
            )
        if self.rollout.images % self.optim.steps_per_iteration:
            raise ValueError(
                f"optim.steps_per_iteration is {self.optim.steps_per_iteration}; accepted are divisors of the "
                f"{self.rollout.images} images of an iteration"
            )

    @property
    def method(self) -> Any:
        """The algorithm's own section."""
        return getattr(self, section_of(self.algorithm))

    @property
    def process(self) -> Literal["forward", "reverse"]:
        """What the algorithm learns from."""
        return METHODS[self.algorithm].process

    @property
    def updates(self) -> int:
        """Optimiser steps in an iteration."""
        return self.optim.steps_per_iteration * (self.sde.epochs if self.process == "reverse" else 1)
