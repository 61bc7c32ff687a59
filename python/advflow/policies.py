"""The three policies of a run: the learner, the rollout policy that follows it, and the frozen reference."""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from diffusers import ModelMixin
from peft import LoraConfig

import advflow_ext as af
from advflow.algorithms.batch import Needs
from advflow.core.ranks import Ranks
from advflow.core.sharding import shard, whole_state
from advflow.models.adapters import Adapter
from advflow.models.family import AnyFamily, FusedKernels, ModelFamily
from advflow.samplers.guidance import guided
from advflow.samplers.sampling import Conditioning, Velocity
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow_ext.policies.parameters import Place, move_towards, places_of, require_in_place

Role = Literal["learner", "rollout", "reference"]


class Policies(Protocol):
    """Three sets of weights of one transformer. `learner` and `rollout` hold parameters in the same order.

    `kernels` is what the family's fused kernels run; None where they were not asked for. `all_merged`: forward passes
    without gradients run on merged weights, so that even equal policies differ by rounding. `places` are where the
    transformer holds the learner's parameters, in their order.
    """

    learner: list[torch.nn.Parameter]
    rollout: list[torch.nn.Parameter]
    kernels: FusedKernels | None
    all_merged: bool
    places: list[Place]

    @property
    def family(self) -> AnyFamily: ...

    def transformer(self, role: Role, *, for_images: bool = False) -> ModelMixin:
        """The transformer with the weights of `role` in force, until the next call.

        `for_images` says that only images are made with it, without gradients, and that none of its velocities will be
        compared with another policy's: its weights may then be rounded in another way.
        """
        ...

    def check(self) -> None:
        """Raises RuntimeError where `learner` and `rollout` are not the transformer's parameters any more."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the learner into a folder as stock diffusers loads it: an adapter, or a transformer of its own.

        Sharded processes call it together, and the first writes.
        """
        ...

    def shared_modulation(self) -> AbstractContextManager[object]:
        """While it is open, the policies share what they make of one batch's timesteps and pooled text."""
        ...


def make_policies(
    family: AnyFamily,
    transformer: ModelMixin,
    config: ModelConfig,
    runtime: RuntimeConfig,
    seed: int,
    start: Adapter | None = None,
    ranks: Ranks | None = None,
) -> Policies:
    """Sets up the three policies on a freshly loaded transformer: all equal, or, with `start`, two of them with it.

    `seed` is for new adapters. Of `ranks` that are sharded each keeps a part of every weight but the adapters'. Raises
    ValueError for a `start` that does not fit.
    """
    ranks = ranks or Ranks()
    transformer.requires_grad_(False)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    policies: Policies
    if config.trainable == "full":
        policies = FullPolicies(family, transformer, runtime, ranks)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            policies = LoraPolicies(cast(ModelFamily, family), transformer, config, runtime, start, ranks)
    return GraphedPolicies(policies) if runtime.cuda_graphs else policies


def _speed_up(family: AnyFamily, transformer: ModelMixin, runtime: RuntimeConfig) -> FusedKernels | None:
    """Fused kernels, and regional compilation of what is then left of the blocks."""
    kernels = family.fuse(transformer) if runtime.fused else None
    if runtime.compile == "regional":
        compile_blocks(family, transformer)
    return kernels


def compile_blocks(family: AnyFamily, transformer: ModelMixin) -> None:
    # Every kind of block is compiled for each policy, with and without gradients, and for some batch sizes; past the
    # limit torch would go on uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in family.blocks(transformer):
        block.compile()


class FullPolicies:
    """Every weight is trained: three copies of the transformer."""

    all_merged = False

    def __init__(self, family: AnyFamily, transformer: ModelMixin, runtime: RuntimeConfig, ranks: Ranks) -> None:
        self.family, self._ranks = family, ranks

        def settled(its: ModelMixin) -> ModelMixin:
            if ranks.sharded:  # one after the other, so that never all are whole
                shard(its, family.blocks(its))
            return its

        self._outline = copy.deepcopy(transformer).to("meta") if ranks.sharded else None
        reference = settled(copy.deepcopy(transformer))
        rollout = settled(copy.deepcopy(transformer).float())
        transformer = settled(transformer.float().requires_grad_(True))
        self._transformers: dict[Role, ModelMixin] = {
            "learner": transformer,
            "rollout": rollout,
            "reference": reference,
        }
        self.learner = list(transformer.parameters())
        self.rollout = list(rollout.parameters())
        self._places = {role: places_of([self._transformers[role]]) for role in ("learner", "rollout")}
        self.places = self._places["learner"]
        # In the same places of each, so that what is said of the learner's is said of all.
        self.kernels = [_speed_up(family, each, runtime) for each in self._transformers.values()][0]

    def transformer(self, role: Role, *, for_images: bool = False) -> ModelMixin:
        self.check()
        return self._transformers[role]

    def check(self) -> None:
        for role, places in self._places.items():
            require_in_place(places, f"the parameters of {role!r}")

    def export(self, folder: Path) -> None:
        learner = self._transformers["learner"]
        if self._outline is None:
            self.family.save(learner, None, folder)
            return
        state = whole_state(learner, self._ranks.first)
        if self._ranks.first:  # FSDP2's classes have other names, which stock diffusers does not know
            self._outline.load_state_dict(state, assign=True)
            self.family.save(self._outline, None, folder)
            self._outline.to("meta")

    def shared_modulation(self) -> AbstractContextManager[object]:
        return nullcontext()  # each has a modulation of its own


