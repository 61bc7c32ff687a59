"""Names for colours: which of them a pixel has, by its hue in Oklab.

Oklab rather than HSV or CIELAB: its hue stays the same from a colour to its shaded and its pale version, for blue too.
"""

from __future__ import annotations

from functools import cache

import numpy as np

PALETTE = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.83, 0.12),
    "green": (0.16, 0.63, 0.27),
    "blue": (0.14, 0.38, 0.88),
    "purple": (0.50, 0.22, 0.68),
    "pink": (0.96, 0.46, 0.69),
    "black": (0.09, 0.09, 0.10),
}
"""What a prompt may ask for, each as it is drawn."""

COLORS = tuple(PALETTE)
SEEN = (*COLORS, "cyan")
"""What an image may show. Nobody asks for cyan: what one calls green another calls blue."""

# Where each begins, in degrees of Oklab's hue. Crimson is at 20, orange red at 36, CSS's orange at 71, amber at 84,
# yellow green at 127, teal at 195, sky blue at 226, slate blue at 286, hot pink at 352.
_SECTORS = (
    (0, "pink"), (14, "red"), (43, "orange"), (79, "yellow"), (119, "green"), (177, "cyan"), (213, "blue"),
    (284, "purple"), (345, "pink"),
)  # fmt: skip
_MAGENTA = (315.0, 0.6)  # from this hue on what is lighter than this is pink
_LEAST_CHROMA = 0.065  # of a coloured pixel; cream has 0.058, the pink of CSS 0.074
_BLACK = (0.45, 0.08)  # lightness and chroma below which a pixel is black
_LEVELS = 64  # of a channel in the table; a step is 4 of 255

_TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929],
     [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
_TO_OKLAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468],
     [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


def name_pixels(image: np.ndarray) -> np.ndarray:
    """The colour of each pixel of `image`, float [3, H, W] in [0, 1], as 1 + its place in SEEN; 0: white, grey."""
    red, green, blue = (image * (_LEVELS - 1) + 0.5).astype(np.uint8)
    return np.asarray(_table()[red, green, blue])


@cache
def _table() -> np.ndarray:
    """uint8 [64, 64, 64]: looking a colour up takes a hundredth of the time of working it out."""
    steps = np.linspace(0, 1, _LEVELS)
    return _names(np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1))


def _names(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness, a, b = np.moveaxis(np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T, -1, 0)
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    sector = np.searchsorted([start for start, _ in _SECTORS], hue, side="right") - 1
    named: np.ndarray = np.array([1 + SEEN.index(name) for _, name in _SECTORS], dtype=np.uint8)[sector]
    named[(hue >= _MAGENTA[0]) & (lightness >= _MAGENTA[1])] = 1 + SEEN.index("pink")
    named[(hue >= _MAGENTA[0]) & (lightness < _MAGENTA[1]) & (hue < 350)] = 1 + SEEN.index("purple")
    named[chroma < _LEAST_CHROMA] = 0
    named[(lightness < _BLACK[0]) & (chroma < _BLACK[1])] = 1 + SEEN.index("black")
    return named
