"""The noise generator itself: published vectors for its integers, fp64 for its normals."""

from __future__ import annotations

import ctypes
import math
import os
import shutil

import pytest
import torch

from tests.kernels.kernel_harness import SHIM, build_shim

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="the launch shim needs g++")

# philox4x32 with 10 rounds in the kat_vectors file of DEShawResearch/random123: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build_shim(SHIM / "philox.cu")))


def words(text: str) -> ctypes.Array[ctypes.c_uint32]:
    numbers = [int(word, 16) for word in text.split()]
    return (ctypes.c_uint32 * len(numbers))(*numbers)


def normals(library: ctypes.CDLL, pairs: torch.Tensor) -> torch.Tensor:
    """Normals [n, 2] of words [n, 2], given as int64."""
    assert pairs.shape[0] % 2 == 0, "the generator takes two pairs at a time"
    packed = torch.where(pairs < 2**31, pairs, pairs - 2**32).to(torch.int32).contiguous()
    out = torch.full(pairs.shape, float("nan"))
    library.normals(
        ctypes.c_void_p(packed.data_ptr()), ctypes.c_int64(pairs.shape[0] // 2), ctypes.c_void_p(out.data_ptr())
    )
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(library: ctypes.CDLL, counter: str, key: str, expected: str) -> None:
    out = (ctypes.c_uint32 * 4)()
    library.philox4x32(words(counter), words(key), out)
    assert list(out) == list(words(expected))


def test_normals_are_box_muller_to_a_few_units_in_the_last_place(library: ctypes.CDLL) -> None:
    random = torch.randint(0, 2**32, (2**20, 2), generator=torch.Generator().manual_seed(0))
    # Where the uniform is tiny or near 1, and where the angle changes quarter.
    edges = torch.tensor([k * 2**29 + d for k in range(9) for d in (-2, -1, 0, 1, 2)]).clamp(0, 2**32 - 1)
    small = 2 ** torch.arange(32)
    special = torch.cat([edges, small, 2**32 - small]).unique()
    pairs = torch.cat([random, torch.cartesian_prod(special, special)])
    pairs = pairs[: pairs.shape[0] // 2 * 2]
    uniform = (pairs[:, 0].float() * 2.0**-32 + 2.0**-33).double()
    assert uniform.min() == 2.0**-33 and uniform.max() == 1
    radius, angle = (-2 * uniform.log()).sqrt(), 2 * math.pi * 2.0**-32 * pairs[:, 1].double()
    truth = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    # fp64 itself is off by its roundoff of the angle where a cosine vanishes.
    error = (normals(library, pairs).double() - truth).abs() - 1e-14
    assert (error <= 4e-7 * truth.abs()).all()


def test_the_whole_range_of_uniforms_gives_finite_normals(library: ctypes.CDLL) -> None:
    ends = torch.arange(2**16)
    between = (2 ** torch.linspace(16, 32, 2**18, dtype=torch.float64)).long()
    words = torch.cat([ends, between, 2**32 - 1 - ends]).clamp(max=2**32 - 1).unique()
    squares = normals(library, torch.stack([words, torch.zeros_like(words)], 1)[words.numel() % 2 :]).square().sum(1)
    assert squares.isfinite().all() and squares.max() <= 6.764**2 and squares.min() == 0
    assert (squares.diff() <= 1e-5).all()  # the radius falls as the uniform grows
