"""DiffusionNFT (arXiv 2509.16117): matching with implicit positive and negative policies."""

from __future__ import annotations

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs
from advflow.settings.methods import DiffusionNFTConfig


class DiffusionNFT:
    def __init__(self, settings: DiffusionNFTConfig) -> None:
        self._settings = settings
        self.needs = Needs(old=True, reference=settings.kl_weight > 0)

    def loss(self, batch: ForwardBatch) -> af.LossOutput:
        assert batch.v_old is not None
        return af.diffusion_nft_loss(
            batch.v,
            batch.x0,
            batch.noise,
            batch.t,
            batch.advantages,
            v_old=batch.v_old,
            v_ref=batch.v_ref,
            beta=self._settings.beta,
            adv_clip_max=self._settings.adv_clip_max,
            kl_weight=self._settings.kl_weight * batch.reference_scale,
            adaptive=self._settings.adaptive,
            mode=self._settings.mode,
        )
