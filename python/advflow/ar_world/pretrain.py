"""Pretrains the embedded world's tokenizer and LlamaGen from nothing."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from advflow.ar_world import texts
from advflow.ar_world.settings import TRANSFORMER, ARPretrainSettings
from advflow.ar_world.tokenizer_training import encode_all, train_tokenizer
from advflow.ar_world.world import POLICY_FILE, REFERENCE_FILE, TOKENIZER_FILE
from advflow.autoregressive.features import VQFeatures, moments
from advflow.autoregressive.llamagen import LlamaGen, TextEmbedding
from advflow.autoregressive.token_model import Text
from advflow.core.files import require_folder
from advflow.core.progress import show_progress
from advflow.world.pretrain import render_scenes
from advflow.world.scene import Caption


def pretrain(out: Path, settings: ARPretrainSettings) -> None:
    """Trains both and writes a folder that `world.load` reads, with the moments of the scenes beside them.

    Raises ValueError where `out` cannot be such a folder, before anything is trained.
    """
    require_folder(str(out))
    torch.manual_seed(settings.seed)
    started = time.monotonic()
    images, _ = render_scenes(settings.tokenizer_scenes, np.random.default_rng(settings.seed))
    tokenizer = train_tokenizer(images, settings)
    tokenizer_minutes = (time.monotonic() - started) / 60
    torch.manual_seed(settings.seed)
    images, prompts = render_scenes(settings.scenes, np.random.default_rng(settings.seed + 1), texts.CATEGORIES)
    policy = train_transformer(encode_all(tokenizer, images), prompts, settings)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tokenizer.state_dict(), out / TOKENIZER_FILE)
    save_file(policy.state_dict(), out / POLICY_FILE)
    moments(VQFeatures(tokenizer), images.add(1).div(2)).save(out / REFERENCE_FILE)
    for path in (POLICY_FILE, TOKENIZER_FILE, REFERENCE_FILE):
        (out / path).chmod(0o644)  # safetensors leaves its files to their owner alone
    minutes = (time.monotonic() - started) / 60
    print(f"pretrained in {minutes:.1f} min (tokenizer {tokenizer_minutes:.1f} min); written to {out}")


def train_transformer(tokens: Tensor, prompts: list[Caption], settings: ARPretrainSettings) -> LlamaGen:
    """Next-token prediction, told a caption that may be another image's, or none."""
    model = LlamaGen(TRANSFORMER)
    initialize(model)
    row_of = {prompt.text: row for row, prompt in enumerate(texts.training_prompts())}
    features, words = texts.encode(list(row_of))
    rows = torch.tensor([row_of[prompt.text] for prompt in prompts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, pct_start=0.1)
    progress = show_progress(range(settings.steps), desc="transformer", unit="step")
    average = float("nan")
    for _ in progress:
        index = torch.randint(len(tokens), (settings.batch,))
        other = torch.randint(len(tokens), (settings.batch,))
        told = rows[torch.where(torch.rand(settings.batch) < settings.caption_noise, other, index)]
        text = Text(features[told], words[told])
        none = torch.rand(settings.batch) < settings.caption_dropout
        empty = model.unconditional(text)
        assert isinstance(empty, Text)
        text = Text(torch.where(none[:, None, None], empty.features, text.features), text.words)
        states, head = model(text, tokens[index])
        loss = F.cross_entropy((states @ head.T).flatten(0, 1), tokens[index].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if average != average else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def initialize(model: LlamaGen) -> None:
    """Larger than LlamaGen's own start, which is for larger widths and takes its time here."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.06)
    model.output.weight.normal_(std=0.02)
    model.tok_embeddings.weight.normal_(std=0.3)
    assert isinstance(model.cls_embedding, TextEmbedding)
    model.cls_embedding.cap_proj.fc1.weight.normal_(std=1.0)
    model.cls_embedding.cap_proj.fc2.weight.normal_(std=0.1)
