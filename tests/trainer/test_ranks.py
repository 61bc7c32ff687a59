"""Several processes train what one would: the same draws, advantages over all images, one writer.

Most tests let threads stand for the processes, which costs no start of Python; whole jobs are started by torchrun, as
a user starts them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import _parse, main
from advflow.core.ranks import Ranks, _buckets, join_ranks
from advflow.run.checkpoint import checkpoints
from advflow.run.log import EVALS, METRICS, read_rows
from advflow.run.trainer import Trainer
from advflow.settings.sources import to_config, train_parser
from safetensors.torch import load_file

from tests.trainer.runs import TIMES, assert_same_run, files
from tests.trainer.several import TORCHRUN, start

# 3 groups of 4 images: each of two processes has a half of the second group; of five some have two images, some three.
WORDS = (
    "--device cpu --rollout.prompts 3 --rollout.images_per_prompt 4 --rollout.steps 4 --rollout.batch 4 "
    "--evaluation.prompts_per_category 1 --evaluation.steps 2 --checkpoint_every 1 --evaluation.every 2 --iterations 2"
).split()
METHODS = {
    "advantage_flow": ["--draws.per_image", "2"],
    "per image": "--draws.per_image 2 --draws.noise per_image --draws.timesteps sampler_grid --draws.split images "
    "--optim.steps_per_iteration 2".split(),
    # 12 images in 4 updates: of five processes some have no image of an update.
    "flow_grpo": "--algorithm flow_grpo --optim.steps_per_iteration 4 --sde.steps 3 --sde.trained_share 0.7".split(),
    "mix_grpo": "--algorithm mix_grpo".split(),
    "curriculum": "--draws.per_image 1 --capability.candidates 7 --advantage.norm group_std".split(),
    "reweighted": "--algorithm flow_grpo --optim.steps_per_iteration 1 --sde.steps 2 --sde.reweight true "
    "--rollout_policy.rate 0 --model.trainable lora --model.lora_rank 4".split(),
    "lora": "--model.trainable lora --model.lora_rank 4 --draws.per_image 1 --optim.micro_batch 3 "
    "--runtime.modulation_cache false".split(),
}
# The root of the parts' mean squares is not the whole's; and before any update it is rounding, which depends on the
# batch, that tells two velocities apart.
OF_PARTS = ("ratio_std", "contrast_alive")
LOADING = threading.Lock()  # diffusers loads one pipeline at a time in a process


class Meeting:
    """Where threads that stand for processes exchange what they have."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=120), [None] * size


class Threads(Ranks):
    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def _exchanged(self, value: Any) -> list[Any]:
        self._meeting.slots[self.rank] = value
        self._meeting.barrier.wait()
        all_values = list(self._meeting.slots)
        self._meeting.barrier.wait()
        return all_values

    def everyone(self, value: Any) -> list[Any]:
        return self._exchanged(json.loads(json.dumps(value)))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchanged(rows))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        for parameter, *gradients in zip(
            parameters, *self._exchanged([parameter.grad for parameter in parameters]), strict=True
        ):
            there = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = torch.stack(there).sum(0) if there else None
        self._meeting.barrier.wait()


def config_of(words: Sequence[str]) -> Any:
    arguments = _parse(["train", *words]).train
    for name in ("resume", "config"):
        arguments.pop(name)
    return to_config(train_parser(), arguments)


def train_together(size: int, words: Sequence[str]) -> list[tuple[list[dict[str, float]], Any, list[torch.Tensor]]]:
    """Rows of two iterations, an evaluation, and the learner's weights, of each of `size` processes."""
    meeting, config = Meeting(size), config_of(words)

    def one(rank: int) -> tuple[list[dict[str, float]], Any, list[torch.Tensor]]:
        try:
            with LOADING:
                trainer = Trainer(config, ranks=Threads(rank, size, meeting) if size > 1 else None)
            rows = [trainer.iterate(iteration) for iteration in range(2)]
            return rows, trainer.evaluate([0, 3]), [weight.detach() for weight in trainer.policies.learner]
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("advantage_flow", 5),
        ("per image", 2),
        ("flow_grpo", 5),
        ("mix_grpo", 2),
        ("reweighted", 2),
        ("lora", 2),
        ("curriculum", 2),
    ],
)
def test_any_number_of_processes_trains_what_one_does(method: str, size: int) -> None:
    words = [*WORDS, *METHODS[method]]
    ((rows, evaluation, weights),) = train_together(1, words)
    for its_rows, its_evaluation, its_weights in train_together(size, words):
        for row, its in zip(rows, its_rows, strict=True):
            assert row.keys() == its.keys()
            for key in row.keys() - {*TIMES, *OF_PARTS}:
                assert its[key] == pytest.approx(row[key], rel=1e-5, abs=1e-5), key
        torch.testing.assert_close(its_weights, weights, rtol=1e-5, atol=1e-5)
        assert its_evaluation.categories == pytest.approx(evaluation.categories, abs=1e-5)
        torch.testing.assert_close(its_evaluation.images, evaluation.images, rtol=1e-4, atol=1e-4)


