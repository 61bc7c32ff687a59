"""The reverse process of a rollout: stochastic sampling that keeps what is learnt from, and the steps of learning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

import advflow_ext as af
from advflow.algorithms import ReverseAlgorithm
from advflow.algorithms.batch import Experience, Needs, ReverseBatch, Transitions, WeightedLoss
from advflow.core.randomness import generator, shuffled_parts
from advflow.core.ranks import batches, within
from advflow.policies import Policies, Role, policy_velocities, velocity_of
from advflow.processes.metrics import WeightedMetrics, join_metrics
from advflow.samplers.euler import euler_step
from advflow.samplers.sampling import Conditioning, Velocity, like
from advflow.samplers.stochastic import Steps
from advflow.settings.data import RolloutConfig
from advflow.settings.optim import OptimConfig
from advflow.settings.processes import SDEConfig


def stochastic_steps(config: SDEConfig, sampler_steps: int, iteration: int, seed: int) -> list[int]:
    """The sampler steps that are stochastic in this iteration, in order."""
    size, within = config.steps, reachable_steps(config, sampler_steps)
    rng = generator(seed, "window", iteration)
    if config.window == "first":
        return list(range(size))
    if config.window == "random":
        return sorted(torch.randperm(within, generator=rng)[:size].tolist())
    if config.branches > 1:
        return [number * within // config.branches for number in range(config.branches)]
    if config.window == "sliding":
        start = (iteration // config.shift_every) % (within - size + 1)
    else:
        start = int(torch.randint(within - size + 1, (1,), generator=rng))
    return list(range(start, start + size))


def reachable_steps(config: SDEConfig, sampler_steps: int) -> int:
    """How many of the first sampler steps may be stochastic in some iteration."""
    if config.window == "first":
        return config.steps
    if config.window == "sliding":
        return sampler_steps - 1  # the last step ends at sigma 0 and is never learnt from
    return config.within if config.within is not None else max(config.steps, sampler_steps // 2)


class StochasticSampler:
    """Draws images by the SDE inside a window of steps and by the Euler ODE outside."""

    def __init__(self, config: SDEConfig, steps: Steps, rollout: RolloutConfig, sigmas: list[float], seed: int) -> None:
        self._config, self._steps, self._rollout, self._sigmas, self._seed = config, steps, rollout, sigmas, seed
        self._table = af.StepTable(sigmas, stochastic_steps=())
        try:
            self.table(list(range(reachable_steps(config, len(sigmas) - 1))))  # a bad step is seen here, not later
        except ValueError as error:
            raise ValueError(f"sde.noise_level is {config.noise_level}, with this sampler: {error}") from error

    def table(self, window: list[int]) -> af.StepTable:
        """The steps' coefficients; the last one is kept, so that what it holds on the device is kept too."""
        if self._table.stochastic_steps != tuple(window):
            self._table = self._steps(self._sigmas, self._config.noise_level, window)
        return self._table

    def window(self, iteration: int) -> list[int]:
        return stochastic_steps(self._config, len(self._sigmas) - 1, iteration, self._seed)

    def _anchors(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places among `images`, numbered over the iteration, that one pass of the network is made for, and for each
        image which of them stands for it: itself, or the first of its group where that begins in one state."""
        places = torch.arange(len(images), device=images.device)
        if not self._config.shared_anchor:
            return places, places
        groups, anchor_of = torch.unique(images // self._rollout.images_per_prompt, return_inverse=True)
        first = torch.full((len(groups),), len(images), device=images.device)
        return first.scatter_reduce(0, anchor_of, places, "amin"), anchor_of

    def starting_noise(self, noise: torch.Tensor) -> torch.Tensor:
        """Lets the images of a group start from the first one's `noise` [N, C, H, W] where the method wants that."""
        if self._config.shared_noise or self._config.window == "branch":
            group = self._rollout.images_per_prompt
            return noise[::group].repeat_interleave(group, dim=0)
        return noise

    @torch.no_grad()
    def sample(
        self,
        policy: Velocity,
        noise: torch.Tensor,
        conditioning: Conditioning,
        iteration: int,
        first_image: int,
    ) -> tuple[torch.Tensor, Transitions]:
        """The latents [B, ...] at sigma 0 and every stochastic step that led to them.

        `first_image` is the place of these images in the iteration: each has noise of its own, whatever the batch.
        """
        window = self.window(iteration)
        table = self.table(window)
        first = iteration * self._rollout.images + first_image
        generators = [generator(self._seed, "sde", first + place) for place in range(len(noise))]
        images = torch.arange(len(noise))
        turn = (images + first_image) // self._rollout.images_per_prompt % self._config.branches
        anchors, anchor_of = self._anchors(images + first_image)
        states = _States(anchors[anchor_of])
        x, told = noise.float()[states.of], conditioning[states.of]
        taken: list[_Taken] = []
        for step, sigma in enumerate(self._sigmas[:-1]):
            t = torch.full((len(x),), sigma, device=x.device)
            if step not in window:
                x = euler_step(x, policy(x, t, told).float(), sigma, self._sigmas[step + 1])
                continue
            v = self._velocity(policy, x, t, told)
            # All images, or with several branches those of the groups whose turn it is.
            noisy = images[turn == window.index(step) % self._config.branches]
            begins_as = states.part(noisy)
            if len(begins_as) > len(x):
                x, v, told = x[begins_as], v[begins_as], conditioning[states.of]
            whole = len(noisy) == len(x)
            x_next = x if whole else euler_step(x, v.float(), sigma, self._sigmas[step + 1])
            if len(noisy):
                rows = states.row[noisy].to(x.device)
                begun, v = (x, v) if whole else (x[rows], v[rows])
                drawn = torch.stack([torch.randn(x.shape[1:], generator=generators[image]) for image in noisy])
                out = af.sde_step(v, begun, table, step, drawn.to(x.device))
                self._after_step(step, out.eps, first_image)
                taken.append(_Taken(noisy, torch.full_like(noisy, step), begun, v, out.eps))
                x_next = out.x_next if whole else x_next.index_copy(0, rows, out.x_next)
            x = x_next
        return x, _of_each_image(taken, table)

    def _velocity(self, policy: Velocity, x: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
        """That of a step that is learnt from."""
        return policy(x, t, told)

    def _after_step(self, step: int, eps: torch.Tensor, first_image: int) -> None:
        """Called when such a step, of images from `first_image` on, has been made."""


class _States:
    """The states of a batch of images, each of which is in its own or in that of the image that `stands_for` it.

    `of` are the images whose own each state is, `row` is the place of the state of every image among them.
    """

    def __init__(self, stands_for: torch.Tensor) -> None:
        self._stands_for = stands_for
        self.of, self.row = torch.unique(stands_for, return_inverse=True)

    def part(self, images: torch.Tensor) -> torch.Tensor:
        """Gives each of `images` a state of its own; returns which of the states before each of those now begins as."""
        before: torch.Tensor = self.row
        self._stands_for[images] = images
        self.of, self.row = torch.unique(self._stands_for, return_inverse=True)
        return before[self.of]


class _Taken(NamedTuple):
    """A stochastic step of some `images`: which step it was for each, where it began, by what velocity and noise."""

    images: torch.Tensor
    step: torch.Tensor
    x: torch.Tensor
    v_old: torch.Tensor
    eps: torch.Tensor


def _of_each_image(taken: list[_Taken], table: af.StepTable) -> Transitions:
    """Of every image its steps, as many as any other has."""
    images, device = torch.cat([each.images for each in taken]), taken[0].x.device
    order, count = images.argsort(stable=True).to(device), len(images.unique())

    def of(name: str) -> torch.Tensor:
        # One after another, so that only one of them is there twice.
        rows = torch.cat([getattr(each, name).to(device) for each in taken])[order]
        return rows.view(count, -1, *rows.shape[1:])

    return Transitions(of("x"), of("v_old"), of("eps"), of("step"), table)


def _rows(velocity: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if velocity is None else velocity[rows]


def join(parts: list[Transitions]) -> Transitions:
    """The transitions of all images of an iteration."""
    x, v_old, eps, index = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("x", "v_old", "eps", "index")
    )
    return Transitions(x, v_old, eps, index, parts[0].table)


class ReverseProcess(StochasticSampler):
    """Turns the sampler steps of a rollout into optimiser steps of a reverse-process algorithm."""

    def __init__(
        self,
        policies: Policies,
        algorithm: ReverseAlgorithm,
        config: SDEConfig,
        steps: Steps,
        rollout: RolloutConfig,
        sigmas: list[float],
        optim: OptimConfig,
        seed: int,
    ) -> None:
        super().__init__(config, steps, rollout, sigmas, seed)
        self._policies, self._algorithm, self._optim = policies, algorithm, optim
        self._needs = Needs(config.anchor == "replay", algorithm.needs.reference)
        self._warned = False

    def policy(self, role: Role) -> Velocity:
        # Stored velocities are what the learner's are compared with: a ratio is not anchored on merged weights.
        return velocity_of(self._policies, role, for_images=self._config.anchor == "replay")

    def steps(self, iteration: int, experience: Experience) -> Iterator[Iterator[WeightedLoss]]:
        """For each optimiser step the losses of its micro-batches, whose weights sum to 1 over all processes.

        Each epoch splits the images anew into `optim.steps_per_iteration` equal parts, of which a process has its own.
        """
        assert experience.transitions is not None
        steps = self._trained(iteration, experience, experience.transitions)
        for epoch in range(self._config.epochs):
            number = iteration * self._config.epochs + epoch
            for images in shuffled_parts(experience.images, self._optim.steps_per_iteration, self._seed, number):
                yield self._losses(experience, steps, images)

    def _trained(self, iteration: int, experience: Experience, all_steps: Transitions) -> Transitions:
        """A random `trained_share` of each image's steps."""
        count, steps = all_steps.index.shape
        kept = max(1, int(steps * self._config.trained_share))
        if kept == steps:
            return all_steps
        rng = generator(self._seed, "trained_steps", iteration)
        order = torch.rand(experience.images, steps, generator=rng).argsort(1)[experience.rows]
        chosen = order[:, :kept].to(all_steps.index.device)
        rows = torch.arange(count, device=chosen.device)[:, None]
        return Transitions(
            all_steps.x[rows, chosen],
            all_steps.v_old[rows, chosen],
            all_steps.eps[rows, chosen],
            all_steps.index[rows, chosen],
            all_steps.table,
        )

    def _losses(self, experience: Experience, steps: Transitions, images: torch.Tensor) -> Iterator[WeightedLoss]:
        """Of `images`, numbered over all processes."""
        each, count = steps.index.shape[1], len(images)
        most = max(len(within(images, share)) for share in experience.in_step)
        own = within(images, experience.rows).to(experience.x0.device) - experience.rows.start
        image = own.repeat_interleave(each)
        step = torch.arange(each, device=own.device).repeat(len(own))
        first = step.new_zeros(1)  # `images` may have none of this process
        for rows, used in batches(len(image), self._optim.micro_batch, most * each):
            places = (image[rows], step[rows]) if used else (first, first)
            batch = self._batch(experience, steps, *places)
            weight = len(batch.index) / (count * each) if used else 0.0
            yield WeightedLoss(self._algorithm.loss(batch), weight)

    def _batch(
        self, experience: Experience, steps: Transitions, image: torch.Tensor, step: torch.Tensor
    ) -> ReverseBatch:
        """Evaluates the policies where the chosen steps began, all steps in one forward pass."""
        x, index = steps.x[image, step], steps.index[image, step]
        t = torch.tensor(self._sigmas, device=x.device)[index]
        anchors, anchor_of = self._anchors(image + experience.rows.start)
        told = experience.conditioning[image[anchors]]
        v, replayed, v_ref = policy_velocities(self._policies, self._needs, x[anchors], t[anchors], told)
        if len(anchors) < len(x):
            v, replayed, v_ref = v[anchor_of], _rows(replayed, anchor_of), _rows(v_ref, anchor_of)
        v_old, eps = steps.v_old[image, step], steps.eps[image, step]
        if replayed is not None:
            # The latent after the step stays what it was, so the noise that explains it moves with the mean.
            kappa = like(steps.table.rows(index, torch.float32).kappa, x)
            eps = (eps.float() - kappa * (replayed.float() - v_old.float())).to(eps.dtype)
            v_old = replayed
        return ReverseBatch(v, v_old, v_ref, eps, steps.table, index, experience.advantages[image])

    def diagnose(self, parts: list[WeightedMetrics]) -> dict[str, float]:
        """What the metrics of an iteration's first update say about the forward pass itself.

        Learner and rollout policy are equal then, so the ratio must be 1 and the divergence 0. Whatever is there comes
        from the network giving other numbers in another batch, and a trust region below it cannot work. What
        `af.PolicySet.mismatch` measures by two forward passes of its own is here in passes that are made anyway.
        """
        first, bound = join_metrics(parts), self._algorithm.bound
        value = first[bound.metric]
        if value >= bound.limit and not self._warned:
            self._warned = True
            merged = "runtime.merge_lora=images, " if self._policies.all_merged else ""
            warnings.warn(
                f"before any update the learner already differs from the rollout's velocities by {value:.3g}, and "
                f"the algorithm acts on differences of {bound.limit:.3g}: it would act on rounding. Use "
                f"{merged}sde.anchor=replay, the same batch sizes for rollout and training, or a higher precision.",
                UserWarning,
                stacklevel=2,
            )
        return {"first_max_log_ratio": first["max_abs_log_ratio"], "first_kl": first["mean_kl_old"]}
