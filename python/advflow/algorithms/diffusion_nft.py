"""DiffusionNFT (arXiv 2509.16117): matching with implicit positive and negative policies."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.config import TrainConfig


def needs(config: TrainConfig) -> Needs:
    return Needs(old=True, reference=config.diffusion_nft.kl_weight > 0)


def loss(batch: ForwardBatch, config: TrainConfig) -> af.LossOutput:
    assert batch.v_old is not None
    choice = config.diffusion_nft
    return af.diffusion_nft_loss(
        batch.v,
        batch.x0,
        batch.noise,
        batch.t,
        batch.advantages,
        v_old=batch.v_old,
        v_ref=batch.v_ref,
        beta=choice.beta,
        adv_clip_max=choice.adv_clip_max,
        kl_weight=choice.kl_weight * batch.reference_scale,
        adaptive=choice.adaptive,
        mode=choice.mode,
    )
