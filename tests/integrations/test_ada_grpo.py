"""AdaGRPO in flow_grpo and DanceGRPO: on stand-ins, and with PEERS on their own statistics, samplers and steps."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import advflow_ext as af
from advflow_ext.integrations import ada_grpo
from tests.integrations import loading

each_kind = pytest.mark.parametrize("kind", ["stand-in", pytest.param("real", marks=pytest.mark.peers)])
SAMPLER = "flow_grpo.scripts.train_sd3"
DANCE = "fastvideo.train_grpo_flux"


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    ada_grpo.uninstall()


def tracker_at(mean: float, variance: float = 4.0) -> af.CapabilityTracker:
    tracker = af.CapabilityTracker()
    tracker.load_state_dict({"mean": mean, "variance": variance})
    return tracker


def of_file(path: str, *names: str, given: dict[str, Any]) -> dict[str, Any]:
    """Functions and classes of a script in PEERS that cannot be imported here, with `given` as its globals."""
    file = Path(os.environ["PEERS"]) / path
    if not file.is_file():
        pytest.skip(f"there is no {path} in PEERS")
    wanted = [node for node in ast.parse(file.read_text()).body if getattr(node, "name", None) in names]
    assert len(wanted) == len(names)
    exec(compile(ast.Module(wanted, []), path, "exec"), given)
    return given


def stand_in() -> dict[str, Any]:
    """Ours of them all, made anew, so that nobody else holds a function that is to be replaced."""
    made: dict[str, Any] = {}
    exec(Path(__file__).with_name("stand_ins").joinpath("ada_grpo.py").read_text(), made)
    return made


def module_of(monkeypatch: pytest.MonkeyPatch, name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update({key: value for key, value in contents.items() if not key.startswith("__")})
    monkeypatch.setitem(sys.modules, name, module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# flow_grpo


@pytest.fixture
def statistics(monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    if kind == "real":
        loading.real(monkeypatch, "scripts/train_sd3_GRPO_Guard.py")
        monkeypatch.delitem(sys.modules, ada_grpo.STATISTICS, raising=False)
        return importlib.import_module(ada_grpo.STATISTICS).PerPromptStatTracker
    module_of(monkeypatch, "flow_grpo", {})
    return module_of(monkeypatch, ada_grpo.STATISTICS, stand_in()).PerPromptStatTracker


PROMPTS = ["b", "a", "b", "a", "b", "b", "c"]
REWARDS = np.array([1.0, 7.0, 2.0, 7.5, 4.0, 5.0, 3.0])[:, None].repeat(3, 1)  # every timestep the same, as theirs


@each_kind
@pytest.mark.parametrize("global_std", [False, True])
def test_flow_grpos_advantages_are_theirs_and_the_calibrated_ones(kind: str, statistics: Any, global_std: bool) -> None:
    own = statistics(global_std).update(PROMPTS, REWARDS)
    ada_grpo.install_flow_grpo(tracker_at(3.0), weight=0.5)
    fused = statistics(global_std).update(PROMPTS, REWARDS)
    # "b" on both sides of 3, by hand; "a" above it: the deviation from its mean over the standard deviation, 2.
    calibrated = np.array([-2 / 3, -0.125, -1 / 3, 0.125, 1 / 3, 2 / 3, 0])[:, None].repeat(3, 1)
    np.testing.assert_allclose(fused, own + 0.5 * calibrated, rtol=1e-7, atol=1e-8)
    flat = statistics(global_std).update(PROMPTS, REWARDS[:, 0])
    np.testing.assert_allclose(flat, fused[:, 0], rtol=1e-12)
    assert set(statistics().update(PROMPTS, REWARDS, type="sft").flatten()) <= {0.0, 1.0}
    ada_grpo.uninstall()
    np.testing.assert_array_equal(statistics(global_std).update(PROMPTS, REWARDS), own)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    given = {"torch": torch, "Sampler": torch.utils.data.Sampler}
    real = "flow_grpo/scripts/train_sd3.py"
    found = of_file(real, "DistributedKRepeatSampler", given=given) if kind == "real" else stand_in()
    return module_of(monkeypatch, SAMPLER, found).DistributedKRepeatSampler


def batches_of(sampler: Any, ranks: int, epochs: int) -> list[list[int]]:
    """Of all ranks together, epoch by epoch, through a data loader as theirs."""
    dataset, made = list(range(40)), []
    for epoch in range(epochs):
        together: list[int] = []
        for rank in range(ranks):
            each = sampler(dataset, 4, 4, ranks, rank, seed=42)
            each.set_epoch(epoch)
            together += next(iter(each))
        made.append(together)
    return made


@each_kind
def test_flow_grpos_prompts_are_the_nearest(kind: str, statistics: Any, sampler: Any) -> None:
    asked: list[list[int]] = []

    def score(numbers: list[int]) -> torch.Tensor:
        asked.append(numbers)
        return torch.tensor(numbers, dtype=torch.float32)  # prompt 17 scores 17

    before = batches_of(sampler, 2, 2)
    ada_grpo.install_flow_grpo(tracker_at(17.0), score, candidates=2)
    assert batches_of(sampler, 2, 2) == before  # no more than are needed: their own order, too
    asked.clear()
    tracker = af.CapabilityTracker(per_rank=True)
    ada_grpo.install_flow_grpo(tracker, score, candidates=10)
    (found,) = batches_of(sampler, 2, 1)
    drawn = torch.tensor(asked[0])
    assert asked[0] == asked[1] and len(drawn) == 10 and tracker.mean == drawn.double().mean()
    nearest = drawn[(drawn - drawn.double().mean()).abs().argsort(stable=True)[:2]].tolist()
    assert sorted(found) == sorted(nearest * 4)  # two prompts, four times each, over two ranks
    ada_grpo.uninstall()
    assert batches_of(sampler, 2, 2) == before


def test_flow_grpo_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"candidates is 10 without score; accepted: both"):
        ada_grpo.install_flow_grpo(tracker_at(0.0), candidates=10)
    module_of(monkeypatch, "flow_grpo", {})
    module_of(monkeypatch, ada_grpo.STATISTICS, {"PerPromptStatTracker": stand_in()["PerPromptStatTracker"]})
    with pytest.raises(ImportError, match=r"no module that is imported defines DistributedKRepeatSampler"):
        ada_grpo.install_flow_grpo(tracker_at(0.0), lambda numbers: torch.zeros(len(numbers)), candidates=10)
    other = type("PerPromptStatTracker", (), {"update": lambda self, prompts, rewards, exp=False: rewards})
    module_of(monkeypatch, ada_grpo.STATISTICS, {"PerPromptStatTracker": other})
    with pytest.raises(RuntimeError, match=r"update is \(self, prompts, rewards, exp=False\); accepted is"):
        ada_grpo.install_flow_grpo(tracker_at(0.0))


def no_scores(numbers: list[int]) -> torch.Tensor:
    return torch.zeros(len(numbers))


@pytest.mark.parametrize("kind", ["stand-in"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        *(
            ({"score": no_scores, "candidates": bad}, rf"candidates is {bad}; accepted is an integer of at least 1")
            for bad in (2.5, float("nan"), True, 0, -1)
        ),
        *(({"weight": bad}, rf"weight is {bad}; accepted is a finite number") for bad in (float("nan"), True, -1.0)),
    ],
)
def test_a_refused_install_leaves_the_one_before(
    kind: str, statistics: Any, options: dict[str, Any], sentence: str
) -> None:
    ada_grpo.install_flow_grpo(tracker_at(3.0), weight=0.5)
    before = statistics().update(PROMPTS, REWARDS)
    with pytest.raises(ValueError, match=sentence):
        ada_grpo.install_flow_grpo(tracker_at(0.0), **options)
    np.testing.assert_array_equal(statistics().update(PROMPTS, REWARDS), before)
    ada_grpo.install_flow_grpo(tracker_at(3.0), weight=0.0)
    assert (statistics().update(PROMPTS, REWARDS) != before).any()


@pytest.mark.parametrize("kind", ["stand-in"])
def test_what_is_held_out_of_reach_leaves_the_one_before(kind: str, statistics: Any, sampler: Any) -> None:
    ada_grpo.install_flow_grpo(tracker_at(3.0), weight=0.5)
    before = statistics().update(PROMPTS, REWARDS)
    holder = [vars(sampler)["__iter__"]]
    with pytest.raises(RuntimeError, match=r"__iter__ is held by a list, out of reach"):
        ada_grpo.install_flow_grpo(tracker_at(0.0), no_scores, candidates=4)
    assert len(holder) == 1
    np.testing.assert_array_equal(statistics().update(PROMPTS, REWARDS), before)


# ---------------------------------------------------------------------------------------------------------------------
# DanceGRPO


ARGS = SimpleNamespace(
    eta=0.3, num_generations=4, use_group=True, sampling_steps=3, timestep_fraction=1.0, clip_range=1e-4,
    adv_clip_max=5.0, gradient_accumulation_steps=4,
)  # fmt: skip


class Script:
    """A FLUX script of DanceGRPO, with a sampler that notes what it was asked for and scores a prompt by its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        self.sampled: list[tuple[float, list[str]]] = []
        if kind == "real":
            given = {"torch": torch, "dist": _one_process(), "gather_tensor": lambda tensor: tensor, "print": _silent}
            given |= {"grpo_one_step": self._log_prob}
            functions = of_file("DanceGRPO/fastvideo/train_grpo_flux.py", "train_one_step", given=given)
        else:
            functions = stand_in()
        functions["sample_reference_model"] = self._sample
        self.module = module_of(monkeypatch, DANCE, functions)

    def _sample(self, args: Any, *given: Any) -> tuple[Any, ...]:
        _, _, _, states, pooled, text_ids, _, _, caption, _ = given
        self.sampled.append((args.eta, list(caption)))
        count, steps = len(caption), args.sampling_steps
        assert states[:, 0, 0].tolist() == pooled[:, 0].tolist() == [float(text) for text in caption]
        scores, latents = states[:, 0, 0] + torch.arange(count) % 2, torch.zeros(count, steps + 1, 2, 3)
        return scores, latents, torch.zeros(count, steps), [1.0, 0.7, 0.4, 0.0], text_ids

    @staticmethod
    def _log_prob(args: Any, latents: Any, *others: Any) -> torch.Tensor:
        return torch.zeros(len(latents), requires_grad=True)

    def step(self) -> tuple[float, float]:
        stub = SimpleNamespace(
            step=lambda: None, zero_grad=lambda: None, clip_grad_norm_=lambda most: torch.tensor(1.0)
        )
        given = (ARGS, "cpu", stub, None, None, None, stub, stub, loader(), None, 1.0, None, None)
        return self.module.train_one_step(*given)


