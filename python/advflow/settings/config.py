"""The settings of a run. Every field can be set in YAML and overridden on the command line by its dotted name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

from advflow.settings.capability import CapabilityConfig
from advflow.settings.data import AdvantageConfig, DataConfig, EvalConfig, RolloutConfig
from advflow.settings.methods import (
    LEAST_RHO,
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
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.numbers import require, require_numbers
from advflow.settings.optim import OptimConfig, ReferenceConfig, RolloutPolicyConfig
from advflow.settings.processes import DrawConfig, SDEConfig, require_grid
from advflow.settings.registry import (
    FAMILIES,
    METHODS,
    REWARDS,
    SAMPLERS,
    STOCHASTIC_SAMPLERS,
    Choices,
    TokenFamily,
)
from advflow.settings.tokens import EntropyConfig, LooFIDConfig, TokensConfig
from advflow.settings.tracking import TrackingConfig

T = TypeVar("T")

Algorithm: TypeAlias = Literal[tuple(METHODS)]  # type: ignore[valid-type]  # names that a checker cannot read


@dataclass
class TrainConfig:
    """Everything `advflow train` needs. The defaults post-train the embedded world with AdvantageFlow.

    Args:
        plugins: modules that add algorithms, rewards, samplers or model families, and their sections, to those here, in
            the current folder or installed; on the command line separated by commas.
        algorithm: which policy-improvement method. Named on the command line or in a file of yours, it also brings in
            that method's own settings, where the built-in config has some for it; what you set yourself wins.
        iterations: rollout-and-update rounds.
        seed: seed of all randomness of the run.
        out: folder of the run.
        checkpoint_every: iterations between two checkpoints.
        checkpoints_kept: how many of the newest stay; the best one always does.
        checkpoints_kept_every: those of multiples of so many iterations stay too; null for none.
        device: "auto" is cuda where there is one, else cpu.
    """

    plugins: list[str] = field(default_factory=list)
    algorithm: Algorithm = "advantage_flow"
    iterations: int = 200
    seed: int = 0
    out: str = "runs/tiny"
    checkpoint_every: int = 20
    checkpoints_kept: int = 2
    checkpoints_kept_every: int | None = None
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    capability: CapabilityConfig = field(default_factory=CapabilityConfig)
    draws: DrawConfig = field(default_factory=DrawConfig)
    sde: SDEConfig = field(default_factory=SDEConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    loo_fid: LooFIDConfig = field(default_factory=LooFIDConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rollout_policy: RolloutPolicyConfig = field(default_factory=RolloutPolicyConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    advantage_flow: AdvantageFlowConfig = field(default_factory=AdvantageFlowConfig)
    diffusion_nft: DiffusionNFTConfig = field(default_factory=DiffusionNFTConfig)
    awm: AWMConfig = field(default_factory=AWMConfig)
    flow_awr: FlowAWRConfig = field(default_factory=FlowAWRConfig)
    reward_weighted: RewardWeightedConfig = field(default_factory=RewardWeightedConfig)
    flow_grpo: FlowGRPOConfig = field(default_factory=FlowGRPOConfig)
    grpo_guard: GRPOGuardConfig = field(default_factory=GRPOGuardConfig)
    flow_cps: FlowCPSConfig = field(default_factory=FlowCPSConfig)
    flow_dppo: FlowDPPOConfig = field(default_factory=FlowDPPOConfig)
    token_grpo: TokenGRPOConfig = field(default_factory=TokenGRPOConfig)

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "zero or a positive integer")
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "1 or more")
        require(self.checkpoints_kept >= 1, "checkpoints_kept", self.checkpoints_kept, "1 or more")
        every = self.checkpoints_kept_every
        require(every is None or every >= 1, "checkpoints_kept_every", every, "null, or 1 or more")
        candidates, kept = self.capability.candidates, self.rollout.prompts
        require(
            candidates is None or candidates >= kept,
            "capability.candidates",
            candidates,
            f"rollout.prompts, {kept}, or more, or null",
        )
        combine = self.advantage.combine
        require(
            candidates is None or combine == "weighted_sum",
            "advantage.combine",
            combine,
            '"weighted_sum" with capability.candidates, which holds rewards of different prompts against each other',
        )
        negative = self.rollout.negative_prompt
        require(negative == "" or self.guided, "rollout.negative_prompt", negative, '"" where no guidance is above 1')
        if isinstance(self.method, AdvantageFlowConfig) and self.method.gamma == "auto":
            self._require_rollout_policy()
        least, most = self.entropy.least, self.entropy.most
        require(most >= least, "entropy.most", most, f"entropy.least, {least}, or more")
        self._require_family()
        if self.process == "reverse":
            self._require_stochastic_steps()
        elif self.process == "tokens":
            self._require_tokens()
        else:
            self._require_draws()

    def _require_rollout_policy(self) -> None:
        """What a gamma that tunes itself asks of the policy that it is measured against."""
        policy, reason = self.rollout_policy, 'with advantage_flow.gamma "auto", which never moves otherwise'
        require(policy.rate > 0, "rollout_policy.rate", policy.rate, f"a positive number {reason}")
        enough = policy.maximum >= LEAST_RHO
        require(enough, "rollout_policy.maximum", policy.maximum, f"{LEAST_RHO} or more {reason}")

    def _require_family(self) -> None:
        """A method learns from what its model draws."""
        of_tokens = isinstance(FAMILIES.get(self.model.family), TokenFamily)
        kind = "tokens" if self.process == "tokens" else "latents"
        accepted = f'a family that draws {kind}, with "{self.algorithm}"'
        require(of_tokens == (kind == "tokens"), "model.family", self.model.family, accepted)
        for name, weight in (("entropy", self.entropy.weight), ("loo_fid", self.loo_fid.weight)):
            accepted = f'0 with "{self.algorithm}", which does not learn from tokens'
            require(kind == "tokens" or weight == 0, f"{name}.weight", weight, accepted)

    def _require_tokens(self) -> None:
        """What learning from tokens asks of settings that stand in different sections."""
        model, runtime, rollout = self.model, self.runtime, self.rollout
        for name, given, accepted in (
            ("model.trainable", model.trainable, "full"),
            ("model.dtype", model.dtype, "float32"),
            ("model.vae_dtype", model.vae_dtype, "float32"),
            ("model.vae_batch", model.vae_batch, None),
            ("model.gradient_checkpointing", model.gradient_checkpointing, False),
            ("model.random_weights", model.random_weights, False),
            ("runtime.shard", runtime.shard, False),
            ("runtime.cuda_graphs", runtime.cuda_graphs, False),
            ("rollout.negative_prompt", rollout.negative_prompt, ""),
            ("draws.guidance", self.draws.guidance, 1.0),
        ):
            require(given == accepted, name, given, f'{accepted!r} with "{self.algorithm}"')
        self._require_equal_parts()

    def _require_draws(self) -> None:
        """What the forward process asks of settings that stand in different sections."""
        require_grid(self.draws, self.rollout.steps)
        if self.draws.split == "images":
            method = self.method
            best = isinstance(method, RewardWeightedConfig) and method.method == "best"
            accepted = '"pairs" with reward_weighted.method "best", which compares the images of a prompt'
            require(not best, "draws.split", self.draws.split, accepted)
            self._require_equal_parts()
            return
        share, rest = divmod(self.draws.per_image, self.optim.steps_per_iteration)
        require(
            share >= 1 and rest == 0,
            "optim.steps_per_iteration",
            self.optim.steps_per_iteration,
            f'a divisor of draws.per_image, which is {self.draws.per_image}, or draws.split "images"',
        )

    def _require_stochastic_steps(self) -> None:
        """What the reverse process asks of them."""
        require(
            self.draws.guidance == 1,
            "draws.guidance",
            self.draws.guidance,
            f'1 with "{self.algorithm}", which learns with rollout.guidance',
        )
        name, reach = ("within", self.sde.within) if self.sde.within is not None else ("steps", self.sde.steps)
        if reach > self.rollout.steps - 1:
            raise ValueError(
                f"sde.{name} is {reach}; with rollout.steps={self.rollout.steps} at most {self.rollout.steps - 1} is "
                "accepted (the last step ends at sigma 0, where it has no density)"
            )
        require(
            self.rollout.prompts % self.sde.branches == 0,
            "rollout.prompts",
            self.rollout.prompts,
            f"a multiple of sde.branches, {self.sde.branches}, or some steps would have more groups than others",
        )
        whole = self.rollout.batch % self.rollout.images_per_prompt == 0
        require(
            whole or not self.sde.shared_anchor,
            "rollout.batch",
            self.rollout.batch,
            f"a multiple of rollout.images_per_prompt, {self.rollout.images_per_prompt}, with sde.shared_anchor",
        )
        self._require_equal_parts()
        if self.sde.reweight:
            self._require_one_update_on_policy()

    def _require_one_update_on_policy(self) -> None:
        """What `sde.reweight` asks of them: each ratio is 1, and the gradient of every image is at hand."""
        sde, runtime = self.sde, self.runtime
        for name, given, accepted in (
            ("optim.steps_per_iteration", self.optim.steps_per_iteration, 1),
            ("sde.epochs", sde.epochs, 1),
            ("sde.trained_share", sde.trained_share, 1.0),
            ("sde.anchor", sde.anchor, "stored"),
            ("sde.shared_anchor", sde.shared_anchor, False),
            ("sde.branches", sde.branches, 1),
            ("model.trainable", self.model.trainable, "lora"),
            ("runtime.fused", runtime.fused, True),
            ("runtime.shard", runtime.shard, False),
            ("runtime.compile", runtime.compile, "none"),
        ):
            require(given == accepted, name, given, f"{accepted!r} with sde.reweight")
        merge = runtime.merge_lora
        require(merge != "all", "runtime.merge_lora", merge, "'images' or 'none' with sde.reweight")
        on_policy = self.rollout.policy == "learner" or self.rollout_policy.rate == 0
        accepted = '0 with sde.reweight, whose images the learner draws, or rollout.policy "learner"'
        require(on_policy, "rollout_policy.rate", self.rollout_policy.rate, accepted)

    def _require_equal_parts(self) -> None:
        if self.rollout.images % self.optim.steps_per_iteration:
            raise ValueError(
                f"optim.steps_per_iteration is {self.optim.steps_per_iteration}; accepted are divisors of the "
                f"{self.rollout.images} images of an iteration"
            )

    @property
    def method(self) -> Any:
        """The algorithm's own section."""
        return self.section(METHODS, self.algorithm)

    def section(self, choices: Choices[Any], name: str) -> Any:
        """The settings that what is called `name` is made with; None where it has none."""
        return getattr(self, choices.section_of(name), None)

    @property
    def process(self) -> Literal["forward", "reverse", "tokens"]:
        """What the algorithm learns from."""
        return METHODS[self.algorithm].process

    @property
    def learnt_guidance(self) -> float:
        """That of the velocities that are learnt from."""
        return self.draws.guidance if self.process == "forward" else self.rollout.guidance

    @property
    def guided(self) -> bool:
        """Whether a negative prompt is asked for anywhere."""
        return {self.rollout.guidance, self.draws.guidance, self.evaluation.guidance} != {1}

    @property
    def images(self) -> int:
        """Images drawn in an iteration, those of candidate prompts among them."""
        return self.rollout.images + (self.capability.candidates or 0)

    @property
    def updates(self) -> int:
        """Optimiser steps in an iteration."""
        return (
            self.optim.steps_per_iteration
            * {"forward": 1, "reverse": self.sde.epochs, "tokens": self.tokens.epochs}[self.process]
        )