class LoraPolicies:
    """Two PEFT adapters on one frozen base; the reference is the base with its adapters switched off.

    Also where they start from one that was given, as in flow_grpo, DiffusionNFT and Flow-Factory.
    """

    _ADAPTERS = ("learner", "rollout")  # named after their roles

    def __init__(
        self,
        family: ModelFamily,
        transformer: ModelMixin,
        config: ModelConfig,
        runtime: RuntimeConfig,
        start: Adapter | None,
        ranks: Ranks,
    ) -> None:
        self.family, self._transformer, self._merge = family, transformer, runtime.merge_lora
        self._ranks = ranks
        self.all_merged = runtime.merge_lora == "all"
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(family.lora_targets) if config.lora_targets is None else config.lora_targets,
        )
        with warnings.catch_warnings():
            # PEFT doubts that a second adapter is meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for adapter in self._ADAPTERS:
                transformer.add_adapter(lora, adapter_name=adapter)
        roles = {adapter: adapter for adapter in self._ADAPTERS} | {"reference": None}
        self._policies = af.PolicySet(transformer, roles, merged_bytes=int(runtime.merged_gigabytes * 1e9))
        self.learner, self.rollout = (self._policies.parameters(adapter) for adapter in self._ADAPTERS)
        for learner in self.learner:
            learner.data = learner.data.float()
        if start is not None:
            start.load_into(transformer, "learner")
        with torch.no_grad():
            for learner, rollout in zip(self.learner, self.rollout, strict=True):
                rollout.data = learner.data.clone()
                learner.requires_grad_(True)
                rollout.requires_grad_(False)
        if ranks.sharded:
            shard(transformer, family.blocks(transformer), whole=[*self.learner, *self.rollout])
        self.places = places_among(transformer, self.learner)
        self.kernels = _speed_up(family, transformer, runtime)
        self._modulation = family.modulation_cache(transformer) if runtime.modulation_cache else nullcontext()

    def transformer(self, role: Role, *, for_images: bool = False) -> ModelMixin:
        allowed = self.all_merged or (self._merge == "images" and for_images)
        self._policies.activate(role, merged=allowed and (for_images or not torch.is_grad_enabled()))
        return self._transformer

    def check(self) -> None:
        self._policies.check()

    def export(self, folder: Path) -> None:
        if self._ranks.first:
            self.family.save(self._transformer, "learner", folder)

    def shared_modulation(self) -> AbstractContextManager[object]:
        return self._modulation


def places_among(transformer: ModelMixin, parameters: list[torch.nn.Parameter]) -> list[Place]:
    """Where `transformer` holds those `parameters`, in their order."""
    places = {place.thing: place for place in places_of([transformer])}
    return [places[parameter] for parameter in parameters]


class GraphedPolicies:
    """`policies` whose forward and backward passes are replayed as CUDA graphs, where there is a GPU."""

    def __init__(self, policies: Policies) -> None:
        self._policies = policies
        self._graphs: dict[ModelMixin, af.CudaGraphs] = {}
        self.learner, self.rollout, self.kernels = policies.learner, policies.rollout, policies.kernels
        self.family, self.all_merged, self.places = policies.family, policies.all_merged, policies.places

    def transformer(self, role: Role, *, for_images: bool = False) -> Any:
        transformer = self._policies.transformer(role, for_images=for_images)
        if transformer not in self._graphs:
            self._graphs[transformer] = _graphs_of(transformer)
        graphs = self._graphs[transformer]

        def replay(*inputs: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (graphs((role, for_images), *inputs),)

        return replay

    def check(self) -> None:
        self._policies.check()

    def export(self, folder: Path) -> None:
        self._policies.export(folder)

    def shared_modulation(self) -> AbstractContextManager[object]:
        return nullcontext()  # a recording must not read what another pass has made


def _graphs_of(transformer: ModelMixin) -> af.CudaGraphs:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        velocity: torch.Tensor = transformer(*inputs, return_dict=False)[0]
        return velocity

    return af.CudaGraphs(run, transformer)


def velocity_of(policies: Policies, role: Role, *, for_images: bool = False) -> Velocity:
    """The velocity of `role`, in force until the next policy is. `for_images` as in `Policies.transformer`."""
    family, transformer = _flow(policies), policies.transformer(role, for_images=for_images)

    def velocity(x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        timestep = family.timesteps(t)
        return guided(lambda told: family.velocity(transformer, x, timestep, told), conditioning)

    return velocity


def policy_velocities(
    policies: Policies, needs: Needs, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The learner's velocity at (x, t), with gradients, and those of rollout policy and reference where needed."""
    family = _flow(policies)
    timestep = family.timesteps(t)

    def velocity(role: Role) -> torch.Tensor:
        transformer = policies.transformer(role)
        return guided(lambda told: family.velocity(transformer, x, timestep, told), conditioning)

    def frozen(role: Role) -> torch.Tensor:
        with torch.no_grad():
            return velocity(role)

    with policies.shared_modulation():
        v_old = frozen("rollout") if needs.old else None
        v_ref = frozen("reference") if needs.reference else None
        # The learner comes last and stays in force: a checkpointed backward pass runs its forward again.
        return velocity("learner"), v_old, v_ref


def _flow(policies: Policies) -> ModelFamily:
    """Nobody asks a model of tokens for velocities, which the settings see to."""
    return cast(ModelFamily, policies.family)


def follow(policies: Policies, rho: float) -> None:
    """Moves the rollout policy towards the learner: theta_old <- rho theta_old + (1 - rho) theta.

    Raises ValueError for a rho outside [0, 1].
    """
    policies.check()
    move_towards(policies.rollout, policies.learner, rho)
