"""`advflow reward-server`: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import math
import os
import pickle
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advflow.cli import main
from advflow.rewards import CheckedReward, Prompt, Scores, load_reward, service
from advflow.rewards.images import eight_bit, pictures
from advflow.rewards.wire import JSON, NPZ, BadRequest, decode_request, encode_request
from advflow.serve.metrics import Metrics
from advflow.serve.server import identity, load, read_token
from advflow.serve.work import Job, Unavailable, Workers, score
from advflow.settings import registry
from advflow.settings.numbers import WrongSetting
from advflow.settings.registry import Choice
from advflow.settings.serve import ServeConfig
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.reward_servers import real_server
from tests.trainer.runs import SMALL, assert_same_run, strict_json

PROMPTS = [Prompt("a red circle", "single", {"n": each}) for each in range(3)]
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
MOST = 10**6


class Odd:
    """Has no score for a prompt of {"n": 1}, raises for 2, and has no memory for 3; writes down what it was asked."""

    asked: list[int] = []

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        self.asked.append(len(prompts))
        numbers = [each.metadata.get("n", 0) for each in prompts]
        if 2 in numbers:
            raise ValueError("two\nlines")
        if 3 in numbers:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Scores([math.nan if each == 1 else float(each) for each in numbers], [0.5] * len(numbers))  # type: ignore[arg-type]


class Waits(Odd):
    """Scores when it may."""

    may = threading.Event()
    began = threading.Event()

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        Waits.began.set()
        assert Waits.may.wait(20)
        return super().__call__(images, prompts)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(service.TOKEN, raising=False)
    monkeypatch.setattr(Odd, "asked", [])


# Formats


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _zip(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def _npy(array: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), **how)
    return buffer.getvalue()


def _png(image: torch.Tensor = IMAGES[:1], mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    pictures(image)[0].convert(mode).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_npz_loses_nothing() -> None:
    images, prompts = decode_request(encode_request(IMAGES, PROMPTS), NPZ, MOST)
    assert torch.equal(images, IMAGES) and images.dtype == torch.float32 and prompts == PROMPTS


def test_what_is_sent_is_an_npz_file() -> None:
    with np.load(io.BytesIO(encode_request(IMAGES, PROMPTS)), allow_pickle=False) as archive:
        assert np.array_equal(archive["images"], IMAGES.numpy()) and archive["images"].dtype == np.float32
        assert json.loads(str(archive["prompts"]))[1] == {
            "text": "a red circle", "category": "single", "metadata": {"n": 1},
        }  # fmt: skip
    by_columns = _npz(images=np.asfortranarray(IMAGES.numpy()), prompts=TEXT)
    assert torch.equal(decode_request(by_columns, NPZ, MOST)[0], IMAGES)


def test_by_hand_it_is_two_lines() -> None:
    eight = eight_bit(IMAGES).numpy()
    images, prompts = decode_request(_npz(images=eight, prompts=json.dumps(["a", {"text": "b"}, "c"])), NPZ, MOST)
    assert torch.equal(images, torch.from_numpy(eight).float() / 255)
    assert prompts == [Prompt("a"), Prompt("b"), Prompt("c")]
    pngs = {"images": [_png(IMAGES[row : row + 1]) for row in range(3)], "prompts": ["a", {"text": "b"}, "c"]}
    again, _ = decode_request(json.dumps(pngs).encode(), JSON, MOST)
    assert torch.equal(again, images)


GOOD = encode_request(IMAGES[:, :, :2, :2], PROMPTS)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("a-pickle-was-read",)


TEXT = json.dumps(["a", "b", "c"])
PIXELS = IMAGES.numpy()
LIES = _npy(np.zeros(3, np.float32)).replace(b"(3,)", b"(9,)")
BAD = {
    "no zip": (b"hello", "the body is no npz file that can be read: File is not a zip file"),
    "nothing": (b"", "no npz file"),
    "cut off": (encode_request(IMAGES, PROMPTS)[:-40], "no npz file"),
    "a pickle": (pickle.dumps({"images": PIXELS}), "no npz file"),
    "pickled pixels": (_npz(images=np.array([Bomb()] * 3), prompts=TEXT), "an array of object"),
    "pickled prompts": (_npz(images=PIXELS, prompts=np.array(Bomb())), "an array of object"),
    "other arrays": (_npz(images=PIXELS, prompts=TEXT, more=1), "accepted is an npz file of two arrays"),
    "no prompts": (_npz(images=PIXELS), "accepted is an npz file of two arrays"),
    "a header that lies": (_zip(images=LIES, prompts=_npy(TEXT)), "an array of float32 and shape [9] is not what"),
    "version 3": (_zip(images=_npy(PIXELS, version=(3, 0)), prompts=_npy(TEXT)), "version (3, 0)"),
    "a zip bomb": (_zip(images=bytes(MOST + 1), prompts=b""), "more than the 1000000 bytes"),
    "doubles": (_npz(images=PIXELS.astype(float), prompts=TEXT), "images is an array of float64"),
    "one image": (_npz(images=PIXELS[0], prompts=TEXT), "shape [3, 8, 8]; accepted"),
    "grey": (_npz(images=PIXELS[:, :1], prompts=TEXT), "shape [3, 1, 8, 8]; accepted"),
    "no images": (_npz(images=PIXELS[:0], prompts="[]"), "shape [0, 3, 8, 8]; accepted"),
    "a list of prompts": (_npz(images=PIXELS, prompts=["a", "b", "c"]), "prompts is an array of <U1"),
    "no JSON": (_npz(images=PIXELS, prompts="{"), "the body is no JSON"),
    "deep": (_npz(images=PIXELS, prompts="[" * 100_000), "the body is no JSON"),
    "a number": (_npz(images=PIXELS, prompts="5"), "prompts is no list"),
    "two prompts": (_npz(images=PIXELS, prompts='["a", "b"]'), "there are 3 images and 2 prompts"),
    "no text": (_npz(images=PIXELS, prompts='["a", "b", {"category": "c"}]'), "prompts[2] is no prompt"),
    "a list for metadata": (_npz(images=PIXELS, prompts='["a", {"text": "b", "metadata": []}, "c"]'), "prompts[1] is"),
    "more about it": (_npz(images=PIXELS, prompts='[{"text": "b", "weight": 1}, "b", "c"]'), "prompts[0] is no prompt"),
}
BAD_JSON = {
    "no JSON": (b"\xff", "the body is no JSON"),
    "a list": (b"[]", "accepted is a JSON object of images and prompts"),
    "no list": (b'{"images": 1, "prompts": ["a"]}', "images is no list of PNGs in base64"),
    "no base64": (b'{"images": ["!"], "prompts": ["a"]}', "images[0] is no PNG in base64"),
    "no text": (b'{"images": [1], "prompts": ["a"]}', "images[0] is no PNG in base64"),
    "no PNG": (b'{"images": ["aGVsbG8="], "prompts": ["a"]}', "images[0] is no PNG in base64"),
    "alpha": (json.dumps({"images": [_png(mode="RGBA")], "prompts": ["a"]}).encode(), "a PNG of mode RGBA"),
    "cut off": (
        json.dumps({"images": [base64.b64encode(base64.b64decode(_png())[:60]).decode()], "prompts": ["a"]}).encode(),
        "an image is no PNG that can be read",
    ),
    "two sizes": (
        json.dumps({"images": [_png(), _png(torch.rand(1, 3, 4, 8))], "prompts": ["a", "b"]}).encode(),
        "the images are of different sizes",
    ),
    "huge": (
        json.dumps({"images": [_png(torch.zeros(1, 3, 1000, 1000))], "prompts": ["a"]}).encode(),
        "the images take more than the 1000000 bytes",
    ),
}


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [(NPZ, *each) for each in BAD.values()] + [(JSON, *each) for each in BAD_JSON.values()],
    ids=[f"npz: {name}" for name in BAD] + [f"JSON: {name}" for name in BAD_JSON],
)
def test_a_bad_request_is_a_sentence(
    kind: str, body: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest) as caught:
        decode_request(body, kind, MOST)
    assert reason in str(caught.value) and len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_request_is_refused_or_read(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(GOOD)
    for place, byte in changes:
        damaged[place] = byte
    with contextlib.suppress(BadRequest):
        images, prompts = decode_request(bytes(damaged), NPZ, MOST)
        assert images.shape[1] == 3 and len(images) == len(prompts) > 0


# Scoring


def test_images_that_fail_are_named_and_the_others_scored(capfd: pytest.CaptureFixture[str]) -> None:
    images = IMAGES.clone()[[0, 1, 2, 0]]
    images[3, 0, 0, 0] = math.nan
    prompts = [*PROMPTS, PROMPTS[0]]
    found = score(CheckedReward(Odd()), images, prompts)
    assert found.reward[0] == 0.0 and found.score[0] == 0.5 and all(map(math.isnan, found.reward[1:]))
    assert found.errors == {1: "no finite score", 2: "ValueError: two lines", 3: "its pixels are not all in [0, 1]"}
    assert Odd.asked == [1, 1, 1]
    images[3, 0, 0, 0] = 1.5
    assert score(CheckedReward(Odd()), images[3:], prompts[3:]).errors == {0: "its pixels are not all in [0, 1]"}


def test_want_of_memory_says_nothing_about_the_images() -> None:
    with pytest.raises(Unavailable, match="OutOfMemoryError: CUDA out of memory"):
        score(CheckedReward(Odd()), IMAGES[:1], [Prompt("a", metadata={"n": 3})])


def _jobs(*counts: int, size: int = 8, names: tuple[str, ...] = ("odd",)) -> list[Job]:
    return [Job(torch.rand(n, 3, size, size), [Prompt("a", metadata={"n": 5})] * n, names) for n in counts]


@pytest.mark.parametrize(("wait", "asked"), [(0.0, [1, 2, 3, 4]), (30.0, [6, 4])])
def test_requests_go_together_where_they_may_wait(wait: float, asked: list[int]) -> None:
    """Up to as many images as one batch holds: here the fourth request does not fit."""
    workers = Workers([{"odd": CheckedReward(Odd())}], 6, wait, Metrics())
    jobs = _jobs(1, 2, 3, 4)
    for job in jobs:
        workers.submit(job)
    workers.close(20)  # and what is there is still scored
    assert [len(job.answer.result(20)["odd"].reward) for job in jobs] == [1, 2, 3, 4]
    assert Odd.asked == asked


def test_only_what_is_alike_goes_together() -> None:
    workers = Workers([{name: CheckedReward(Odd()) for name in ("odd", "other")}], 100, 0.5, Metrics())
    jobs = [*_jobs(1), *_jobs(2, size=4), *_jobs(3, names=("other",)), *_jobs(4)]
    for job in jobs:
        workers.submit(job)
    for job in jobs:
        job.answer.result(20)
    workers.close(20)
    assert sorted(Odd.asked) == [2, 3, 5]


def test_what_nobody_waits_for_is_not_scored() -> None:
    workers = Workers([{"odd": CheckedReward(Odd())}], 100, 0.2, Metrics())
    first, second = _jobs(1, 2)
    assert first.answer.cancel()
    workers.submit(first)
    workers.submit(second)
    second.answer.result(20)
    workers.close(20)
    assert Odd.asked == [2]


def test_each_worker_has_rewards_of_its_own_and_they_score_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2)

    class Meets(Odd):
        def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
            meeting.wait(20)
            return super().__call__(images, prompts)

    workers = Workers([{"odd": CheckedReward(Meets())} for _ in range(2)], 100, 0.0, Metrics())
    jobs = _jobs(1, 1)
    for job in jobs:
        workers.submit(job)
    for job in jobs:
        job.answer.result(20)
    workers.close(20)


# Settings


def test_who_is_reached_from_elsewhere_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "a-machine", ""):
        with pytest.raises(
            ValueError, match=r"which other machines reach, and there is no token; accepted: --token_file"
        ):
            read_token(ServeConfig(host=host))
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert read_token(ServeConfig(host=host)) is None
    (tmp_path / "token").write_text(" secret\n")
    assert read_token(ServeConfig(host="0.0.0.0", token_file=str(tmp_path / "token"))) == "secret"
    monkeypatch.setenv(service.TOKEN, "other")
    assert read_token(ServeConfig(host="0.0.0.0")) == "other"
    monkeypatch.setenv(service.TOKEN, "ß")
    with pytest.raises(ValueError, match="ADVFLOW_REWARD_TOKEN holds no token: accepted is a line of ASCII"):
        read_token(ServeConfig())
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two lines").write_text("a\nb\n")
    (tmp_path / "no text").write_bytes(b"\xff")
    for name in ("empty", "two lines", "no text", "none"):
        with pytest.raises(ValueError, match=r"^token_file is '.*': the token file"):
            read_token(ServeConfig(token_file=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"port": 65536}, "port is 65536; accepted: 0 to 65535"),
        ({"workers": 0}, "workers is 0; accepted: 1 or more"),
        ({"wait": -1.0}, "wait is -1.0; accepted: zero or a positive number of seconds"),
        ({"max_waiting_mb": 5}, "max_waiting_mb is 5; accepted: max_request_mb, 256, or more"),
        ({"grace": 0.0}, "grace is 0.0; accepted: a positive number of seconds"),
        ({"reward": {}}, "reward is {}; accepted: a name, or one reward or more by their names"),
    ],
)
def test_a_wrong_setting_is_a_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongSetting) as caught:
        ServeConfig(**settings)
    assert str(caught.value) == said


def test_what_is_served_has_a_name_of_its_own() -> None:
    one, same = ServeConfig(reward="redness"), ServeConfig(reward={"redness": 0.5})
    assert identity(one) == identity(same) != identity(ServeConfig(reward="embedded"))
    args = {"reward": "shapes", "args": {"a": 1}}
    assert identity(ServeConfig(reward={"x": args})) != identity(ServeConfig(reward={"x": args | {"args": {"a": 2}}}))
    with pytest.raises(ValueError, match=r"^reward is 'beauty'; accepted: 'embedded'"):
        load(ServeConfig(reward="beauty").rewards)
    with pytest.raises(ValueError, match=r"^there is no reward\.x\.args\.a; reward 'shapes' takes no arguments$"):
        load(ServeConfig(reward={"x": args}).rewards)


@dataclass
class DarkConfig:
    """Settings of a plugin's reward."""

    level: float = 0.5


