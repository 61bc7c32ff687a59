from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def triton_kernels(kernels_serve_here: None) -> None:
    """Every test here is of them."""