def config_class() -> type[TrainConfig]:
    """`TrainConfig` with the names and sections that plugins have added. Raises ValueError for one that is taken."""
    lists: tuple[Choices[Any], ...] = (METHODS, REWARDS, SAMPLERS, STOCHASTIC_SAMPLERS, FAMILIES)
    added: dict[str, type] = {}
    for choices in lists:
        for name, choice in choices.items():
            section = choices.section_of(name)
            if choice.settings is None or _TAKEN.get(section) is choice.settings:
                continue
            if section in _TAKEN or added.get(section, choice.settings) is not choice.settings:
                raise ValueError(f"the settings of {name!r} would stand in {section}, which is there already")
            added[section] = choice.settings
    return _extended(_names(), tuple(added.items()))


def _names() -> tuple[tuple[str, ...], ...]:
    """What may be chosen where a setting takes one of several names."""
    return tuple(METHODS), tuple(SAMPLERS), tuple(STOCHASTIC_SAMPLERS), tuple(FAMILIES)


_TAKEN = {each.name: each.default_factory for each in fields(TrainConfig)}
_BUILT_IN = _names()


@cache
def _extended(names: tuple[tuple[str, ...], ...], added: tuple[tuple[str, type], ...]) -> type[TrainConfig]:
    if names == _BUILT_IN and not added:
        return TrainConfig
    methods, samplers, stochastic, families = names
    rollout = _subclass(RolloutConfig, solver=(Literal[samplers], RolloutConfig.solver))
    model = _subclass(ModelConfig, family=(Literal[families], ModelConfig.family))
    sde = _subclass(SDEConfig, sampler=(Literal[stochastic], SDEConfig.sampler))
    sections = {"rollout": rollout, "sde": sde, "model": model, **dict(added)}
    return _subclass(
        TrainConfig,
        algorithm=(Literal[methods], TrainConfig.algorithm),
        **{name: (section, field(default_factory=section)) for name, section in sections.items()},
    )


def _subclass(parent: type[T], **changed: tuple[Any, Any]) -> type[T]:
    """A dataclass that differs from `parent` in the type and the default of some fields, or has more."""
    names = {"__doc__": parent.__doc__, "__module__": parent.__module__}
    new = [(name, hint, default) for name, (hint, default) in changed.items()]
    return make_dataclass(parent.__name__, new, bases=(parent,), namespace=names)
