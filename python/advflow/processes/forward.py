"""The forward process of a rollout: which (t, noise) each image meets, and the three velocities there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from advflow.algorithms import ForwardAlgorithm
from advflow.algorithms.batch import Experience, ForwardBatch, WeightedLoss
from advflow.control.gamma import GammaControl
from advflow.control.reference import ReferenceControl
from advflow.core.randomness import generator, shuffled_parts
from advflow.core.ranks import batches, within
from advflow.models.family import Latents
from advflow.policies import Policies, Role, policy_velocities, velocity_of
from advflow.processes.metrics import WeightedMetrics
from advflow.samplers.sampling import Conditioning, Sampler, Velocity, like, sample_latents
from advflow.settings.optim import OptimConfig
from advflow.settings.processes import DrawConfig, require_grid


@dataclass(frozen=True)
class Draw:
    """One (t, noise) pair for every image of this process: t [N] in (0, 1], noise [N, ...]."""

    t: torch.Tensor
    noise: torch.Tensor


class Draws:
    """The (t, noise) pairs of a run; pair `index` of an iteration depends on the seed and nothing drawn before."""

    def __init__(self, config: DrawConfig, latents: Latents, sigmas: list[float], seed: int) -> None:
        require_grid(config, len(sigmas) - 1)
        self._config, self._latents, self._seed = config, latents, seed
        self._grid = torch.tensor(sigmas[:-1])

    def shares(self, iteration: int, images: int, steps: int) -> list[tuple[range, torch.Tensor]]:
        """For each of so many optimiser steps the pairs, and the images, numbered over all processes, that are its."""
        per_image = self._config.per_image
        if self._config.split == "images":
            return [(range(per_image), part) for part in shuffled_parts(images, steps, self._seed, iteration)]
        share = per_image // steps
        return [(range(step * share, (step + 1) * share), torch.arange(images)) for step in range(steps)]

    def draw(self, iteration: int, index: int, experience: Experience) -> Draw:
        config, device = self._config, experience.x0.device
        repeat = experience.images_per_prompt if config.noise == "shared_in_group" else 1
        count = experience.images // repeat
        number = iteration * config.per_image + index
        t = self._times(iteration, index, count, generator(self._seed, "time", number))
        noise = self._latents.noise(count, generator(self._seed, "noise", number), device)
        rows = experience.rows
        return Draw(t.to(device).repeat_interleave(repeat)[rows], noise.repeat_interleave(repeat, dim=0)[rows])

    def _times(self, iteration: int, index: int, count: int, rng: torch.Generator) -> torch.Tensor:
        config = self._config
        if config.timesteps == "sampler_grid":
            # The same order for every pair of an iteration, so that an image never meets a timestep twice.
            shuffle = torch.rand(count, len(self._grid), generator=generator(self._seed, "grid", iteration)).argsort(1)
            return self._grid[shuffle[:, index]]
        t = 1.0 - torch.rand(count, generator=rng)  # (0, 1]
        if config.timesteps == "stratified":
            # Neighbours start in different strata: every pair covers all of (0, 1] across the batch.
            stratum = (torch.arange(count) + index) % config.per_image
            t = (stratum + t) / config.per_image
        return t / (t + (1 - t) / config.shift)  # never above 1


class ForwardProcess:
    """Turns the images of a rollout into optimiser steps of a forward-process algorithm."""

    def __init__(
        self,
        policies: Policies,
        algorithm: ForwardAlgorithm,
        draws: Draws,
        sampler: Sampler,
        sigmas: list[float],
        control: ReferenceControl,
        gamma: GammaControl | None,
        optim: OptimConfig,
    ) -> None:
        self._policies, self._algorithm, self._draws = policies, algorithm, draws
        self._control, self._gamma = control, gamma
        self._sampler, self._sigmas, self._optim = sampler, sigmas, optim

    def policy(self, role: Role) -> Velocity:
        return velocity_of(self._policies, role, for_images=True)

    def starting_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def sample(
        self,
        policy: Velocity,
        noise: torch.Tensor,
        conditioning: Conditioning,
        iteration: int,
        first_image: int,
    ) -> tuple[torch.Tensor, None]:
        return sample_latents(policy, noise, self._sigmas, conditioning, self._sampler), None

    def diagnose(self, parts: list[WeightedMetrics]) -> dict[str, float]:
        return {}

    def steps(self, iteration: int, experience: Experience) -> Iterator[Iterator[WeightedLoss]]:
        """For each optimiser step the losses of its micro-batches, whose weights sum to 1 over all processes."""
        for pairs, images in self._draws.shares(iteration, experience.images, self._optim.steps_per_iteration):
            yield self._losses(iteration, experience, pairs, images)

    def _losses(
        self, iteration: int, experience: Experience, pairs: range, images: torch.Tensor
    ) -> Iterator[WeightedLoss]:
        most = max(len(within(images, share)) for share in experience.in_step)
        own = within(images, experience.rows).to(experience.x0.device) - experience.rows.start
        first = own.new_zeros(1)  # `images` may have none of this process
        for index in pairs:
            draw = self._draws.draw(iteration, index, experience)
            for rows, used in batches(len(own), self._optim.micro_batch, most):
                batch = self._batch(experience, draw, own[rows] if used else first)
                weight = len(batch.t) / (len(images) * len(pairs)) if used else 0.0
                yield WeightedLoss(self._algorithm.loss(batch), weight)

    def _batch(self, experience: Experience, draw: Draw, rows: torch.Tensor | slice) -> ForwardBatch:
        """Evaluates the policies at x_t = (1 - t) x0 + t noise for some `rows` of a rollout."""
        x0, noise, t = experience.x0[rows], draw.noise[rows], draw.t[rows]
        x_t = torch.lerp(x0, noise, like(t, x0))
        v, v_old, v_ref = policy_velocities(
            self._policies, self._algorithm.needs, x_t, t, experience.conditioning[rows]
        )
        rewards, advantages = experience.rewards[rows], experience.advantages[rows]
        group = experience.images_per_prompt
        batch = ForwardBatch(v, v_old, v_ref, x0, noise, t, rewards, advantages, group, self._control.scale)
        return batch if self._gamma is None else replace(batch, rollout_weight=self._gamma.gamma)
