"""Prompt files as people have them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from advflow.cli import main
from advflow.data.prompt_files import read_prompts
from advflow.data.prompts import PromptSource, check_prompts, load_eval_prompts, load_training_prompts
from advflow.rewards import Prompt, Scores, UnknownPrompt, load_reward
from advflow.settings.data import DataConfig
from advflow.world.captions import held_out_captions, training_captions


class Any:
    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return Scores(torch.ones(len(prompts)), torch.ones(len(prompts)))

    def check(self, prompt: Prompt) -> None:
        if prompt.text == "unspeakable":
            raise UnknownPrompt("that cannot be said")


ANY = load_reward(f"{__name__}:Any").check


GENEVAL = (
    b'{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
    b'{"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "two benches"}\n'
)


def _texts(content: bytes, folder: Path) -> list[str]:
    file = folder / "prompts.txt"
    file.write_bytes(content)
    prompts = load_training_prompts(str(file)).prompts
    assert load_eval_prompts(str(file), 64) == prompts
    assert all(prompt == Prompt(prompt.text, "all", {}) for prompt in prompts)
    return [prompt.text for prompt in prompts]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"a cat\na dog", ["a cat", "a dog"]),
        (b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\na dog\n", ["a cat", "a dog"]),
        (b"\xef\xbb\xbf\r\na cat\r\n", ["a cat"]),
        (b"\n\n  \n\t\na cat\n\r\n \t \n", ["a cat"]),
        (b" a cat \n\ta dog\t\n", ["a cat", "a dog"]),
        (b"a cat\na dog\na cat\n a cat\n", ["a cat", "a dog"]),
        ("Köln bei Nacht\n猫\n".encode(), ["Köln bei Nacht", "猫"]),
        (b"{red|blue} circle\n", ["{red|blue} circle"]),
    ],
)
def test_lines_are_prompts(content: bytes, texts: list[str], tmp_path: Path) -> None:
    assert _texts(content, tmp_path) == texts


@pytest.mark.parametrize("mark", "\u2028 \u2029 \u0085 \v \f \x1c \x1d \x1e".split(" "))
def test_only_newlines_end_a_line(mark: str, tmp_path: Path) -> None:
    content = f"a cat{mark}on a mat\n{mark}\na dog{mark}\n".encode()
    assert _texts(content, tmp_path) == [f"a cat{mark}on a mat", f"a dog{mark}"]


@pytest.mark.parametrize("field", ["data.prompts", "data.eval_prompts"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a cat\ngr\xfcn\n", "{field} is '{file}', which is not UTF-8 (byte 0xfc in line 2); accepted: UTF-8"),
        ("a cat\n".encode("utf-16"), "{field} is '{file}', which is UTF-16; accepted: UTF-8"),
        ("a cat\n".encode("utf-16-be"), "{field} is '{file}', which has a NUL byte in line 1; accepted: UTF-8 text"),
        (b"a cat\na\0dog\n", "{field} is '{file}', which has a NUL byte in line 2; accepted: UTF-8 text"),
        (b"", "{field} is '{file}', which holds no prompt"),
        (b"\xef\xbb\xbf\n \n\xe2\x80\xa8\n", "{field} is '{file}', which holds no prompt"),
        (
            b'a cat\n{"tag": "counting", "prompt": "two cats"}\n',
            "{field} is '{file}', whose line 2 is JSON; accepted are",
        ),
        (GENEVAL + b"a cow\n", "{field} is '{file}', whose line 3 is a cow; accepted is a JSON object such as"),
        (GENEVAL + b'{"prompt": "a cow"\n', '{field} is \'{file}\', whose line 3 is {{"prompt": "a cow"; accepted is'),
        (GENEVAL + b'["a cow"]\n', "{field} is '{file}', whose line 3 is [\"a cow\"]; accepted is a JSON object"),
        (
            GENEVAL + b'{"tag": "counting", "include": []}',
            "{field} is '{file}', whose line 3 has no text: it holds 'tag', 'include'; accepted is one under ",
        ),
        (GENEVAL + b'{"prompt": " "}', "{field} is '{file}', whose line 3 has no text: it holds 'prompt'; accepted"),
        (
            GENEVAL + b'{"prompt": ["a"]}',
            "{field} is '{file}', whose line 3 has [\"a\"] under 'prompt'; accepted is text",
        ),
        (
            GENEVAL + b'{"prompt": "a", "tag": 3}',
            "{field} is '{file}', whose line 3 has 3 under 'tag'; accepted is text",
        ),
    ],
)
def test_a_file_that_is_none_is_named(field: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", str(tmp_path / "run"), f"--{field}", str(file), "--data.reward", f"{__name__}:Any"])
    assert str(caught.value).startswith("advflow train: " + sentence.format(field=field, file=file))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (".", 'data.prompts is \'.\', a folder; accepted: "embedded", "ar_world", "shapes", a text file'),
        (
            "nowhere.txt",
            'data.prompts is \'nowhere.txt\', where there is no file; accepted: "embedded", "ar_world", "shapes"',
        ),
        ("embeded", "data.prompts is 'embeded', where there is no file; did you mean 'embedded'? accepted: "),
    ],
)
def test_a_name_that_is_no_file_is_refused(path: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_prompts(path, "data.prompts")
    assert str(caught.value).startswith(sentence)


def test_repeats_and_overlap_are_counted_and_said(tmp_path: Path) -> None:
    training, held_out = tmp_path / "train.txt", tmp_path / "test.txt"
    training.write_text("a cat\na dog\n\na cat\na cow\na cat\n")
    held_out.write_text("a hen\na cow\na pig\na hen\na dog\n")
    assert read_prompts(str(training), "data.prompts") == {
        Prompt("a cat"): [1, 4, 6],
        Prompt("a dog"): [2],
        Prompt("a cow"): [5],
    }
    assert check_prompts(DataConfig(str(training), str(held_out)), ANY) == [
        f"data.prompts: 2 lines repeat an earlier one of {training}; its 3 prompts count once each",
        f"data.eval_prompts: 1 line repeats an earlier one of {held_out}; its 4 prompts count once each",
        "data.eval_prompts: 2 of 4 held-out prompts are also trained on, first 'a cow'",
    ]
    training.write_text(training_captions()[0].text + "\n" + held_out_captions()[0].text + "\n")
    assert len(check_prompts(DataConfig(str(training)), ANY)) == 1
    assert check_prompts(DataConfig(), load_reward("embedded").check) == []


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_json_lines_have_a_category_and_metadata(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    other = '{"caption": " two benches ", "category": "counting", "include": [{"class": "bench", "count": 3}]}'
    file.write_bytes(b"\xef\xbb\xbf" + GENEVAL.replace(b"\n", b"\r\n") + b"\n" + GENEVAL + other.encode())
    bench = {"class": "bench", "count": 1}
    first = Prompt("a photo of a bench", "single_object", {"tag": "single_object", "include": [bench]})
    second = Prompt("two benches", "counting", {"tag": "counting", "include": [bench | {"count": 2}]})
    # The same text in the same category, of which a reward is told something else, is another prompt.
    third = Prompt("two benches", "counting", {"category": "counting", "include": [bench | {"count": 3}]})
    assert read_prompts(str(file), "data.prompts") == {first: [1, 4], second: [2, 5], third: [6]}
    assert load_training_prompts(str(file)).prompts == [first, second, third]
    assert load_eval_prompts(str(file), 1) == [first, second]
    assert check_prompts(DataConfig(str(file)), ANY)[0].startswith("data.prompts: 2 lines repeat an earlier one")


class Recording(Any):
    seen: list[Prompt] = []

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        Recording.seen += prompts
        return super().__call__(images, prompts)


def test_a_prompt_reaches_the_reward_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its category and its metadata, in training and in evaluation."""
    monkeypatch.setattr(Recording, "seen", [])
    asked = [Prompt("two cats", "counting", {"count": 2}), Prompt("a red cat", "colors", {"color": "red"})]
    monkeypatch.setattr(
        "advflow.run.trainer.load_training_prompts", lambda name: PromptSource(asked, torch.ones(len(asked)))
    )
    monkeypatch.setattr("advflow.run.trainer.load_eval_prompts", lambda name, per_category: asked)
    small = "--iterations 1 --rollout.prompts 2 --rollout.images_per_prompt 2 --rollout.steps 1 --draws.per_image 1"
    words = ["--data.reward", f"{__name__}:Recording", *small.split(), "--evaluation.steps", "1"]
    main(["train", "--out", str(tmp_path / "run"), *words])
    assert len(Recording.seen) == 2 + 4 + 2 and all(any(prompt is each for each in asked) for prompt in Recording.seen)
    assert Recording.seen[:2] == asked
    evaluated = json.loads((tmp_path / "run" / "evals.jsonl").read_text().splitlines()[0])
    assert list(evaluated["categories"]) == ["counting", "colors"]


