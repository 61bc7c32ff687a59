"""On-policy learning of a rollout's steps without passes of its own: gradients first, advantages after (LeanGRPO)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from advflow.algorithms.batch import Experience, ReverseBatch, Transitions, WeightedLoss
from advflow.policies import Policies, Role, velocity_of
from advflow.processes.reverse import ReverseProcess
from advflow.samplers.sampling import Conditioning, Velocity
from advflow_ext.policies.parameters import Place


class ImageWeights:
    """The learner's adapters once for each image of a batch, in the memory that they have: leaves of their own, whose
    gradients are those of each image apart."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places
        # Kept, since a CUDA graph gives its gradients to the leaves that it was recorded with.
        self._leaves: dict[int, list[torch.Tensor]] = {}

    def of(self, images: int) -> list[torch.Tensor]:
        """Of so many images: [images, ...] each, in the order of the learner's parameters."""
        if images not in self._leaves:
            weights = [place.thing.detach() for place in self._places]
            self._leaves[images] = [each.expand(images, *each.shape).requires_grad_() for each in weights]
        return self._leaves[images]

    @contextmanager
    def in_force(self, images: int) -> Iterator[None]:
        """While it is open, a pass of so many images runs on them."""
        try:
            for place, leaf in zip(self._places, self.of(images), strict=True):
                place.held[place.name] = leaf
            yield
        finally:
            for place in self._places:
                place.held[place.name] = place.thing


class ReweightedProcess(ReverseProcess):
    """A `ReverseProcess` of one update an iteration whose images the learner draws, so that every ratio is 1.

    What is back-propagated of a step is then its advantage times something that is known when the step is drawn: its
    gradient for an advantage of 1, which is taken there, from the forward pass that draws. An image's gradients are
    added up over its steps; those of all images are added up when their advantages are known.
    """

    def __init__(self, policies: Policies, *settings: Any) -> None:
        super().__init__(policies, *settings)
        self._weights = ImageWeights(policies.places)
        self._gradients: dict[int, list[torch.Tensor | None]] = {}  # by the first of the images in a batch
        self._drawn: torch.Tensor | None = None  # the velocity of the step at hand, with what made it

    def policy(self, role: Role) -> Velocity:
        return velocity_of(self._policies, "learner")  # whose weights those of `role` are

    def sample(
        self, policy: Velocity, noise: torch.Tensor, conditioning: Conditioning, iteration: int, first_image: int
    ) -> tuple[torch.Tensor, Transitions]:
        self._gradients.pop(first_image, None)
        return super().sample(policy, noise, conditioning, iteration, first_image)

    def _velocity(self, policy: Velocity, x: torch.Tensor, t: torch.Tensor, told: Conditioning) -> torch.Tensor:
        with torch.enable_grad(), self._weights.in_force(len(x)):
            self._drawn = policy(x, t, told)
        return self._drawn.detach()

    def _after_step(self, step: int, eps: torch.Tensor, first_image: int) -> None:
        v, self._drawn = self._drawn, None
        assert v is not None
        count = len(v)
        index, ones = torch.full((count,), step, device=v.device), torch.ones(count, device=v.device)
        share = count / (self._rollout.images * self._config.steps)
        # In force here too, for a checkpointed pass runs its forward again.
        with torch.enable_grad(), self._weights.in_force(count):
            loss = self._algorithm.loss(ReverseBatch(v, v.detach(), None, eps, self._table, index, ones)).loss
            gradients = torch.autograd.grad(loss * share, self._weights.of(count), allow_unused=True)
        self._gradients[first_image] = _added(self._gradients.get(first_image), gradients)

    def steps(self, iteration: int, experience: Experience) -> Iterator[Iterator[WeightedLoss]]:
        yield self._reweighted(experience)

    def _reweighted(self, experience: Experience) -> Iterator[WeightedLoss]:
        """The losses, for what they report, of velocities that lead nowhere; then the learner has its gradients."""
        assert experience.transitions is not None
        yield from self._losses(experience, experience.transitions, torch.arange(experience.images))
        for first, gradients in self._gradients.items():
            self._add(gradients, experience.advantages[first - experience.rows.start :])
        self._gradients.clear()

    def _batch(
        self, experience: Experience, steps: Transitions, image: torch.Tensor, step: torch.Tensor
    ) -> ReverseBatch:
        v_old, index = steps.v_old[image, step], steps.index[image, step]
        v, eps = v_old.clone().requires_grad_(), steps.eps[image, step]
        return ReverseBatch(v, v_old, None, eps, steps.table, index, experience.advantages[image])

    def _add(self, gradients: list[torch.Tensor | None], advantages: torch.Tensor) -> None:
        """Adds to the learner's the `gradients` of a batch of images, to whose first the first advantage belongs."""
        for parameter, of_images in zip(self._policies.learner, gradients, strict=True):
            if of_images is None:
                continue
            its = advantages[: len(of_images)]
            counted = its.isfinite()  # those of a broken image may be NaN, which no weight of 0 takes away
            if not counted.all():
                its, of_images = its[counted], of_images[counted]
            total = torch.tensordot(its.to(of_images.dtype), of_images, 1)
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)


def _added(to: list[torch.Tensor | None] | None, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Sums, in the memory of `to`; None is no gradient."""
    if to is None:
        return list(gradients)
    pairs = zip(to, gradients, strict=True)
    return [each if other is None else other if each is None else each.add_(other) for each, other in pairs]