def test_each_process_draws_and_scores_its_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "images", [])
    words = [*WORDS, *METHODS["advantage_flow"], "--data.reward", f"{__name__}:Counting"]
    train_together(5, words)
    assert sorted(Counting.images) == sorted([2, 2, 3, 2, 3] * 2 + [1, 1, 1, 1, 2])  # two rollouts, six held-out images


class Counting:
    images: list[int] = []

    def __call__(self, images: torch.Tensor, prompts: list[Any]) -> Any:
        from advflow.rewards import Scores

        assert len(images) == len(prompts)
        Counting.images.append(len(images))
        red = images[:, 0].mean((1, 2))
        return Scores(red, red)


@pytest.mark.parametrize(("count", "size"), [(12, 5), (3, 2), (7, 7), (2, 3)])
def test_shares_cover_everything_once(count: int, size: int) -> None:
    shares = [Threads(rank, size, Meeting(size)).share(count) for rank in range(size)]
    assert [row for share in shares for row in range(count)[share]] == list(range(count))
    assert {len(range(count)[share]) for share in shares} <= {count // size, count // size + 1}


def test_buckets_keep_dtypes_apart_and_are_small_transfers() -> None:
    tensors = [torch.zeros(3 * 2**20), torch.zeros(7 * 2**20), torch.zeros(1), torch.zeros(1).double(), torch.zeros(1)]
    assert [len(bucket) for bucket in _buckets(tensors)] == [2, 1, 1, 1]


@pytest.mark.parametrize(
    ("variables", "device", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "cuda:1", r'device is \'cuda:1\', with 2 processes; accepted is "auto", "cpu" or "cuda"'),
        ({"WORLD_SIZE": "many"}, "cpu", r"WORLD_SIZE in the environment is 'many'; accepted is a number"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    variables: dict[str, str], device: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        join_ranks(device)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "--rollout.prompts 2 --capability.candidates 4",
            r"capability.candidates is 4; with 5 processes accepted are 5",
        ),
        ("--rollout.prompts 1", r"rollout.images_per_prompt is 4; with 5 processes accepted are 5 images or more"),
        (
            "--algorithm reward_weighted --reward_weighted.method best",
            r"rollout.prompts is 3; with reward_weighted.method .* and 5 processes accepted is a multiple of 5",
        ),
    ],
)
def test_shares_that_cannot_be_are_refused_before_anything_is_loaded(words: str, sentence: str) -> None:
    config = config_of([*WORDS, *words.split()])
    with pytest.raises(ValueError, match=sentence):
        Trainer(config, ranks=Threads(0, 5, Meeting(5)))


MORTAL = """
import os, pathlib, signal
from advflow.rewards import Scores

class Mortal:
    calls = 0

    def __call__(self, images, prompts):
        Mortal.calls += 1
        deadly = pathlib.Path(__file__).with_name("deadly")
        # The first evaluation's one batch and the first rollout's two are over: in the second rollout.
        if os.environ["RANK"] == "1" and Mortal.calls == 4 and deadly.exists():
            deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        red = images[:, 0].mean((1, 2))
        return Scores(red, red)
"""


@pytest.mark.slow
def test_jobs_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes leave what one does; where one is killed the job ends, and goes on to the same bits."""
    (tmp_path / "mortal.py").write_text(MORTAL)
    words = [*WORDS, *METHODS["advantage_flow"], "--data.reward", "mortal:Mortal"]
    whole = start(tmp_path, TORCHRUN, "--out", "whole", *words, seconds=300)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("report: ") == whole.stdout.count("held-out score") == 1

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    main(["train", "--out", "alone", *words])
    assert files(tmp_path / "whole").keys() == files(tmp_path / "alone").keys()
    for name in (METRICS, EVALS):
        for row, its in zip(read_rows(tmp_path / "alone" / name), read_rows(tmp_path / "whole" / name), strict=True):
            for key in row.keys() - {*TIMES, "categories"}:
                assert its[key] == pytest.approx(row[key], rel=1e-5, abs=1e-5), key
    one, two = (
        load_file(checkpoints(tmp_path / each / "checkpoints")[-1] / "tensors.safetensors")
        for each in ("alone", "whole")
    )
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)

    (tmp_path / "deadly").touch()
    killed = start(tmp_path, TORCHRUN, "--out", "killed", *words, seconds=300)
    assert killed.returncode != 0 and not (tmp_path / "deadly").exists()
    assert len(read_rows(tmp_path / "killed" / METRICS)) == 1
    resumed = start(tmp_path, TORCHRUN, "--out", "killed", "--resume", seconds=300)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
