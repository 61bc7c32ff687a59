"""Images from an autoregressive policy: drawing tokens, and the states that say how likely they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advflow.autoregressive.sampling import policy_states, sample
from advflow.autoregressive.token_model import Condition, Hidden, Text, TokenModel
from advflow.samplers.guidance import Guided
from advflow.samplers.sampling import Conditioning


@dataclass(frozen=True)
class Told:
    """What an autoregressive model is told of a list of prompts."""

    condition: Condition

    def __getitem__(self, index: torch.Tensor | slice) -> Told:
        if isinstance(self.condition, Text):
            return Told(Text(self.condition.features[index], self.condition.words[index]))
        return Told(self.condition[index])

    def __len__(self) -> int:
        return len(self.condition.features if isinstance(self.condition, Text) else self.condition)


def draw_tokens(model: TokenModel, uniforms: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The tokens [B, T] of images, one for each of the numbers `uniforms` [B, T] in [0, 1)."""
    if isinstance(conditioning, Guided):
        # Away from nothing being said, which the model knows itself.
        return sample(model, _condition(conditioning.told), uniforms, guidance=conditioning.scale).tokens
    return sample(model, _condition(conditioning), uniforms).tokens


def token_states(model: TokenModel, tokens: torch.Tensor, conditioning: Conditioning) -> Hidden:
    """The states that predict `tokens` [B, T] under the policy that `draw_tokens` draws from, and the head."""
    if isinstance(conditioning, Guided):
        told = _condition(conditioning.told)
        return policy_states(model, told, tokens, model.unconditional(told), guidance=conditioning.scale)
    return policy_states(model, _condition(conditioning), tokens)


def _condition(conditioning: Conditioning) -> Condition:
    assert isinstance(conditioning, Told)
    return conditioning.condition
