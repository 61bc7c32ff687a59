"""Trains the embedded world's VQ tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advflow.ar_world.settings import TOKENIZER, ARPretrainSettings
from advflow.autoregressive.vq import VQModel
from advflow.core.progress import show_progress

_COMMITMENT = 0.25
_UNQUANTISED = 0.2  # share of the steps before there are codes: they start where latents are
_REVIVED_UNTIL = 0.8  # share of the steps after which codes that nothing is close to stay as they are
_REVIVED_EVERY = 50


def train_tokenizer(images: Tensor, settings: ARPretrainSettings) -> VQModel:
    """Of images in [-1, 1]."""
    model = VQModel(TOKENIZER)
    codes, steps = model.quantize.embedding.weight, settings.tokenizer_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.tokenizer_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.tokenizer_lr, steps, pct_start=0.1)
    first = round(_UNQUANTISED * steps)
    used = torch.zeros(len(codes), dtype=torch.bool)
    progress = show_progress(range(steps), desc="tokenizer", unit="step")
    for step in progress:
        batch = images[torch.randint(len(images), (settings.tokenizer_batch,))]
        latents = model.latents(batch)
        through, to_codes = latents, latents.new_zeros(())
        if step >= first:
            if step == first or (step % _REVIVED_EVERY == 0 and step < _REVIVED_UNTIL * steps):
                _move_unused(codes, used, latents)
                used.zero_()
            tokens = model.quantize.nearest(latents)
            used[tokens] = True
            nearest = model.lookup(tokens)
            to_codes = F.mse_loss(nearest, latents.detach()) + _COMMITMENT * F.mse_loss(latents, nearest.detach())
            through = latents + (nearest - latents).detach()
        decoded = model.decode_latents(through)
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        optimizer.zero_grad(set_to_none=True)
        (loss + to_codes).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(reconstruction=f"{loss.item():.4f}", codes=int(used.sum()))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _move_unused(codes: Tensor, used: Tensor, latents: Tensor) -> None:
    """Puts every code that is not used where a latent of this batch is."""
    flat = latents.movedim(1, 3).flatten(0, 2)
    count = int((~used).sum())
    codes[~used] = flat[torch.randint(len(flat), (count,))]


@torch.no_grad()
def encode_all(model: VQModel, images: Tensor) -> Tensor:
    return torch.cat([model.encode(part) for part in images.split(500)])
