"""A dry run finds everything that is wrong, not the first thing alone, and leaves no trace; its numbers are right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.dry_run.account import PeakBytes, account
from advflow.dry_run.estimate import prompts_on_disk, work
from advflow.dry_run.passes import Passes, passes_of
from advflow.models.sd3 import SD3, pipeline_folder
from advflow.models.sd3_structure import SD35_MEDIUM, missing_weights, published_sizes
from advflow.rewards import Prompt, Scores, load_reward
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import DataConfig, RolloutConfig
from advflow.settings.methods import FlowGRPOConfig
from advflow.settings.model import ModelConfig
from advflow.settings.processes import SDEConfig
from safetensors.torch import load_file

from tests.trainer.reward_servers import FaultyServer
from tests.trainer.test_ranks import config_of

ROOT = Path(__file__).resolve().parents[2]


class Heavy:
    """Says what it lacks, and must not be made."""

    def __init__(self, file: str = "heavy.bin") -> None:
        raise AssertionError("a dry run has made a reward model")

    @staticmethod
    def lacking(file: str = "heavy.bin") -> list[ValueError]:
        return [ValueError(f"the reward needs {file}")]

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        raise NotImplementedError


class Silent(Heavy):
    lacking = None  # type: ignore[assignment]  # says nothing


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which a dry run sets for its process
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(words: str, capsys: pytest.CaptureFixture[str], code: int | None = None) -> str:
    """What `advflow train --dry_run` prints, on one line each."""
    if code is None:
        main(["train", "--dry_run", *words.split()])
    else:
        with pytest.raises(SystemExit) as caught:
            main(["train", "--dry_run", *words.split()])
        assert caught.value.code == code
    return re.sub(r"\n {10,}", " ", capsys.readouterr().out)


def test_all_faults_are_listed_and_nothing_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "some.txt").write_text("a red circle\na red circle\na green dog\na blue cat\n")
    rewards = {"a": {"reward": f"{__name__}:Heavy"}, "b": {"reward": f"{__name__}:Silent"}, "embedded": 1}
    (here / "rewards.yaml").write_text(json.dumps({"data": {"reward": rewards}}))
    before = sorted(here.rglob("*"))
    text = said(
        "--data.prompts some.txt --data.eval_prompts nowhere.txt --device cuda:99 --rollout.prompts 9 --out some.txt "
        "--model.pipeline nowhere --advantage_flow.lam -1 --config rewards.yaml",
        capsys,
        1,
    )
    for sentence in (
        "advantage_flow.lam is -1",
        "out is 'some.txt', which is a file",
        "device is 'cuda:99'",
        "the reward needs heavy.bin",
        "data.prompts is 'some.txt', line 3: the reward 'embedded' scores",
        "and 1 more",
        "data.eval_prompts is 'nowhere.txt'",
        "rollout.prompts is 9; data.prompts has only 3 different prompts",
        "model.pipeline is 'nowhere'",
    ):
        assert re.search(rf"^missing or wrong +.*{re.escape(sentence)}", text, re.MULTILINE), sentence
    assert "b, weight 1: not made" in text and "1 line repeats an earlier one" in text
    assert text.splitlines()[-1].startswith("not ready: ")
    assert sorted(here.rglob("*")) == before


def test_settings_that_are_wrong_in_several_sections_are_all_named(here: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main("train --dry_run --optim.lr -1 --rollout.steps 0 --evaluation.every 0".split())
    *faults, last = str(caught.value).splitlines()
    assert [fault.split(" is ")[0] for fault in faults] == ["rollout.steps", "optim.lr", "evaluation.every"]
    assert last == "not ready: 3 settings are wrong, above"


def test_a_run_that_is_ready(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3, "load", lambda *_: pytest.fail("a dry run has loaded weights"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    text = said("--rollout.prompts 2 --rollout.images_per_prompt 4 --optim.micro_batch 2", capsys)
    assert text.splitlines()[-1] == "ready" and not list(here.iterdir())
    assert "3; of an iteration's 8 images each draws 2 or 3" in text
    weights = sum(tensor.numel() for tensor in tensors_of(Path(pipeline_folder("embedded")) / "transformer").values())
    assert f"{weights / 1e6:,.1f} million parameters in the transformer, {weights / 1e6:,.1f} million trained" in text
    monkeypatch.setenv("RANK", "1")
    assert said("", capsys) == ""
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("RANK", "0")
    assert "with 9 processes accepted are 9 images or more" in said(
        "--rollout.prompts 2 --rollout.images_per_prompt 4", capsys, 1
    )


def test_a_model_of_tokens_is_looked_at_without_an_estimate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said("--config ar --rollout.prompts 4 --rollout.images_per_prompt 8 --optim.micro_batch 16", capsys)
    assert "embedded; no estimate: the family 'llamagen' has no outline" in text
    assert "1; of an iteration's 32 images each draws 32, in 1 batch of at most 128; micro-batches of 16" in text
    assert text.splitlines()[-1] == "ready" and not list(here.iterdir())
    wrong = said("--config ar --model.pipeline nowhere --rollout.prompts 100000", capsys, 1)
    assert "model.pipeline is 'nowhere'; accepted with model.family \"llamagen\"" in wrong
    assert "rollout.prompts is 100000; data.prompts has only" in wrong
    with pytest.raises(SystemExit, match='model.random_weights is True; accepted: False with "token_grpo"'):
        main("train --dry_run --config ar --random_weights".split())


def test_prompts_are_shown_to_a_reward_server_many_at_a_time(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "some.txt").write_text("a red circle\na green dog\n")
    with FaultyServer({"rules": load_reward("embedded")}) as server:
        words = f'--data.prompts some.txt --data.reward remote --data.reward_args {{"urls":"{server.url}"}}'
        text = said(f"{words} --rollout.prompts 2", capsys, 1)
        assert sum(path.startswith("/check") for path in server.asked) == 2  # the file, and the held-out prompts
    assert "data.prompts is 'some.txt', line 2: the reward 'embedded' scores" in text
    assert text.splitlines()[-1] == "not ready: 1 thing is missing or wrong, above"
    assert "data.reward_args.urls" in said(words, capsys, 1)  # nobody serves there any more


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


class Counted:
    """Counts rows through the transformer, by whether a gradient is asked for."""

    def __init__(self, trainer: Trainer) -> None:
        self.learning = self.others = 0
        family = trainer.policies.family
        stock = family.velocity

        def velocity(transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, told: object) -> torch.Tensor:
            if torch.is_grad_enabled():
                self.learning += len(x)
            else:
                self.others += len(x)
            return stock(transformer, x, t, told)  # type: ignore[arg-type]

        family.velocity = velocity  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "words",
    [
        "--rollout.guidance 4.5 --draws.guidance 2 --rollout.solver dpm --capability.candidates 5",
        "--algorithm flow_grpo --sde.steps 1 --rollout.guidance 4.5 --flow_grpo.kl_weight 0.1 --sde.epochs 2",
        "--algorithm flow_grpo --sde.steps 2 --sde.trained_share 0.5 --sde.anchor replay",
        "--algorithm flow_grpo --sde.window branch --sde.steps 1 --sde.within 2 --sde.branches 2 "
        "--sde.shared_anchor true --rollout.batch 6",
        "--algorithm flow_grpo --sde.steps 2 --sde.reweight true --model.trainable lora "
        "--optim.steps_per_iteration 1 --rollout.guidance 4.5",
    ],
)
def test_passes_are_those_that_a_run_makes(words: str, tmp_path: Path) -> None:
    small = "--device cpu --rollout.prompts 2 --rollout.images_per_prompt 3 --rollout.steps 3 --draws.per_image 2 "
    config = config_of(
        [*(small + words).split(), "--evaluation.prompts_per_category", "1", "--evaluation.guidance", "3"]
    )
    trainer = Trainer(config)
    passes = passes_of(config, trainer.latents.sigmas(config.rollout.steps), len(trainer.eval_prompts))
    counted = Counted(trainer)
    trainer.iterate(0)
    assert (counted.learning, counted.others) == (passes.learning, passes.drawing + passes.comparing)
    counted.others = 0
    trainer.evaluate()
    assert counted.others == passes.evaluation


def test_a_shared_anchor_is_one_pass_a_group() -> None:
    config = TrainConfig(
        algorithm="flow_grpo",
        flow_grpo=FlowGRPOConfig(),
        rollout=RolloutConfig(prompts=4, images_per_prompt=5, steps=6, batch=20),
        sde=SDEConfig(window="branch", steps=1, within=3, shared_anchor=True),
    )
    # Together up to and with step 0, 1 or 2: two passes a group on average, four an image.
    assert passes_of(config, [1 - i / 6 for i in range(7)], 1) == Passes(4 * 2 + 20 * 4, 4, 0, 10)
    several = replace(config, sde=replace(config.sde, branches=2))  # at steps 0 and 1 in turn
    drawn = (1 + 2 + 1 + 2) + 5 * (5 + 4 + 5 + 4)
    assert passes_of(several, [1 - i / 6 for i in range(7)], 1) == Passes(drawn, 4, 0, 10)


def test_the_shapes_of_sd35_medium_are_the_published_ones() -> None:
    config = ModelConfig(
        pipeline=SD35_MEDIUM, trainable="lora", dtype="bfloat16", resolution=512, max_sequence_length=128
    )
    outline = SD3().outline(config)
    assert sum(each.numel() for each in outline.transformer.parameters()) == 2_243_171_520
    assert sum(each.numel() for each in outline.transformer.buffers()) == 384 * 384 * 1536  # a table of positions
    assert sum(each.numel() for each in outline.encoders[2].parameters()) == 4_762_310_656  # T5 v1.1 XXL's encoder
    assert outline.latents == (16, 64, 64)
    assert outline.sigmas(10)[:2] == pytest.approx([1.0, 0.9601], abs=1e-3)


def test_embeddings_of_many_prompts_go_to_the_disk() -> None:
    assert prompts_on_disk(DataConfig(), 2048, 2049) == 2049
    assert prompts_on_disk(DataConfig(embeddings_cache="here"), 3, 4) == 7


@pytest.mark.slow
def test_flops_of_sd35_medium_are_the_benchs() -> None:
    config = ModelConfig(
        pipeline=SD35_MEDIUM, trainable="lora", dtype="bfloat16", resolution=512, max_sequence_length=128
    )
    its = account(SD3(), SD3().outline(config), config, 9, 1)
    measured = json.loads((ROOT / "bench/results/nvidia-h200/step.json").read_text())
    steps, images = measured["step"]["steps"], measured["work"]["batch"]
    assert its.forward == pytest.approx(measured["flops"]["rollout"] / steps / images, rel=1e-3)
    # Of learner, rollout policy and reference, the last without adapters.
    training = measured["flops"]["training"] / measured["step"]["timesteps"] / images
    assert its.learning + 2 * its.forward == pytest.approx(training, rel=0.02)
    stock = next(row for row in measured["results"] if row["variant"] == "stock")
    assert its.kept == pytest.approx(stock["peak_extra_bytes"], rel=0.15)
    run = json.loads((ROOT / "bench/results/nvidia-h200/loop.json").read_text())["median"]
    words = "--rollout.prompts 8 --rollout.images_per_prompt 4 --rollout.steps 10 --draws.per_image 3"
    looped = config_of([*words.split(), "--model.dtype", "bfloat16", "--runtime.cuda_graphs", "true"])
    *_, (_, said) = work(looped, its, passes_of(looped, SD3().outline(config).sigmas(10), 6), 1)
    assert float(said.split(" s an iteration")[0]) == pytest.approx(sum(run.values()), rel=0.1)


def test_memory_and_flops_of_a_small_transformer_are_the_real_ones() -> None:
    lora = ModelConfig(trainable="lora", lora_rank=4)
    plain = account(SD3(), SD3().outline(lora), lora, 6, 2)
    single = account(SD3(), SD3().outline(lora), lora, 3, 2)
    assert plain.forward == single.forward and plain.learning > 2 * plain.forward * 0.9
    assert plain.kept == pytest.approx(2 * single.kept, rel=0.1)
    assert plain.trained == (4 * 8 - 1) * 4 * (64 + 64)  # the last block has no to_add_out
    checkpointed = ModelConfig(trainable="lora", lora_rank=4, gradient_checkpointing=True)
    less = account(SD3(), SD3().outline(checkpointed), checkpointed, 6, 2)
    assert less.kept < plain.kept * 0.7 and less.learning == plain.learning + plain.forward


def test_the_peak_counts_what_is_alive_at_one_time() -> None:
    with PeakBytes() as peak:
        kept = torch.zeros(1000)
        for _ in range(3):
            kept[:500] += torch.ones(500)
    assert peak.peak == pytest.approx(4 * 1500, rel=0.03)


def test_weights_that_are_missing_are_named_by_part(tmp_path: Path, here: Path) -> None:
    folder = Path(published_sizes(SD35_MEDIUM) or "")
    assert missing_weights(str(folder), "x") == [
        "model.pipeline is 'x', which has no .safetensors weights in transformer/, vae/, text_encoder/, "
        f"text_encoder_2/, text_encoder_3/: hf download {SD35_MEDIUM}"
    ]
    (sentence,) = missing_weights(SD35_MEDIUM, SD35_MEDIUM)
    assert "accept its licence" in sentence and "hf download" in sentence
    assert missing_weights(pipeline_folder("embedded"), "embedded") == []