class Dark:
    def __init__(self, settings: DarkConfig) -> None:
        self.level = settings.level

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        dark = (images < self.level).float().mean((1, 2, 3))
        return Scores(dark, dark)


def test_a_plugins_reward_is_given_its_section_as_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REWARDS, "dark", Choice(Dark, DarkConfig))
    served = load(
        ServeConfig(reward={"dark": {"args": {"level": 2.0}, "batch": 2}, "other": {"reward": "dark"}}).rewards
    )
    assert served["dark"](IMAGES, PROMPTS).score.tolist() == [1.0, 1.0, 1.0] and served["dark"].batch == 2
    assert 0 < served["other"](IMAGES, PROMPTS).score.mean() < 1


def test_without_its_packages_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit) as caught:
        main(["reward-server", "--reward", "redness"])
    assert str(caught.value) == (
        "advflow reward-server: advflow reward-server needs the package fastapi, which is not installed: "
        'pip install "advflow[serve]"'
    )


# The server

REWARDS = {
    "redness": 1,
    "embedded": {"batch": 2},
    "odd": {"reward": f"{__name__}:Odd"},
    "waits": {"reward": f"{__name__}:Waits"},
}
SERVED = ServeConfig(reward=REWARDS, port=0, max_request_mb=1, max_waiting_mb=2, max_seconds=1.0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason='needs the extra "serve": pip install "advflow[serve]"')
    with real_server(SERVED, "secret") as address:
        yield address


