"""One step of reinforcement learning on SD3.5's transformer in each of the ways that `bench.step` compares.

The steps are the loop's own: :func:`advflow.samplers.sampling.sample_latents` for the rollout and
:func:`advflow.policies.policy_velocities` for training. Variants differ in who holds the policies, in what the blocks
run on and in who wrote the loss.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from advflow.algorithms import make_algorithm
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.models.family import FusedKernels, ModelFamily
from advflow.models.sd3 import SD3, PromptEmbeddings, sigma_grid
from advflow.policies import (
    GraphedPolicies,
    Policies,
    Role,
    compile_blocks,
    follow,
    make_policies,
    places_among,
    policy_velocities,
    velocity_of,
)
from advflow.processes.forward import Draw
from advflow.samplers.euler import Euler
from advflow.samplers.sampling import sample_latents
from advflow.settings.config import TrainConfig
from advflow.settings.model import ModelConfig, RuntimeConfig
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn

from advflow_ext.conformance.advantage_flow import advantage_flow_loss
from advflow_ext.conformance.diffusion_nft import diffusion_nft_loss
from bench.roofline.models import SIZES, Work, lora_config
from bench.step.profile import LOSS, UPDATE, stage

Backward = Callable[[Tensor], None]
Loss = Callable[[Tensor, Tensor, Tensor, "Inputs", Tensor, Tensor, Draw], Tensor]

ROLLOUT_DECAY = 0.5  # rho of the rollout policy's average: it moves, so that merged weights are merged anew
_PERTURBATION = 0.01  # of the adapters' B, which PEFT makes zero: no policy would differ from another


@dataclass(frozen=True)
class Inputs:
    """What every variant is given: noise [B, C, H, W] in fp32, the sampler's grid, one draw for each timestep.

    Advantages are [B] in [-1, 1]; the prompts' dtype is that of the forward passes.
    """

    noise: Tensor
    prompts: PromptEmbeddings
    advantages: Tensor
    sigmas: list[float]
    draws: list[Draw]

    def __getitem__(self, rows: slice) -> Inputs:
        draws = [Draw(draw.t[rows], draw.noise[rows]) for draw in self.draws]
        return Inputs(self.noise[rows], self.prompts[rows], self.advantages[rows], self.sigmas, draws)

    def in_fp32(self) -> Inputs:
        """The same numbers, for forward passes without autocast."""
        return replace(self, prompts=PromptEmbeddings(self.prompts.tokens.float(), self.prompts.pooled.float()))


def make_inputs(work: Work, steps: int, timesteps: int, device: torch.device) -> Inputs:
    """The same numbers each time, whatever the device."""
    config, generator = SIZES[work.model].config(), torch.Generator().manual_seed(0)
    side = work.px // SIZES[work.model].pixels_per_latent

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    latent = (work.batch, config["in_channels"], side, side)
    tokens = normal(work.batch, work.text_tokens, config["joint_attention_dim"])
    prompts = PromptEmbeddings(tokens.bfloat16(), normal(work.batch, config["pooled_projection_dim"]).bfloat16())
    draws = [
        Draw((1.0 - torch.rand(work.batch, generator=generator)).to(device), normal(*latent)) for _ in range(timesteps)
    ]
    sigmas = sigma_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), steps)
    return Inputs(normal(*latent), prompts, normal(work.batch).clamp(-1, 1), sigmas, draws)


def make_base(model: str, device: torch.device) -> SD3Transformer2DModel:
    """The transformer with random weights in bf16, frozen."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        base = SD3Transformer2DModel(**SIZES[model].config())
    # Past diffusers' own `to`, which warns of modules that SD3 does not have.
    return nn.Module.to(base, device, torch.bfloat16).requires_grad_(False)


def sharing(base: nn.Module) -> Any:
    """A transformer of its own on the tensors of `base`."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def adapter_weights(transformer: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter by their names, the adapter's own name left out."""
    named = transformer.named_parameters()
    return {name.replace(f".{adapter}.", "."): p for name, p in named if "lora_" in name and f".{adapter}." in name}


