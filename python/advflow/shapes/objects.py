"""What an image shows: coloured shapes, where they are and how large."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from advflow.shapes.colors import SEEN, name_pixels
from advflow.shapes.forms import name_shape

_SIDE = 256  # pixels of what is looked at: larger images are averaged down, which takes noise and time out
LEAST_AREA = 0.003  # of the image; a circle of 0.06 of its side
_BACKGROUND_RIM = 0.2  # of the image's rim: what holds more of it is background, whatever its colour
_BACKGROUND_DISTANCE = 0.1  # in a channel, from the rim's median colour
_SMOOTH = 5  # pixels of 256: a pixel has the colour that most of this square around it have
_THICK = 7  # pixels of 256: a contour, and the soft rim of one colour that looks like another, are thinner than this


@dataclass(frozen=True)
class Found:
    """An object in an image; `shape` is None for a blob that resembles none.

    Lengths and places are in parts of the image's shorter side, the origin at the top left. `area` is of the whole
    outline, in parts of the image. `mask` covers it, holes too, with its first pixel at `corner` (row, column).
    """

    shape: str | None
    color: str
    x: float
    y: float
    extent: float
    area: float
    corner: tuple[int, int] = (0, 0)
    mask: np.ndarray = field(default_factory=lambda: np.ones((1, 1), bool), repr=False, compare=False)

    def share_within(self, other: Found) -> float:
        """How much of it lies inside the outline of `other`."""
        top, left = (max(a, b) for a, b in zip(self.corner, other.corner, strict=True))
        mine = self.mask[top - self.corner[0] :, left - self.corner[1] :]
        others = other.mask[top - other.corner[0] :, left - other.corner[1] :]
        rows, columns = (min(a, b) for a, b in zip(mine.shape, others.shape, strict=True))
        return float((mine[:rows, :columns] & others[:rows, :columns]).sum() / self.mask.sum())


def find_objects(image: np.ndarray) -> list[Found]:
    """The coloured shapes in `image`, finite float [3, H, W] in [0, 1]."""
    small = _average_down(image)
    colors = name_pixels(small)
    colors[_like_rim(small)] = 0
    scale = min(colors.shape) / _SIDE
    found: list[Found] = []
    for index, count in enumerate(np.bincount(colors.ravel(), minlength=len(SEEN) + 1)[1:], start=1):
        if count >= LEAST_AREA * colors.size:
            found += _components(_smooth(colors == index, scale), SEEN[index - 1], scale)
    return found


def _components(of_color: np.ndarray, color: str, scale: float) -> list[Found]:
    labels, count = ndimage.label(of_color)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    rim = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    on_rim = np.bincount(rim, minlength=count + 1) / len(rim)
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if areas[number] < LEAST_AREA * labels.size or on_rim[number] > _BACKGROUND_RIM:
            continue
        mask = labels[box] == number
        if _is_thick(mask, scale):
            found.append(_describe(ndimage.binary_fill_holes(mask), color, box, labels.shape))
    return found


def _describe(mask: np.ndarray, color: str, box: tuple[slice, ...], shape: tuple[int, ...]) -> Found:
    side = min(shape)
    rows, columns = np.nonzero(mask)
    y, x = ((part.start + where.mean() + 0.5) / side for part, where in zip(box, (rows, columns), strict=True))
    height, width = mask.shape
    area = len(rows) / (shape[0] * shape[1])
    corner = (box[0].start, box[1].start)
    return Found(name_shape(mask), color, float(x), float(y), (height * width) ** 0.5 / side, area, corner, mask)


def _average_down(image: np.ndarray) -> np.ndarray:
    times = max(1, round(min(image.shape[1:]) / _SIDE))
    if times == 1:
        return image
    height, width = (size // times * times for size in image.shape[1:])
    total = sum(image[:, row:height:times, column:width:times] for row in range(times) for column in range(times))
    return np.asarray(total / times**2)


def _like_rim(image: np.ndarray) -> np.ndarray:
    """The pixels whose colour is that of the background: of most of the image's rim."""
    rim = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    return np.asarray((np.abs(image - np.median(rim, 1)[:, None, None]) < _BACKGROUND_DISTANCE).all(0))


def _smooth(mask: np.ndarray, scale: float) -> np.ndarray:
    """What most of a square around a pixel is: without specks, pinholes and the soft rims between two colours."""
    size = round(_SMOOTH * scale) | 1
    return np.asarray(ndimage.uniform_filter(mask.astype(np.float32), size, mode="nearest") > 0.5)


def _is_thick(mask: np.ndarray, scale: float) -> bool:
    size = round(_THICK * scale) | 1
    if min(mask.shape) < size:
        return False
    return bool(ndimage.minimum_filter(mask, size, mode="constant").any())
