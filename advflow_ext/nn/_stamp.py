"""Whether a tensor is still what it was."""

from __future__ import annotations

from torch import Tensor


def stamp(tensor: Tensor) -> tuple[int, int, int]:
    """Changes with the identity, the memory and the version of ``tensor``; an inference tensor has no version."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
