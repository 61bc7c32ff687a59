"""Embeddings on disk: the same bits, made once, by all processes together; damage is seen, text encoders are gone."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.core.ranks import Ranks
from advflow.models.embedding_cache import EmbeddingCache
from advflow.models.encoding import Encoder, OnDemand, user_cache
from advflow.models.family import LoadedModel, StoredForm
from advflow.models.sd3 import SD3, load_pipeline, text_identity
from advflow.run.inference import evaluate_run, load_judgement, load_run
from advflow.run.log import EVALS
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.data import DataConfig
from advflow.settings.model import ModelConfig
from advflow.settings.sources import load_run_config

from tests.trainer.runs import SMALL, rows
from tests.trainer.test_ranks import Meeting, Threads

Make = Callable[..., TrainConfig]
CPU = torch.device("cpu")
TEXTS = [f"prompt {number}" for number in range(150)]  # three files: 64, 64, 22


@dataclass
class Fake:
    """Text encoders of a few lines, which count what they are asked."""

    asked: int = 0
    fails_at: int | None = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        self.asked += 1
        if self.asked == self.fails_at:
            raise KeyboardInterrupt
        assert len(texts) <= 64
        return torch.stack([torch.tensor([float(hash(text) % 1000), 1.0], dtype=torch.bfloat16) for text in texts])


FORM = StoredForm(lambda: "0" * 64, lambda said: {"said": said}, lambda tensors: tensors["said"])  # type: ignore[arg-type, return-value]


def _filled(folder: Path, encode: Fake, texts: Sequence[str] = TEXTS, ranks: Ranks | None = None) -> EmbeddingCache:
    cache = EmbeddingCache(folder, FORM.identity())
    cache.fill(texts, lambda part: {"said": encode(part)}, "data.prompts", ranks or Ranks())
    return cache


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / ("0" * 32)).iterdir())


def _truth(texts: Sequence[str]) -> torch.Tensor:
    return torch.cat([Fake()([text] * 64)[:1] for text in texts])


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    first, second, more = Fake(), Fake(), Fake()
    _filled(tmp_path, first)
    cache = _filled(tmp_path, second, [*TEXTS[::-1], TEXTS[3]])
    assert (first.asked, second.asked, len(_files(tmp_path))) == (3, 0, 3)
    asked = [TEXTS[140], TEXTS[0], TEXTS[0]]
    assert torch.equal(cache.read(asked)["said"], _truth(asked))
    _filled(tmp_path, more, [*TEXTS, "another", "another"])
    assert more.asked == 1 and len(_files(tmp_path)) == 4


def test_what_was_killed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        _filled(tmp_path, Fake(fails_at=3))
    assert len(_files(tmp_path)) == 2
    again = Fake()
    cache = _filled(tmp_path, again)
    assert again.asked == 1 and torch.equal(cache.read(TEXTS)["said"], _truth(TEXTS))
    shown = capsys.readouterr()
    assert "data.prompts: 128 embeddings are in " in shown.out and ", 22 are to be made" in shown.out
    assert "data.prompts: 100% 1/1 [" in shown.err and "x64 prompts/s]" in shown.err


@pytest.mark.parametrize("broken", ["truncated", "empty", "another file"])
def test_a_file_that_cannot_be_read_is_named_and_made_again(broken: str, tmp_path: Path) -> None:
    _filled(tmp_path, Fake())
    path = _files(tmp_path)[1]
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-10], "empty": b"", "another file": b"{}" * 100}[broken])
    again = Fake()
    with pytest.warns(UserWarning, match=f"{path.name} is damaged .*; its prompts are encoded again"):
        cache = _filled(tmp_path, again)
    assert again.asked == 1 and torch.equal(cache.read(TEXTS)["said"], _truth(TEXTS))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(5, "Input/output error"),
        FileNotFoundError("No such file or directory: what safetensors says of too many open files"),
    ],
)
def test_a_file_that_cannot_be_opened_is_left_to_others(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _filled(tmp_path, Fake())
    before = {path: path.read_bytes() for path in _files(tmp_path)}

    def fail(*_: object) -> None:
        raise error

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"\.safetensors cannot be read \(.*; accepted"),
    ):
        patch.setattr("advflow.models.embedding_cache.safe_open", fail)
        _filled(tmp_path, Fake())
    assert {path: path.read_bytes() for path in _files(tmp_path)} == before


def test_too_many_open_files_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors then says that there is no such file."""
    _filled(tmp_path, Fake())

    def fail(*_: object) -> None:
        raise FileNotFoundError("No such file or directory")

    def too_many(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"cannot be read \(Too many open files\)"):
        patch.setattr("advflow.models.embedding_cache.safe_open", fail)
        patch.setattr(Path, "open", too_many)
        _filled(tmp_path, Fake())
    assert len(_files(tmp_path)) == 3


