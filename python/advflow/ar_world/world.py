"""The pretrained world: its policy and tokenizer, images drawn by a policy, and how good and how varied they are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import advflow_ext as af
from advflow.ar_world import texts
from advflow.ar_world.settings import TOKENIZER, TRANSFORMER
from advflow.autoregressive.checkpoints import load_weights
from advflow.autoregressive.llamagen import LlamaGen
from advflow.autoregressive.sampling import draws, sample
from advflow.autoregressive.token_model import Condition, Text, TokenModel
from advflow.autoregressive.vq import VQModel

POLICY_FILE, TOKENIZER_FILE, REFERENCE_FILE = "policy.safetensors", "tokenizer.safetensors", "reference.safetensors"


class World(NamedTuple):
    """`reference` are the moments of real scenes, of all categories alike, by `VQFeatures` of this tokenizer."""

    policy: LlamaGen
    tokenizer: VQModel
    reference: af.FeatureMoments


class Drawn(NamedTuple):
    """Tokens [N, T], log-probability of each [N, T], images [N, 3, H, W] in [0, 1]."""

    tokens: Tensor
    log_probs: Tensor
    images: Tensor


def load(folder: Path | None = None) -> World:
    """What `python -m advflow.ar_world` wrote into a folder; the shipped base by default."""
    folder = folder or Path(str(resources.files("advflow.ar_world"))) / "base"
    with torch.device("meta"):
        policy, tokenizer = LlamaGen(TRANSFORMER), VQModel(TOKENIZER)
    load_weights(policy, folder / POLICY_FILE)
    load_weights(tokenizer, folder / TOKENIZER_FILE).eval().requires_grad_(False)
    return World(policy, tokenizer, af.FeatureMoments.load(folder / REFERENCE_FILE))


def condition(prompts: Sequence[str], device: torch.device | str = "cpu") -> Text:
    features, words = texts.encode(prompts)
    return Text(features.to(device), words.to(device))


def draw(
    policy: TokenModel,
    tokenizer: VQModel,
    told: Condition,
    generators: Sequence[torch.Generator],
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> Drawn:
    """An image for each row of `told`, the random numbers of each from a generator of its own."""
    uniforms = draws(generators, policy.tokens)
    tokens, log_probs = sample(policy, told, uniforms, guidance=guidance, temperature=temperature)
    return Drawn(tokens, log_probs, decode(tokenizer, tokens))


@torch.no_grad()
def decode(tokenizer: VQModel, tokens: Tensor) -> Tensor:
    """Images in [0, 1]."""
    parts = [tokenizer.decode(part) for part in tokens.split(128)]
    return torch.cat(parts).add(1).div(2).clamp(0, 1)
