"""The scalar stage against plain PyTorch, and what it promises of bad samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advflow_ext import _native
from advflow_ext._native import STATS
from advflow_ext.contract.outputs import RATIO_METRICS, TRANSITION_METRICS, forward_metrics
from advflow_ext.contract.step_table import StepRows
from advflow_ext.kernels.loss_summary import LossSummary, loss_summary
from advflow_ext.reference._summary import reduce_losses, summarise

pytestmark = pytest.mark.skipif(_native.module is None, reason="nothing compiled")

COLUMNS = ("means", "required", "advantages", "extreme", "stats", "coef")


def draw(batch, means=3, required=2, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def column(*shape):
        # Every second element of a wider tensor: columns arrive strided.
        return torch.randn(*shape, 2, generator=generator, dtype=dtype).to(device)[..., 0]

    return {
        "means": [column(batch) for _ in range(means)],
        "required": [column(batch) for _ in range(required)],
        "advantages": column(batch),
        "extreme": column(batch),
        "stats": column(batch, len(STATS)),
        "coef": column(batch, 3),
        "valid": (torch.rand(batch, generator=generator) > 0.2).to(device),
        "flagged": (torch.rand(batch, generator=generator) > 0.5).to(device),
    }


def finite_samples(given_):
    columns = [*given_["means"], *given_["required"], given_["advantages"], given_["extreme"]]
    columns += [*given_["stats"].unbind(1), *given_["coef"].unbind(1)]
    return torch.stack(columns).isfinite().all(0)


def expected(given_, stat_means, largest, reduction):
    finite = finite_samples(given_)
    usable = finite & given_["valid"]
    losses = torch.where(usable, given_["means"][0].double(), 0)
    divisor = max(len(usable), 1) if reduction == "mean" else 1
    coef = torch.where(usable[:, None], given_["coef"].double() / divisor, 0)
    means = [column.double() for column in (*given_["means"], *given_["stats"].unbind(1)[:stat_means])]
    metrics = summarise(
        means, given_["advantages"].double(), given_["extreme"].double(), given_["flagged"], finite, given_["valid"],
        largest=largest,
    )  # fmt: skip
    return LossSummary(reduce_losses(losses, reduction), coef, metrics)


def damage(given_, name, sample, value):
    tensor = given_[name][-1] if isinstance(given_[name], list) else given_[name]
    tensor[sample] = value


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batch=st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 1000])),
    means=st.integers(1, 8),
    required=st.integers(0, 4),
    stat_means=st.integers(0, 3),
    largest=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bad=st.lists(st.tuples(st.sampled_from(COLUMNS), st.integers(0, 999), st.sampled_from([math.inf, math.nan]))),
    seed=st.integers(0, 2**31),
)
def test_is_the_plain_form(batch, means, required, stat_means, largest, reduction, dtype, bad, seed):
    given_ = draw(batch, means, required, dtype, seed=seed)
    for name, sample, value in bad:
        if batch and (name != "required" or required):
            damage(given_, name, sample % batch, value)
    actual = loss_summary(**given_, stat_means=stat_means, largest=largest, reduction=reduction)
    # Sums run in float64, so float32 results are rounded once; terms of both signs cancel to 1e-14 at worst.
    relative = 2.0**-23 if dtype == torch.float32 else 2.0**-48
    for ours, theirs in zip(actual, expected(given_, stat_means, largest, reduction), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=relative, atol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_bad_sample_is_dropped_and_counted_and_leaves_the_others(name, value, device):
    clean = draw(9, device=device)
    clean["valid"] = torch.ones_like(clean["valid"])
    damaged = {key: [c.clone() for c in x] if isinstance(x, list) else x.clone() for key, x in clean.items()}
    damage(damaged, name, 4, value)
    before, after = (
        loss_summary(**given_, stat_means=3, largest=False, reduction="none") for given_ in (clean, damaged)
    )
    others = torch.arange(9, device=device) != 4
    assert torch.equal(before.loss[others], after.loss[others]) and torch.equal(before.coef[others], after.coef[others])
    assert after.loss[4] == 0 and not after.coef[4].any()
    assert after.metrics.isfinite().all() and after.metrics[-2] == 1 and before.metrics[-2] == 0


def test_an_invalid_sample_may_hold_anything(device):
    given_ = draw(5, device=device)
    given_["valid"] = torch.tensor([True, True, False, True, True], device=device)
    given_["coef"][2] = math.nan
    summary = loss_summary(**given_, stat_means=0, largest=True, reduction="sum")
    assert not summary.coef[2].any() and summary.loss.isfinite()
    assert summary.metrics[-2:].tolist() == [1, 1]


def test_nothing_usable(device):
    for largest, extreme in ((False, math.inf), (True, 0.0)):
        given_ = draw(4, device=device)
        given_["valid"] = torch.zeros_like(given_["valid"])
        summary = loss_summary(**given_, stat_means=3, largest=largest, reduction="mean")
        assert summary.loss == 0 and not summary.coef.any()
        assert summary.metrics.tolist() == [0.0] * 8 + [extreme, 0.0, 0.0, 4.0]


def test_same_bits_every_time_and_one_launch(device):
    given_ = draw(777, device=device)
    module = _native.module
    assert module is not None
    module.reset_launch_count()
    first = loss_summary(**given_, stat_means=3, largest=True, reduction="mean")
    assert module.launch_count() == 1
    for _ in range(10):
        again = loss_summary(**given_, stat_means=3, largest=True, reduction="mean")
        assert all(map(torch.equal, first, again))


def test_the_core_counts_as_many_as_have_names():
    module = _native.module
    assert module is not None
    assert module.SUMMARY["ratio_metrics"] == len(RATIO_METRICS)
    assert module.STEP_COLUMNS == len(StepRows._fields)
    for transitions, _, _, metrics in module.LOSSES.values():
        assert metrics == len(TRANSITION_METRICS if transitions else forward_metrics())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(reduction, device):
    torch.library.opcheck(
        torch.ops.advflow.loss_summary.default, (*draw(5, device=device).values(), 3, False, reduction)
    )


def test_has_no_gradient(device):
    given_ = draw(3, device=device)
    given_["means"][0].requires_grad_()
    with pytest.raises(RuntimeError, match="loss_summary is not implemented"):
        loss_summary(**given_, stat_means=0, largest=False, reduction="mean").loss.backward()


MISUSE = [
    ({"means": []}, {}, r"means is empty"),
    ({"means": [torch.zeros(4)] * 9}, {}, r"means has 9 columns; accepted are at most 8"),
    ({"required": [torch.zeros(4)] * 5}, {}, r"required has 5 columns; accepted are at most 4"),
    ({"advantages": torch.zeros(3)}, {}, r"advantages has shape \[3\]; accepted is \[4\]"),
    ({"extreme": torch.zeros(4).double()}, {}, r"extreme has dtype Double; accepted is Float"),
    ({"coef": torch.zeros(4, 2)}, {}, r"coef has shape \[4, 2\]; accepted is \[4, 3\]"),
    ({"stats": torch.zeros(4, 3)}, {}, r"stats has shape \[4, 3\]; accepted is \[B, 8\]"),
    ({"valid": torch.zeros(4)}, {}, r"valid has dtype Float; accepted is Bool"),
    ({"flagged": torch.zeros(4, 1) > 0}, {}, r"flagged has shape \[4, 1\]; accepted is \[4\]"),
    ({}, {"stat_means": 4}, r"stat_means is 4; accepted are 0 to 3"),
    ({}, {"reduction": "avg"}, r"reduction is 'avg'; accepted are 'mean', 'sum' and 'none'"),
]


@pytest.mark.parametrize(("tensors", "options", "sentence"), MISUSE)
def test_misuse_is_a_sentence(tensors, options, sentence):
    options = {"stat_means": 0, "largest": False, "reduction": "mean", **options}
    with pytest.raises(RuntimeError, match=sentence):
        loss_summary(**{**draw(4), **tensors}, **options)