def _ask(url: str, body: bytes | None = None, kind: str = NPZ, token: str | None = "secret") -> tuple[int, Any]:
    headers = {"Content-Type": kind} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20) as response:
            status, content = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read().decode()
    return status, strict_json(content) if content.startswith("{") else content


def test_scores_are_those_of_the_reward_here(url: str) -> None:
    status, answer = _ask(f"{url}/score?reward=redness&reward=embedded", encode_request(IMAGES, PROMPTS))
    assert status == 200 and list(answer["rewards"]) == ["redness", "embedded"]
    assert answer["service"] == identity(SERVED)
    for name, found in answer["rewards"].items():
        expected = load_reward(name)(IMAGES, PROMPTS)
        assert torch.equal(torch.tensor(found["reward"]), expected.reward) and found["errors"] == {}
        assert torch.equal(torch.tensor(found["score"]), expected.score)


def test_the_client_finds_its_reward(url: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    arguments = {"urls": url, "token_file": str(tmp_path / "token"), "batch": 2}
    for name in ("redness", "embedded"):
        remote = load_reward("remote", arguments | {"reward": name})
        assert torch.equal(remote(IMAGES, PROMPTS).reward, load_reward(name)(IMAGES, PROMPTS).reward)
    scores = load_reward("remote", arguments | {"reward": "odd"})(IMAGES, PROMPTS)
    assert scores.reward.isnan().tolist() == [False, True, True]
    with pytest.raises(ValueError, match="the reward 'embedded' scores the prompts of the embedded world alone"):
        load_reward("remote", arguments | {"reward": "embedded"}).check(Prompt("a dog"))
    with pytest.raises(ValueError, match="it answers 401: the token is missing or wrong; accepted"):
        load_reward("remote", {"urls": url})


def test_a_run_on_it_has_the_bits_of_one_on_the_reward_here(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a second reward beside it, which is scored in the run's own process."""
    monkeypatch.setenv(service.TOKEN, "secret")
    remote = {"reward": "remote", "args": {"urls": [url], "reward": "embedded", "batch": 1}}
    words = [*SMALL, "--iterations", "1"]
    for name, first in (("here", {"reward": "embedded"}), ("there", remote)):
        rewards = json.dumps({"first": first, "red": {"reward": "redness", "weight": 0.5}})
        main(["train", "--out", str(tmp_path / name), *words, "--data.reward", rewards])
    assert_same_run(tmp_path / "here", tmp_path / "there")


def test_the_token_is_asked_for_before_anything_else(url: str) -> None:
    for path in ("/rewards", "/metrics", "/openapi.json", "/nothing", "/"):
        for token in (None, "", "secre", "secrets", "ß"):
            status, answer = _ask(f"{url}{path}", token=token)
            assert status == 401 and "token is missing or wrong" in answer["detail"]
    assert _ask(f"{url}/score", b"no npz", token="wrong")[0] == 401
    assert _ask(f"{url}/health", token=None) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "said"),
    [
        ("/score", BAD["pickled pixels"][0], NPZ, 422, "an array of object"),
        ("/score", b"{}", JSON, 422, "accepted is a JSON object of images and prompts"),
        (
            "/score",
            pickle.dumps([]),
            "application/octet-stream",
            415,
            "accepted: application/x-npz or application/json",
        ),
        ("/score", bytes(MOST + 1), NPZ, 413, "the body has 1000001 bytes; accepted are 1000000 or less"),
        (
            "/score?reward=beauty",
            b"",
            NPZ,
            404,
            "there is no reward 'beauty'; served here: redness, embedded, odd, waits",
        ),
        ("/check", b"[]", JSON, 422, "accepted is a JSON object of prompts"),
        ("/check", b"", NPZ, 415, "accepted: application/json"),
    ],
)
def test_a_bad_request_is_refused(url: str, path: str, body: bytes, kind: str, status: int, said: str) -> None:
    found, answer = _ask(f"{url}{path}", body, kind)
    assert found == status and said in answer["detail"]


