"""CLIP models of transformers as rewards use them."""

from __future__ import annotations

import torch
from transformers import AutoProcessor, CLIPModel

from advflow.rewards.images import eight_bit
from advflow.rewards.loading import frozen, pretrained

VIT_L_14 = "openai/clip-vit-large-patch14"


class Clip:
    """A CLIP model with its own preparation of images and texts. Embeddings have length 1.

    Raises WrongArgument, naming `arguments`, where model or processor cannot be loaded.
    """

    def __init__(self, model: str, processor: str, arguments: tuple[str, str] = ("model", "processor")) -> None:
        self.model = frozen(CLIPModel, arguments[0], model)
        self._processor = pretrained(AutoProcessor, arguments[1], processor)

    @torch.no_grad()
    def images(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embeddings [N, D] of uint8 images [3, H, W], of any sizes."""
        inputs = self._processor(images=images, return_tensors="pt").to(self.model.device)
        return _unit(self.model.visual_projection(self.model.vision_model(**inputs).pooler_output))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings [N, D]."""
        inputs = self._processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        return _unit(self.model.text_projection(self.model.text_model(**inputs).pooler_output))

    def cosines(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Of each of the images [B, 3, H, W] in [0, 1] and the text at its place: fp32 [B] on the CPU."""
        cosines: torch.Tensor = (self.images(list(eight_bit(images))) * self.texts(texts)).sum(-1)
        return cosines.float().cpu()


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    return embeddings / lengths