def test_a_file_that_another_run_has_removed_since_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _filled(tmp_path, Fake())
    again, glob = Fake(), Path.glob

    def overtaken(self: Path, pattern: str) -> Any:
        found = list(glob(self, pattern))
        if "safetensors" in pattern and again.asked == 0:
            found[0].unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", overtaken)
        cache = _filled(tmp_path, again)
    assert again.asked == 1 and torch.equal(cache.read(TEXTS)["said"], _truth(TEXTS))


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    _filled(tmp_path, Fake())
    for path in _files(tmp_path):
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    cache = _filled(tmp_path, Fake())
    with pytest.raises(
        ValueError, match=r"\.safetensors is damaged: remove it and go on .* \(the embeddings of 'prompt"
    ):
        cache.read(TEXTS)
    assert torch.equal(cache.read(TEXTS[:3])["said"], _truth(TEXTS[:3]))


class Process(Threads):
    def wait(self) -> None:
        self.everyone(None)


def test_processes_share_the_work(tmp_path: Path) -> None:
    meeting, encoders = Meeting(2), [Fake(), Fake()]

    def one(rank: int) -> EmbeddingCache:
        return _filled(tmp_path, encoders[rank], ranks=Process(rank, 2, meeting))

    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(one, range(2)))
    assert [encoder.asked for encoder in encoders] == [1, 2]
    assert all(torch.equal(cache.read(TEXTS)["said"], _truth(TEXTS)) for cache in caches)


def test_processes_must_see_one_folder(tmp_path: Path) -> None:
    meeting = Meeting(2)

    def one(rank: int) -> str:
        with pytest.raises(ValueError, match="data.embeddings_cache must be a folder that all processes see") as caught:
            _filled(tmp_path / str(rank), Fake(), ranks=Process(rank, 2, meeting))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        sentences = list(pool.map(one, range(2)))
    assert all(": 86 as process 0 sees it, 64 as process 1 sees it; data" in sentence for sentence in sentences)


def test_a_process_that_sees_all_says_who_does_not(tmp_path: Path) -> None:
    meeting = Meeting(2)

    def one(rank: int) -> None:  # the second makes the only file
        with pytest.raises(ValueError, match=r"embeddings that were made are not in .*: 64 as process 0 sees it; data"):
            _filled(tmp_path / str(rank), Fake(), TEXTS[:64], Process(rank, 2, meeting))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))


def test_what_is_removed_under_a_process_alone_is_told_of_no_other(tmp_path: Path) -> None:
    class Removing(Ranks):
        def wait(self) -> None:
            _files(tmp_path)[0].unlink()

    with pytest.raises(ValueError, match="64 embeddings that were there are no longer in .* from which nothing is rem"):
        _filled(tmp_path, Fake(), TEXTS[:128], Removing())


def test_too_little_room_is_seen_after_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 700})())
    encode = Fake()
    with pytest.raises(
        ValueError, match=r"has 0.0 GB left, and the embeddings take about 0.0 GB; accepted is a data.emb"
    ):
        _filled(tmp_path, encode)
    assert encode.asked == 1 and _files(tmp_path) == [] and usage.f_bavail > 0


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("advflow.models.embedding_cache.save_file", full)
        _filled(tmp_path, Fake())
    assert _files(tmp_path) == []
    abandoned, fresh = (tmp_path / ("0" * 32) / name for name in (".a.1.partial", ".b.2.partial"))
    for path in (abandoned, fresh):
        path.touch()
    os.utime(abandoned, (time.time() - 90_000,) * 2)
    _filled(tmp_path, Fake())
    assert fresh.exists() and not abandoned.exists()


def test_what_the_encoders_say_depends_on_is_in_their_identity() -> None:
    def identity(length: int = 12, **changes: object) -> str:
        return text_identity(load_pipeline(replace(ModelConfig(), **changes), CPU), length)

    pipeline = load_pipeline(ModelConfig(), CPU)
    known = text_identity(pipeline, 12)
    assert known == identity() and len({known, identity(13), identity(dtype="bfloat16")}) == 3
    weight = next(pipeline.text_encoder_3.parameters())
    with torch.no_grad():
        weight.view(-1)[7] += 1e-3
        assert text_identity(pipeline, 12) != known
        weight.view(-1)[7] -= 1e-3
    pipeline.tokenizer_2.add_tokens(["squircle"])
    assert text_identity(pipeline, 12) != known


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cached")


