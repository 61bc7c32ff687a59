"""A public loss is missing nowhere."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import advflow_ext as af
from advflow_ext import conformance
from advflow_ext.contract.outputs import JOINS, TOKEN_METRICS, TRANSITION_METRICS, forward_metrics
from advflow_ext.losses import LOSSES

ROOT = Path(__file__).resolve().parents[2]

every_loss = pytest.mark.parametrize("name", LOSSES)
# A distillation has no advantages: it is no method of policy improvement. The list is of losses of flows: one of tokens
# has neither latents nor times nor a step.
NOT_OF_THE_LIST = {"distillation_loss", "token_policy_loss"}


def test_the_list_is_that_of_the_package() -> None:
    public = {name for name in af.__all__ if name.endswith("_loss")}
    assert public - NOT_OF_THE_LIST == set(LOSSES)


@every_loss
def test_reference_and_file_have_its_name(name: str) -> None:
    loss, reference, stem = getattr(af, name), getattr(af.reference, name), name.removesuffix("_loss")
    assert inspect.signature(loss) == inspect.signature(reference)
    assert loss.__module__ == f"advflow_ext.ops.{stem}" and reference.__module__ == f"advflow_ext.reference.{stem}"


@every_loss
def test_its_latents_and_its_trust_region_are_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(af, name)).parameters
    assert set(LOSSES[name].latents) <= set(parameters) and next(iter(parameters)) == LOSSES[name].latents[0] == "v"
    region = LOSSES[name].trust_region
    if LOSSES[name].family == "reverse":
        assert region is not None and region.option in parameters and region.metric in TRANSITION_METRICS


@every_loss
def test_its_metrics_are_known(name: str) -> None:
    v = torch.randn(4, 6)
    given = {key: torch.randn(4, 6) for key in LOSSES[name].latents} | {"v": v}
    if LOSSES[name].family == "forward":
        given["t"] = torch.full((4,), 0.5)
    else:
        table = af.StepTable([1.0, 0.8, 0.5, 0.2, 0.0])
        given |= {"table": table, "index": torch.tensor([1, 1, 2, 2])}  # type: ignore[dict-item]
    given["rewards" if name == "reward_weighted_loss" else "advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    metrics = getattr(af, name)(**given).metrics
    assert len(metrics.joins) == len(metrics.names) == len(metrics.values)
    assert set(metrics.names) <= set(JOINS)


def test_every_metric_is_explained() -> None:
    explained = af.LossMetrics.__doc__ or ""
    names = {*forward_metrics(("clipped_fraction",), ratio=True), *TRANSITION_METRICS, *TOKEN_METRICS}
    assert [name for name in names if name not in explained] == []
    assert set(JOINS) == names | {"teacher_deviation"}  # which distillation_loss explains


def test_the_bench_times_each() -> None:
    from advflow_ext.bench.ops.losses import LOSSES as timed

    assert {loss.name for loss in timed} == set(LOSSES)


def test_a_trainer_is_compared_with_each() -> None:
    calls = " ".join(row.call for row in conformance.rows())
    assert [name for name in LOSSES if f"{name}(" not in calls] == []


def test_the_loop_trains_with_each() -> None:
    pytest.importorskip("diffusers")

    from advflow.settings.registry import METHODS

    assert {(f"{METHODS.section_of(name)}_loss", method.process) for name, method in METHODS.items()} == {
        ("token_grpo_loss", "tokens"),  # af.token_policy_loss, whose arguments are no flow's
    } | {(name, loss.family) for name, loss in LOSSES.items()}


def test_the_list_of_methods_names_each() -> None:
    methods = (ROOT / "docs/algorithms/index.md").read_text()
    assert [name for name in LOSSES if f"| `{name}` |" not in methods] == []
