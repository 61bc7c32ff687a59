"""What a launcher may take for the variant it has compiled before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advflow_ext.kernels import launch
from advflow_ext.kernels.launch import Launcher

GRID = (3, 1, 1)


class Kernel:
    """Stands for a Triton kernel: compiles for what a call holds, and writes down every launch."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.again: list[tuple[int, tuple[Any, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def compile_and_launch(*arguments: Any, num_warps: int) -> Any:
            self.compiled.append((grid, arguments, num_warps))
            variant, kernel = len(self.compiled) - 1, self

            class Compiled:
                def __getitem__(self, grid: tuple[int, int, int]) -> Any:
                    return lambda *again: kernel.again.append((variant, grid, again))

            return Compiled()

        return compile_and_launch


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def call(launcher: Launcher, **changes: Any) -> tuple[Any, ...]:
    given = {"tensors": (torch.zeros(8), torch.zeros(8)), "numbers": (4, 16, 1e-6), "constants": (1, 64)} | changes
    launcher(GRID, given["tensors"], given["numbers"], given["constants"], given.get("num_warps", 4))
    return (*given["tensors"], *given["numbers"], *given["constants"])


def test_the_same_kind_of_call_is_compiled_once_and_given_its_own_arguments(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    call(launcher)
    for _ in range(3):
        arguments = call(launcher)
        variant, grid, given = kernel.again[-1]
        assert (variant, grid) == (0, GRID) and len(given) == len(arguments)
        assert all(mine is theirs for mine, theirs in zip(given[:2], arguments[:2], strict=True))
        assert given[2:] == arguments[2:]
    assert len(kernel.compiled) == 1 and kernel.compiled[0][2] == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"numbers": (5, 16, 1e-6)},
        {"numbers": (4, 1, 1e-6)},
        {"numbers": (4, 2**33, 1e-6)},
        {"constants": (2, 64)},
        {"num_warps": 8},
        {"tensors": (torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16))},
        {"tensors": (torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8))},
        {"tensors": (torch.zeros(8), None)},
        {"tensors": (torch.zeros(8, device="meta"), torch.zeros(8, device="meta"))},
    ],
)
def test_whatever_may_be_compiled_otherwise_is_another_variant(kernel: Kernel, changes: dict[str, Any]) -> None:
    launcher = Launcher(kernel)
    call(launcher)
    call(launcher, **changes)
    assert len(kernel.compiled) == 2 and not kernel.again
    call(launcher)
    call(launcher, **changes)
    assert [variant for variant, *_ in kernel.again] == [0, 1]


def test_a_pointer_that_is_not_aligned_is_left_to_triton(kernel: Kernel) -> None:
    launcher = Launcher(kernel)
    call(launcher)
    for _ in range(2):
        call(launcher, tensors=(torch.zeros(8), torch.zeros(9)[1:]))
    assert len(kernel.compiled) == 3 and not kernel.again
    call(launcher)
    assert [variant for variant, *_ in kernel.again] == [0]


def test_variants_do_not_pile_up(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_VARIANTS", 3)
    launcher = Launcher(kernel)
    for size in range(10):
        call(launcher, numbers=(size, 16, 1e-6))
        assert len(launcher._compiled) <= 3
    call(launcher, numbers=(9, 16, 1e-6))
    assert [variant for variant, *_ in kernel.again] == [9]
