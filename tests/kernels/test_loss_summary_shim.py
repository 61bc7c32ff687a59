"""The CUDA source of the scalar stage, against plain PyTorch.

Runs on the launch shim everywhere and, unchanged, on a GPU (``-m gpu``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from advflow_ext.reference._summary import reduce_losses, summarise
from tests.kernels.kernel_harness import STATS, UNSUPPORTED_DTYPE, SummaryKernels, poisoned

# Around the one warp of a small batch, the block of a large one, and its second turn.
batches = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 511, 513, 1000]))


def draw(batch: int, means: int, required: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def column() -> torch.Tensor:
        return torch.randn(batch, 2, generator=generator)[:, 0]

    return {
        "means": [column() for _ in range(means)],
        "required": [column() for _ in range(required)],
        "advantages": column(),
        "extreme": column(),
        "stats": torch.randn(batch, STATS, generator=generator),
        "coef": torch.randn(batch, 3, generator=generator),
        "valid": torch.rand(batch, generator=generator) > 0.2,
        "flagged": torch.rand(batch, generator=generator) > 0.5,
    }


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: [x.to(device) for x in v] if isinstance(v, list) else v.to(device) for k, v in inputs.items()}


def expected(inputs: dict[str, Any], stat_means: int, largest: bool, reduction: str) -> list[torch.Tensor]:
    wide: dict[str, Any] = {
        k: [x.double() for x in v] if isinstance(v, list) else v.double() for k, v in inputs.items()
    }
    columns = [*wide["means"], *wide["required"], wide["advantages"], wide["extreme"]]
    finite = torch.stack([*columns, *wide["stats"].unbind(1), *wide["coef"].unbind(1)]).isfinite().all(0)
    usable = finite & inputs["valid"]
    divisor = max(len(usable), 1) if reduction == "mean" else 1
    metrics = summarise(
        [*wide["means"], *wide["stats"].unbind(1)[:stat_means]],
        wide["advantages"], wide["extreme"], inputs["flagged"], finite, inputs["valid"], largest=largest,
    )  # fmt: skip
    losses = torch.where(usable, wide["means"][0], 0)
    return [reduce_losses(losses, reduction), torch.where(usable[:, None], wide["coef"] / divisor, 0), metrics]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    batch=batches,
    means=st.integers(1, 8),
    required=st.integers(0, 4),
    stat_means=st.integers(0, 3),
    largest=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    bad=st.lists(st.tuples(st.sampled_from(["means", "stats", "coef", "extreme"]), st.integers(0, 999)), max_size=3),
    seed=st.integers(0, 2**31),
)
@example(batch=0, means=1, required=0, stat_means=0, largest=False, reduction="mean", bad=[], seed=0)
def test_matches_the_plain_form(
    summary_kernels: SummaryKernels,
    batch: int,
    means: int,
    required: int,
    stat_means: int,
    largest: bool,
    reduction: str,
    bad: list[tuple[str, int]],
    seed: int,
) -> None:
    inputs = draw(batch, means, required, seed)
    for name, sample in bad if batch else []:
        tensor = inputs[name][-1] if name == "means" else inputs[name]
        tensor[sample % batch] = math.nan if sample % 2 else math.inf
    actual = summary_kernels.summary(on(summary_kernels.device, inputs), stat_means, largest, reduction)
    # Sums run in fp64, so a result is rounded once.
    for ours, theirs in zip(actual, expected(inputs, stat_means, largest, reduction), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2.0**-23, atol=1e-12)


def test_same_bits_every_time(summary_kernels: SummaryKernels) -> None:
    inputs = on(summary_kernels.device, draw(777, 5, 1, 3))
    first = summary_kernels.summary(inputs, 3, True, "mean")
    for _ in range(5):
        assert all(map(torch.equal, first, summary_kernels.summary(inputs, 3, True, "mean")))


def test_float64_is_refused(summary_kernels: SummaryKernels) -> None:
    inputs = draw(3, 1, 0, 0)
    inputs["stats"] = inputs["stats"].double()
    outputs = [poisoned(size, torch.float32, summary_kernels.device) for size in (1, 9, 7)]
    status = summary_kernels.try_summary(on(summary_kernels.device, inputs), 0, False, "mean", outputs)
    assert status == UNSUPPORTED_DTYPE and all(x.isnan().all() for x in outputs)