class StockPolicies:
    """The three policies as public trainers have them: PEFT's own switches, adapters in fp32, nothing merged."""

    family: ModelFamily = SD3()
    kernels: FusedKernels | None = None
    all_merged = False

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        self._transformer = transformer
        with warnings.catch_warnings():
            # PEFT doubts that a second adapter is meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for adapter in ("learner", "rollout"):
                transformer.add_adapter(lora_config(), adapter_name=adapter)
        self.learner, self.rollout = (
            list(adapter_weights(transformer, name).values()) for name in ("learner", "rollout")
        )
        self.places = places_among(transformer, self.learner)
        for parameter in (*self.learner, *self.rollout):
            parameter.data = parameter.data.float()
        self._role: Role = "reference"
        self.transformer("learner")

    def transformer(self, role: Role, *, for_images: bool = False) -> SD3Transformer2DModel:
        if role == "reference":
            self._transformer.disable_adapters()
        else:
            if self._role == "reference":
                self._transformer.enable_adapters()
            self._transformer.set_adapter(role)
        self._role = role
        return self._transformer

    def check(self) -> None:
        """Nobody replaces parameters in the bench."""

    def export(self, folder: Path) -> None:
        self.family.save(self._transformer, "learner", folder)

    def shared_modulation(self) -> AbstractContextManager[object]:
        return nullcontext()


def _public_loss(algorithm: str) -> Loss:
    """As the trainers write it; advantages come from numpy in float64."""
    config = TrainConfig()

    def loss(v: Tensor, v_old: Tensor, v_ref: Tensor, inputs: Inputs, x0: Tensor, x_t: Tensor, draw: Draw) -> Tensor:
        velocities = v, x0, x_t, draw.t, inputs.advantages.double(), v_old, v_ref
        if algorithm == "advantage_flow":
            chosen = config.advantage_flow
            assert isinstance(chosen.gamma, float)
            return advantage_flow_loss(*velocities, chosen.gamma, chosen.lam)
        nft = config.diffusion_nft
        return diffusion_nft_loss(*velocities, nft.beta, nft.adv_clip_max, nft.kl_weight)

    return loss


def _our_loss(algorithm: str) -> Loss:
    method = make_algorithm(algorithm, TrainConfig(algorithm=algorithm).method)

    def loss(v: Tensor, v_old: Tensor, v_ref: Tensor, inputs: Inputs, x0: Tensor, x_t: Tensor, draw: Draw) -> Tensor:
        a = inputs.advantages
        batch = ForwardBatch(v, v_old, v_ref, x0, draw.noise, draw.t, a, a, group_size=1, reference_scale=1.0)
        value: Tensor = method.loss(batch).loss
        return value

    return loss


def _compiled(device: torch.device) -> AbstractContextManager[object]:
    """Within it, modules are compiled by Inductor, on a CPU traced by its front end alone, which takes seconds."""
    if device.type == "cuda":
        return nullcontext()
    return mock.patch.object(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))


