"""What a model does to a drawing: the rule should read a scene all the same."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grain of 18 of 255."""
    return _clip(image + rng.normal(0, 0.07, image.shape))


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft edges, six pixels wide."""
    return _clip(ndimage.gaussian_filter(image, (0, 3, 3)))


def shading(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side: from 0.7 to 1.13 of the colour."""
    turn = rng.uniform(0, 2 * np.pi)
    y, x = (np.linspace(-0.5, 0.5, size) for size in image.shape[1:])
    along = x * np.cos(turn) + y[:, None] * np.sin(turn)
    return _clip(image * (0.92 + 0.3 * along))


def texture(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paper or brush strokes: grain of eight pixels and of 25 of 255."""
    grain = ndimage.gaussian_filter(rng.normal(size=image.shape[1:]), 4)
    return _clip(image + 0.1 * grain / grain.std())


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """JPEG of quality 30, its colours at half the resolution."""
    buffer = io.BytesIO()
    pixels = (image * 255).round().astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(buffer, "jpeg", quality=30)
    return np.asarray(Image.open(buffer), dtype=np.float32).transpose(2, 0, 1) / 255


def wobble(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outlines as drawn by hand: moved by three pixels here and there, by nine at most."""
    height, width = image.shape[1:]
    coarse = ndimage.gaussian_filter(rng.normal(size=(2, height // 16, width // 16)), (0, 1.25, 1.25))
    moves = ndimage.zoom(coarse, (1, height / coarse.shape[1], width / coarse.shape[2]), order=1)
    places = np.rint(np.mgrid[0:height, 0:width] + 3 * moves / moves.std()).astype(int)
    return image[:, places[0].clip(0, height - 1), places[1].clip(0, width - 1)]


PERTURBATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": noise, "blur": blur, "shading": shading, "texture": texture, "jpeg": jpeg, "wobble": wobble,
}  # fmt: skip


def _clip(image: np.ndarray) -> np.ndarray:
    return image.clip(0, 1).astype(np.float32)
