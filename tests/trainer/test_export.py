"""What a run has learnt, in stock diffusers: the same images."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.core.randomness import generator
from advflow.models.sd3 import load_pipeline
from advflow.policies import FullPolicies, LoraPolicies
from advflow.run.checkpoint import Kept, checkpoints, load_newest, save_checkpoint
from advflow.run.inference import draw_images, load_run
from advflow.settings.model import ModelConfig
from advflow.settings.sources import load_run_config
from diffusers import SD3Transformer2DModel

from tests.trainer.runs import SMALL

PROMPT = "a red circle"
KINDS = {
    "lora": "--model.trainable lora --model.lora_rank 4 --model.lora_alpha 12 --optim.lr 0.05 --optim.warmup 1".split(),
    "full": [],
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    main(["train", "--out", str(folder), *SMALL, "--iterations", "2", *KINDS[request.param]])
    return request.param, folder


def stock_images(kind: str, folder: Path | None) -> torch.Tensor:
    """Three images by diffusers' own pipeline, from the noise that `advflow sample` starts from."""
    pipeline = load_pipeline(ModelConfig(), torch.device("cpu"))
    if folder is not None and kind == "lora":
        pipeline.load_lora_weights(folder)
    elif folder is not None:
        pipeline.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    side = 32 // pipeline.vae_scale_factor
    noise = torch.randn(3, pipeline.transformer.config.in_channels, side, side, generator=generator(5, "sample", 0))
    given: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 12}
    images = pipeline([PROMPT] * 3, latents=noise, height=32, width=32, output_type="pt", **given).images
    return images.float()


def test_stock_diffusers_draws_the_same_images(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = run
    ours = draw_images(load_run(folder, load_run_config(str(folder)), base=False), PROMPT, 3, 4, 5)
    main(["export", "--run", str(folder), "--out", str(tmp_path / "tuned")])
    for where in (checkpoints(folder / "checkpoints")[-1], tmp_path / "tuned"):
        torch.testing.assert_close(stock_images(kind, where), ours, rtol=0, atol=1e-3)
    assert (stock_images(kind, None) - ours).abs().max() > 5e-3  # it has learnt something


def test_a_folder_that_is_there_is_not_written_to(run: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--out is '.*'; accepted is a new folder in one that exists"):
        main(["export", "--run", str(run[1]), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_an_export_that_finds_no_room_leaves_nothing_and_can_be_repeated(
    run: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--run", str(run[1]), "--out", str(tmp_path / "tuned")]

    def full(self: Any, folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        for policies in (LoraPolicies, FullPolicies):
            patch.setattr(policies, "export", full)
        main(words)
    assert ended.value.code != 0 and not list(tmp_path.iterdir())
    main(words)
    written = sorted(str(path) for path in (tmp_path / "tuned").iterdir())
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {', '.join(written)}"


class Nothing:
    def state_dict(self) -> dict[str, Any]:
        return {"weight": torch.zeros(2)}

    def load_state_dict(self, state: Any) -> None:
        pass


def test_newest_best_and_every_so_many_stay(tmp_path: Path) -> None:
    for iteration in range(1, 13):
        kept = Kept(newest=3, best=2 if iteration > 1 else None, every=5)
        save_checkpoint(tmp_path, iteration, {"learner": Nothing()}, kept)
    assert [int(path.name) for path in checkpoints(tmp_path)] == [2, 5, 10, 11, 12]


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "tensors.safetensors", "state.json"])
def test_a_flipped_byte_of_any_file_is_seen(file: str, tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"0" * 100)

    for iteration in (1, 2):
        save_checkpoint(tmp_path, iteration, {"learner": Nothing()}, export=export)
    path = tmp_path / "000002" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="000002 is damaged: .*going on from .*000001"):
        assert load_newest(tmp_path, {"learner": Nothing()}) == 1