class Variant:
    """One way of taking the step, on tensors of `base`.

    Args:
        name: one of `bench.step.VARIANTS`.
        base: what :func:`make_base` gave; ``stock-fp32`` has a copy in fp32, the others share its tensors.
        algorithm: whose loss.
    """

    def __init__(self, name: str, base: SD3Transformer2DModel, algorithm: str) -> None:
        self.name = name
        self.shares_base = name != "stock-fp32"
        self.model = sharing(base) if self.shares_base else nn.Module.float(copy.deepcopy(base))
        device = next(base.parameters()).device
        ours, compiled, graphed = name.startswith("ours"), "compile" in name, name.endswith("graph")
        self.closed = compiled or graphed  # a profile sees no modules in it
        self._loss = (_our_loss if ours else _public_loss)(algorithm)
        with _compiled(device):
            self.policies = _loop_policies(self.model, compiled) if ours else _stock_policies(self.model, compiled)
        if graphed:
            self.policies = GraphedPolicies(self.policies)
        _start(self.model)
        self._optimizer = torch.optim.AdamW(self.policies.learner, lr=TrainConfig().optim.lr)
        self._x0: Tensor | None = None

    def roll_out(self, inputs: Inputs) -> None:
        """Draws the batch's images with the rollout policy."""
        with torch.no_grad():
            velocity = velocity_of(self.policies, "rollout", for_images=True)
        self._x0 = sample_latents(velocity, inputs.noise, inputs.sigmas, inputs.prompts, Euler())

    def train(self, inputs: Inputs) -> None:
        """One optimiser step on the last rollout's images, each at every draw's timestep."""
        for draw in inputs.draws:
            self.accumulate(inputs, draw, self._x0 if self._x0 is not None else inputs.noise)
        self.update()

    def accumulate(self, inputs: Inputs, draw: Draw, x0: Tensor, backward: Backward = Tensor.backward) -> Tensor:
        """Forward passes of the three policies and the backward pass to the learner. Returns the learner's velocity."""
        x_t = torch.lerp(x0, draw.noise, draw.t.view(-1, 1, 1, 1))
        v, v_old, v_ref = policy_velocities(self.policies, Needs(True, True), x_t, draw.t, inputs.prompts)
        assert v_old is not None and v_ref is not None
        with stage(LOSS):
            loss = self._loss(v, v_old, v_ref, inputs, x0, x_t, draw) / len(inputs.draws)
        backward(loss)
        return v.detach()

    def update(self) -> None:
        """The optimiser's step; the rollout policy follows."""
        with stage(UPDATE):
            torch.nn.utils.clip_grad_norm_(self.policies.learner, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            follow(self.policies, ROLLOUT_DECAY)

    def switch_to_rollout(self) -> None:
        """Puts the rollout policy in force for images, merging its weights anew where they are merged."""
        with stage(UPDATE), torch.no_grad():
            self.policies.transformer("rollout", for_images=True)

    def outcome(self, inputs: Inputs, at_a_time: int | None = None) -> Outcome:
        """What it computes at the first draw, nothing being updated, in batches of some images or in one."""
        count = len(inputs.noise)
        parts = [
            self._velocities(inputs[start : start + (at_a_time or count)], count)
            for start in range(0, count, at_a_time or count)
        ]
        learner, images = (torch.cat(each).float() for each in zip(*parts, strict=True))
        weights = adapter_weights(self.model, "learner")
        gradients = torch.cat([weights[name].grad.flatten() for name in sorted(weights)])  # type: ignore[union-attr]
        self._optimizer.zero_grad(set_to_none=True)
        return Outcome(learner, images, gradients)

    def _velocities(self, part: Inputs, count: int) -> tuple[Tensor, Tensor]:
        """The learner's, whose gradients it adds up as shares of a batch of `count`, and those that make images."""
        draw, x0 = part.draws[0], part.noise
        x_t = torch.lerp(x0, draw.noise, draw.t.view(-1, 1, 1, 1))
        with torch.no_grad():
            images = velocity_of(self.policies, "rollout", for_images=True)(x_t, draw.t, part.prompts)
        share = len(x0) * len(part.draws) / count
        return self.accumulate(part, draw, x0, lambda loss: (share * loss).backward()), images


@dataclass(frozen=True)
class Outcome:
    """The learner's velocity, the rollout policy's where images are made, and every gradient of the adapters, fp32."""

    velocity: Tensor
    rollout_velocity: Tensor
    gradients: Tensor


def exact_outcome(base: SD3Transformer2DModel, algorithm: str, inputs: Inputs) -> Outcome:
    """Stock's in fp32 throughout, on the same bf16 weights; two images at a time, as their activations are large."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return Variant("stock-fp32", base, algorithm).outcome(inputs.in_fp32(), at_a_time=2)


def _loop_policies(transformer: SD3Transformer2DModel, compiled: bool) -> Policies:
    runtime = RuntimeConfig(compile="regional" if compiled else "none")
    return make_policies(SD3(), transformer, ModelConfig(trainable="lora", dtype="bfloat16"), runtime, seed=0)


def _stock_policies(transformer: SD3Transformer2DModel, compiled: bool) -> Policies:
    policies = StockPolicies(transformer)
    if compiled:
        compile_blocks(SD3(), transformer)
    return policies


@torch.no_grad()
def _start(transformer: nn.Module) -> None:
    """Gives the adapters of learner and rollout policy weights that are small, differ, and are those of any variant."""
    generator = torch.Generator().manual_seed(1)
    adapters = [adapter_weights(transformer, adapter) for adapter in ("learner", "rollout")]
    for name in sorted(adapters[0]):
        for weights in adapters:
            scale = _PERTURBATION if "lora_B" in name else 1.0
            shape = weights[name].shape
            weights[name].copy_(scale * torch.randn(shape, generator=generator) / shape[1] ** 0.5)
