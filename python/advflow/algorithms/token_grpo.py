"""GRPO of image tokens (arXiv 2603.23086): the clipped ratio of sequences, with several advantages on it."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import Needs, TokenBatch
from advflow.settings.methods import TokenGRPOConfig


class TokenGRPO:
    def __init__(self, settings: TokenGRPOConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: TokenBatch) -> af.LossOutput:
        settings, states, head = self._settings, *batch.policy
        states_ref, head_ref = batch.reference or (None, None)
        return af.token_policy_loss(
            states,
            head,
            batch.tokens,
            batch.log_prob_old,
            batch.advantages,
            hidden_ref=states_ref,
            weight_ref=head_ref,
            level=settings.level,
            surrogate=settings.surrogate,
            clip=settings.clip,
            kl_weight=settings.kl_weight,
            kl=settings.kl,
            entropy_weight=batch.entropy_weight,
        )