@pytest.mark.parametrize("cache", [None, "cold", "warm"])
def test_training_has_the_same_bits_and_no_text_encoders(
    cache: str | None, cached: Path, small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SD3.load
    alive: list[weakref.ref[object]] = []

    def watched(self: SD3, config: ModelConfig, device: torch.device) -> LoadedModel:
        model = load(self, config, device)
        pipeline = next(cell.cell_contents for cell in model.encode.__closure__ if hasattr(cell.cell_contents, "vae"))  # type: ignore[union-attr]
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
        alive.extend(weakref.ref(each) for encoder in encoders for each in (encoder, *encoder.parameters()))
        return model

    monkeypatch.setattr(SD3, "load", watched)
    folder = cached / "cache" if cache else None
    trainer = Trainer(small_config(data=DataConfig(embeddings_cache=None if folder is None else str(folder))))
    gc.collect()
    assert len(alive) > 50 and not any(reference() is not None for reference in alive)
    trainer.iterate(0)
    score = trainer.evaluate([0])
    found = [*(weight.detach() for weight in trainer.policies.learner), score.images, torch.tensor(score.reward)]
    if cache is None:
        torch.save(found, cached / "found")
        return
    expected = torch.load(cached / "found", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(list(cached.rglob("*.safetensors"))) == 7  # 369 prompts, then 12 held-out ones


def test_a_run_is_evaluated_as_its_training_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    main(["train", "--out", str(run), *SMALL, "--iterations", "1", "--data.embeddings_cache", str(cache)])
    config, load = load_run_config(str(run)), SD3.load
    sizes: list[int] = []

    def watched(self: SD3, settings: ModelConfig, device: torch.device) -> LoadedModel:
        model = load(self, settings, device)
        return replace(model, encode=lambda texts: sizes.append(len(texts)) or model.encode(texts))  # type: ignore[func-returns-value]

    monkeypatch.setattr(SD3, "load", watched)
    told = rows(run, EVALS)[-1]
    for folder, encoded in ((str(cache), []), (None, [64])):
        own = replace(config, data=replace(config.data, embeddings_cache=folder))
        found = evaluate_run(load_run(run, own, base=False), load_judgement(own))
        assert (found.overall, found.categories, sizes) == (told["overall"], told["categories"], encoded)


def test_many_prompts_go_to_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advflow.models.encoding.IN_MEMORY_AT_MOST", 149)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes: list[int] = []

    def fake(texts: Sequence[str]) -> torch.Tensor:
        sizes.append(len(texts))
        return Fake()(texts)

    encode = Encoder(LoadedModel(None, None, fake, FORM), None, CPU, Ranks())  # type: ignore[arg-type]
    told = encode(TEXTS, "data.prompts")
    assert len(_files(tmp_path / "advflow" / "embeddings")) == 3 and len(told) == 150
    assert torch.equal(told[torch.tensor([140, 2])], _truth([TEXTS[140], TEXTS[2]]))  # type: ignore[arg-type]
    assert torch.equal(told[1:3], _truth(TEXTS[1:3]))  # type: ignore[arg-type]
    assert all(size == 64 for size in sizes)  # whatever is left over
    few = encode(TEXTS[:149], "data.prompts")
    assert isinstance(few, torch.Tensor) and torch.equal(few, _truth(TEXTS[:149]))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache() == Path.home() / ".cache" / "advflow" / "embeddings"


def test_a_family_without_a_stored_form_encodes_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    model = LoadedModel(None, None, lambda texts: asked.append(list(texts)))  # type: ignore[arg-type, return-value]
    monkeypatch.setattr("advflow.models.encoding.IN_MEMORY_AT_MOST", 1)
    told = Encoder(model, None, CPU, Ranks())(["a", "b", "c"], "data.prompts")
    assert isinstance(told, OnDemand) and len(told) == 3 and asked == []
    assert told[torch.tensor([2, 0, 2])] is None and told[1:] is None and asked == [["c", "a", "c"], ["b", "c"]]
    with pytest.raises(
        ValueError, match="data.embeddings_cache is 'x'; accepted with a model family that has no stored"
    ):
        Encoder(model, "x", CPU, Ranks())


def test_a_folder_that_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SD3, "load", lambda *_: pytest.fail("loaded a model"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data.embeddings_cache is '.*file', which is a file; accepted is a folder"):
        Trainer(small_config(data=DataConfig(embeddings_cache=str(tmp_path / "file"))))
