"""The third process: images are sequences of tokens, and learnt from by how likely each was."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import advflow_ext as af
from advflow.algorithms import TokenAlgorithm
from advflow.algorithms.batch import Experience, TokenBatch, WeightedLoss
from advflow.autoregressive.token_model import Hidden, TokenModel
from advflow.control.entropy import EntropyControl
from advflow.core.randomness import shuffled_parts
from advflow.core.ranks import within
from advflow.policies import Policies, Role
from advflow.processes.metrics import WeightedMetrics, join_metrics
from advflow.samplers.sampling import Conditioning
from advflow.samplers.tokens import draw_tokens, token_states
from advflow.settings.optim import OptimConfig


class TokenProcess:
    """Turns the tokens of a rollout into optimiser steps.

    `drawn_by` is who draws, `on_policy` that those are the learner's weights when an iteration begins.
    """

    def __init__(
        self,
        policies: Policies,
        algorithm: TokenAlgorithm,
        entropy: EntropyControl,
        optim: OptimConfig,
        epochs: int,
        seed: int,
        drawn_by: Role,
        on_policy: bool,
    ) -> None:
        self._policies, self._algorithm, self._entropy, self._optim = policies, algorithm, entropy, optim
        self._epochs, self._seed, self._drawn_by, self._on_policy = epochs, seed, drawn_by, on_policy

    def policy(self, role: Role) -> TokenModel:
        model: TokenModel = self._policies.transformer(role)
        return model

    def starting_noise(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def sample(
        self, policy: TokenModel, noise: torch.Tensor, conditioning: Conditioning, iteration: int, first_image: int
    ) -> tuple[torch.Tensor, None]:
        return draw_tokens(policy, noise, conditioning), None

    def steps(self, iteration: int, experience: Experience) -> Iterator[Iterator[WeightedLoss]]:
        """For each optimiser step the losses of its micro-batches, whose weights sum to 1 over all processes.

        Each epoch splits the images anew into `optim.steps_per_iteration` equal parts, of which a process has its own.
        """
        count, parts = experience.images, self._optim.steps_per_iteration
        epochs = range(iteration * self._epochs, (iteration + 1) * self._epochs)
        updates = [images for number in epochs for images in shuffled_parts(count, parts, self._seed, number)]
        known = updates[0] if self._on_policy else updates[0][:0]
        old = self._score(experience, known)
        weight = self._entropy.weight(iteration)
        for number, images in enumerate(updates):
            yield self._losses(experience, old, images, weight, as_drawn=number == 0 and self._on_policy)

    @torch.no_grad()
    def _score(self, experience: Experience, known: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, T] under the policy that drew the tokens, but of images that are `known` later on.

        Scored as the learner is, rather than kept from drawing: another order of sums is no ratio.
        """
        tokens = experience.x0
        old = torch.full(tokens.shape, torch.nan, device=tokens.device)
        own = torch.arange(experience.rows.start, experience.rows.stop)
        left = own[~torch.isin(own, known)].to(tokens.device) - experience.rows.start
        for rows in left.split(self._optim.micro_batch):
            if len(rows):
                states, head = self._states(self._drawn_by, tokens[rows], experience.conditioning[rows])
                old[rows] = af.token_log_prob(states, head, tokens[rows])
        return old

    def _losses(
        self, experience: Experience, old: torch.Tensor, images: torch.Tensor, entropy_weight: float, as_drawn: bool
    ) -> Iterator[WeightedLoss]:
        """Of `images`, numbered over all processes; what is still to be known of `old` where they are as drawn."""
        own = within(images, experience.rows)
        for rows in (own.to(old.device) - experience.rows.start).split(self._optim.micro_batch):
            if not len(rows):
                continue
            tokens, told = experience.x0[rows], experience.conditioning[rows]
            reference = None
            if self._algorithm.needs.reference:
                with torch.no_grad():
                    reference = self._states("reference", tokens, told)
            policy = self._states("learner", tokens, told)
            if as_drawn:
                old[rows] = af.token_log_prob(policy.states.detach(), policy.head.detach(), tokens)
            advantages = tuple(each[rows] for each in (experience.advantages, *experience.more_advantages))
            batch = TokenBatch(policy, reference, tokens, old[rows], advantages, entropy_weight)
            yield WeightedLoss(self._algorithm.loss(batch), len(rows) / len(images))

    def _states(self, role: Role, tokens: torch.Tensor, told: Conditioning) -> Hidden:
        return token_states(self.policy(role), tokens, told)

    def diagnose(self, parts: list[WeightedMetrics]) -> dict[str, float]:
        """How far the ratios of an iteration's first update are from 1, which is where they begin on policy."""
        return {"first_max_log_ratio": join_metrics(parts)["max_abs_log_ratio"]}