def loader() -> Iterator[tuple[Any, ...]]:
    for number in (9.0, 2.0, 4.0, 5.0, 1.0, 8.0):
        yield torch.full((1, 3, 2), number), torch.full((1, 2), number), torch.zeros(1, 3), [f"{number:g}"]


def _one_process() -> SimpleNamespace:
    return SimpleNamespace(
        get_rank=lambda: 1, all_reduce=lambda *_, **__: None, barrier=lambda: None, ReduceOp=SimpleNamespace(AVG=None)
    )


def _silent(*words: object) -> None:
    pass


@each_kind
def test_a_step_of_dance_grpo_learns_from_the_nearest_prompt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, tracker = Script(monkeypatch, kind), af.CapabilityTracker()
    before = script.step()
    assert script.sampled == [(0.3, ["9"] * 4)]
    script.sampled.clear()
    ada_grpo.install_dance_grpo(tracker, candidates=4)
    script.step()
    (no_noise, candidates), learnt_from = script.sampled
    assert 0 < no_noise < 1e-5 and candidates == ["9", "2", "4", "5"]
    assert tracker.mean == (9 + 3 + 4 + 6) / 4 and learnt_from == (0.3, ["5"] * 4)  # scores 9, 3, 4, 6 about 5.5
    with pytest.raises(ValueError, match="candidates is 0"):
        ada_grpo.install_dance_grpo(tracker, candidates=0)
    script.step()
    assert len(script.sampled) == 4  # of both steps the candidates' images and those learnt from
    ada_grpo.install_dance_grpo(af.CapabilityTracker(), candidates=2)
    script.step()
    assert script.sampled[4][1] == ["9", "2"]
    ada_grpo.uninstall()
    assert script.step() == before and script.sampled[-1] == (0.3, ["9"] * 4)


def test_dance_grpo_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"no module that is imported defines train_one_step and sample_ref"):
        ada_grpo.install_dance_grpo(tracker_at(0.0))
    with pytest.raises(ValueError, match=r"candidates is 0; accepted is an integer of at least 1"):
        ada_grpo.install_dance_grpo(tracker_at(0.0), candidates=0)
    hunyuan: Callable[..., None] = lambda args, device, loader, step: None  # noqa: E731
    module_of(monkeypatch, DANCE, {"train_one_step": hunyuan, "sample_reference_model": _silent})
    del hunyuan
    with pytest.raises(RuntimeError, match=r"train_one_step is \(args, device, loader, step\); accepted is"):
        ada_grpo.install_dance_grpo(tracker_at(0.0))