def test_the_prompt_needs_no_torch() -> None:
    code = "import sys, advflow.data.prompt; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_says_it_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na red circle\na dog\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--out", str(tmp_path / "run"), "--data.prompts", str(file), "--rollout.prompts", "2"])
    assert str(caught.value).startswith(
        f"advflow train: data.prompts is '{file}', line 3: the reward 'embedded' scores the prompts of the embedded"
    )
    words = ["--data.prompts", str(file), "--data.eval_prompts", str(file), "--data.reward", f"{__name__}:Any"]
    small = "--iterations 1 --rollout.prompts 2 --rollout.images_per_prompt 2 --rollout.steps 1 --draws.per_image 1"
    main(["train", "--out", str(tmp_path / "other"), *words, *small.split(), "--evaluation.steps", "1"])
    said = capsys.readouterr().out
    assert f"data.prompts: 1 line repeats an earlier one of {file}; its 2 prompts count once each" in said
    assert "data.eval_prompts: 2 of 2 held-out prompts are also trained on, first 'a red circle'" in said


def test_a_prompt_that_a_reward_refuses_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\nunspeakable\n")
    for data in (DataConfig(str(file)), DataConfig(eval_prompts=str(file))):
        field = "data.prompts" if data.prompts == str(file) else "data.eval_prompts"
        with pytest.raises(ValueError, match=f"{field} is '.*prompts.txt', line 3: that cannot be said"):
            check_prompts(data, ANY)
