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


def gloss(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Objects as if of plastic: dark towards the outline, a highlight above the middle."""
    drawn = _drawn(image)
    depth = ndimage.distance_transform_edt(drawn)
    light = image * (0.65 + 0.35 * np.minimum(depth / 24, 1))
    highlight = np.clip(ndimage.shift(depth, (-12, -12), order=1) / max(float(depth.max()), 1.0) - 0.6, 0, 0.4)
    return _clip(np.where(drawn, light + highlight * (1 - light), image))


def shadow(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A soft grey shadow to the lower right of everything."""
    drawn = _drawn(image)
    cast = ndimage.gaussian_filter(ndimage.shift(drawn.astype(np.float32), (10, 10), order=0), 5)
    return _clip(np.where(drawn, image, image * (1 - 0.45 * cast)))


def contour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A dark line of six pixels around everything."""
    soft = ndimage.gaussian_filter(image, (0, 1, 1))
    steps = np.hypot(ndimage.sobel(soft, 1), ndimage.sobel(soft, 2)).max(0)
    return _clip(np.where(ndimage.binary_dilation(steps > 0.5), 0.1, image))


def _drawn(image: np.ndarray) -> np.ndarray:
    """What is not like the top left corner."""
    return np.asarray((np.abs(image - image[:, :1, :1]) > 0.15).any(0))


PERTURBATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": noise, "blur": blur, "shading": shading, "texture": texture, "jpeg": jpeg, "wobble": wobble,
    "gloss": gloss, "shadow": shadow, "contour": contour,
}  # fmt: skip


def _clip(image: np.ndarray) -> np.ndarray:
    return image.clip(0, 1).astype(np.float32)
