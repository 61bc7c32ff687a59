"""What makes features of images, for distances between sets of them. Each has one way to prepare an image."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import advflow_ext as af
from advflow.autoregressive.vq import VQModel

_AT_A_TIME = 64  # images an extractor is given


class Extractor(Protocol):
    """Features [N, d], on the CPU, of images [N, 3, H, W] in [0, 1], wherever those are and whatever made them."""

    name: str
    preprocessing: str

    def __call__(self, images: Tensor) -> Tensor: ...


class VQFeatures:
    """What a VQ encoder sees before it looks for codes, averaged over each quarter of the image: [N, 4 channels]."""

    preprocessing = "[-1, 1], as given"

    def __init__(self, tokenizer: VQModel) -> None:
        digest = hashlib.sha256()
        for weight in tokenizer.encoder.state_dict().values():
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        self.name = f"VQ encoder {digest.hexdigest()[:8]}, 2 x 2"
        self._encoder = tokenizer.encoder
        self._device = next(tokenizer.encoder.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        batches = (part.to(self._device) for part in images.split(_AT_A_TIME))
        parts = [F.adaptive_avg_pool2d(self._encoder(part * 2 - 1), 2) for part in batches]
        return torch.cat(parts).flatten(1).cpu()


class InceptionFeatures:
    """Torchvision's Inception v3 before its classifier, [N, 2048]. `weights`, its file, is asked for nowhere else.

    Raises ImportError without torchvision, and ValueError for a file that is not of that network.
    """

    name = "torchvision inception_v3 pool"
    preprocessing = "299 px, bilinear, antialias, ImageNet mean and deviation"

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        try:
            inception: Any = importlib.import_module("torchvision.models").inception_v3
        except ImportError as error:
            raise ImportError(
                "Inception features need torchvision: pip install 'advflow[inception]', in a build for the torch here"
            ) from error
        network = inception(weights=None, aux_logits=True, transform_input=False, init_weights=False)
        try:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{str(weights)!r} is not of torchvision's inception_v3: {reason}") from error
        network.fc = torch.nn.Identity()
        self._network = network.eval().requires_grad_(False).to(device)
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)
        self._deviation = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        batches = (part.to(self._mean.device) for part in images.split(_AT_A_TIME))
        return torch.cat([self._network(self._prepared(part)) for part in batches]).cpu()

    def _prepared(self, images: Tensor) -> Tensor:
        large = F.interpolate(images, size=(299, 299), mode="bilinear", antialias=True, align_corners=False)
        return (large - self._mean) / self._deviation


def moments(extractor: Extractor, images: Tensor) -> af.FeatureMoments:
    """Of a set of images in [0, 1], with the words for how they became features."""
    return af.FeatureMoments.of(extractor(images), extractor=extractor.name, preprocessing=extractor.preprocessing)