def _head(reward: str, more: str) -> bytes:
    lines = [f"POST /score?reward={reward} HTTP/1.1", "Host: x", "Authorization: Bearer secret", f"Content-Type: {NPZ}"]
    return "\r\n".join([*lines, more, "", ""]).encode()


def _raw(url: str, head: str, body: bytes) -> bytes:
    """What comes back of a request that is written by hand."""
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(_head("redness", head) + body)
        return connection.recv(1000)


def test_a_body_of_unknown_length_is_read_up_to_the_limit(url: str) -> None:
    chunk = bytes(400_000)
    framed = f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n"
    assert b" 413 " in _raw(url, "Transfer-Encoding: chunked", framed * 3 + b"0\r\n\r\n")
    good = encode_request(IMAGES, PROMPTS)
    framed = f"{len(good):x}\r\n".encode() + good + b"\r\n0\r\n\r\n"
    assert b" 200 " in _raw(url, "Transfer-Encoding: chunked\r\nConnection: close", framed)


def test_a_body_that_does_not_come_is_not_waited_for(url: str) -> None:
    assert b" 408 " in _raw(url, "Content-Length: 1000", b"PK")


def _until_metrics_say(url: str, words: str) -> None:
    deadline = time.monotonic() + 60
    while f"advflow_reward_{words}\n" not in _ask(f"{url}/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_comes_when_there_is_no_room_is_told_to_come_again(url: str) -> None:
    """And a request whose client has gone is not scored."""
    Waits.may.clear()
    Waits.began.clear()
    body = encode_request(torch.rand(70, 3, 32, 32), [PROMPTS[0]] * 70)
    assert 2 * len(body) < 2 * MOST < 3 * len(body)
    answers: list[Any] = []
    asking = [
        threading.Thread(target=lambda: answers.append(_ask(f"{url}/score?reward=waits", body))) for _ in range(2)
    ]
    asking[0].start()
    assert Waits.began.wait(20)
    asking[1].start()
    _until_metrics_say(url, "waiting_requests 1")
    _until_metrics_say(url, f"held_bytes {2 * len(body)}")
    status, answer = _ask(f"{url}/score?reward=redness", body)
    assert status == 503 and "too many requests are waiting" in answer["detail"]
    with pytest.raises(TimeoutError):
        port = int(url.rpartition(":")[2])
        small = encode_request(IMAGES, PROMPTS)
        with socket.create_connection(("127.0.0.1", port), timeout=0.2) as gone:
            gone.sendall(_head("waits", f"Content-Length: {len(small)}") + small)
            gone.recv(1)
    _until_metrics_say(url, f"held_bytes {2 * len(body)}")
    Waits.may.set()
    for thread in asking:
        thread.join(20)
    assert [status for status, _ in answers] == [200, 200]
    assert Odd.asked == [70, 70]


def test_a_fault_that_is_not_the_images_is_503(url: str) -> None:
    status, answer = _ask(f"{url}/score?reward=odd", encode_request(IMAGES[:1], [Prompt("a", metadata={"n": 3})]))
    assert status == 503 and answer["detail"] == "OutOfMemoryError: CUDA out of memory"


def test_metrics_are_as_prometheus_reads_them(url: str) -> None:
    before = _numbers(_ask(f"{url}/metrics")[1])
    _ask(f"{url}/score?reward=odd", encode_request(IMAGES, PROMPTS))
    _ask(f"{url}/score", b"", "text/plain")
    after = _numbers(_ask(f"{url}/metrics")[1])
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert moved['advflow_reward_images_total{reward="odd"}'] == 3
    assert moved['advflow_reward_failed_images_total{reward="odd"}'] == 2
    assert moved['advflow_reward_batches_total{reward="odd"}'] == 1
    assert moved['advflow_reward_requests_total{status="200"}'] == 2  # the metrics themselves are one
    assert moved['advflow_reward_requests_total{status="415"}'] == 1
    assert after["advflow_reward_held_bytes"] == after["advflow_reward_waiting_requests"] == 0


def _numbers(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(number) for name, _, number in lines}


def test_a_label_keeps_its_line() -> None:
    metrics = Metrics()
    metrics.add("images_total", 2, reward='a"b\\c\nd')
    assert 'advflow_reward_images_total{reward="a\\"b\\\\c\\nd"} 2\n' in metrics.text()


def test_the_description_names_every_route(url: str) -> None:
    paths = _ask(f"{url}/openapi.json")[1]["paths"]
    assert {path: sorted(each) for path, each in paths.items()} == {
        "/score": ["post"], "/check": ["post"], "/rewards": ["get"], "/health": ["get"], "/metrics": ["get"],
    }  # fmt: skip
    assert list(paths["/score"]["post"]["requestBody"]["content"]) == [JSON, NPZ]


PAGE = (Path(__file__).resolve().parents[2] / "docs/reward-server.md").read_text()


def _block(words: str, url: str) -> str:
    """The Python on the page that holds `words`, for the server at `url`."""
    (found,) = [each for each in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S) if words in each]
    return found.replace("http://127.0.0.1:8500", url)


def test_what_the_page_asks_by_hand_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason='needs the extra "serve": pip install "advflow[serve]"')
    settings = ServeConfig(port=0)
    with real_server(settings) as address:
        exec(_block("urllib.request.urlopen", address), {})
    given = ast.literal_eval(capsys.readouterr().out)
    said = re.findall(r'^answers `(\{"service": "\.\.\.", .*)`\. Where', PAGE, re.M)[0]
    assert given == json.loads(said) | {"service": identity(settings)}


def test_the_function_for_flow_grpo_asks_this_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("requests")
    monkeypatch.setenv(service.TOKEN, "secret")
    names: dict[str, Any] = {}
    exec(_block("def remote_score", url), names)
    scores, more = names["remote_score"]("cpu", reward="redness")(IMAGES, ["a", "b", "c"], [{}, None, {"n": 1}])
    assert torch.equal(torch.tensor(scores), load_reward("redness")(IMAGES, PROMPTS).reward) and more == {}
    with pytest.raises(RuntimeError, match="not every image has a score"):
        names["remote_score"]("cpu", url, "odd")(IMAGES, ["a", "b", "c"], [{}, {"n": 1}, {}])
