"""`advflow reward-server` as a process: killed under a run and started again, told to stop, fed with nonsense."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.rewards import Prompt
from advflow.rewards.wire import NPZ, encode_request
from advflow.run.log import METRICS, read_rows

from tests.trainer.runs import SMALL, assert_same_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))),
        reason='needs the extra "serve": pip install "advflow[serve]"',
    ),
]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts a server at a port and returns when it serves; all are killed in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: str, port: int = 0, **environment: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "advflow", "reward-server", "--port", str(port), *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=os.environ | environment,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving "):
                return process, line.partition(" at ")[2].partition(",")[0].strip()
        raise AssertionError("it does not serve")

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_outlives_its_server(tmp_path: Path, started: Any, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--iterations", "6", "--evaluation.every", "3"]
    main(["train", "--out", str(tmp_path / "undisturbed"), *words])
    port = _free_port()
    server, url = started("--reward", "embedded", port=port)
    restarts = []

    def kill_and_start() -> None:
        killed = server
        for done in (1, 4):
            _until(lambda: len(read_rows(tmp_path / "run" / METRICS)) >= done)  # noqa: B023
            killed.kill()
            killed.wait()
            _until(lambda: "The run waits" in capfd.readouterr().err)
            killed, _ = started("--reward", "embedded", port=port)
            restarts.append(done)

    killing = threading.Thread(target=kill_and_start, daemon=True)
    killing.start()
    arguments = json.dumps({"urls": url, "batch": 1, "retries": 0, "timeout": 20})
    main(["train", "--out", str(tmp_path / "run"), *words, "--data.reward", "remote", "--data.reward_args", arguments])
    killing.join(60)
    assert restarts == [1, 4]
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_has_begun_is_answered_before_it_stops(tmp_path: Path, started: Any, number: signal.Signals) -> None:
    (tmp_path / "slowly.py").write_text(
        "import pathlib, time\n"
        "from advflow.rewards import Scores\n"
        "class Slow:\n"
        "    def __call__(self, images, prompts):\n"
        "        pathlib.Path('began').touch()\n"
        "        time.sleep(2)\n"
        "        return Scores([0.25] * len(prompts), [0.5] * len(prompts))\n"
    )
    process, url = started("--reward", "slowly:Slow", ADVFLOW_REWARD_TOKEN="secret")
    answers: list[Any] = []

    def ask() -> None:
        body = encode_request(torch.rand(1, 3, 8, 8), [Prompt("a")])
        headers = {"Content-Type": NPZ, "Authorization": "Bearer secret"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/score", body, headers), timeout=60) as response:
            answers.append(json.load(response)["rewards"]["slowly:Slow"]["reward"])

    asking = [threading.Thread(target=ask) for _ in range(2)]  # one is scored, one waits
    for thread in asking:
        thread.start()
    _until((tmp_path / "began").exists)
    time.sleep(0.3)
    process.send_signal(number)
    for thread in asking:
        thread.join(60)
    assert answers == [[0.25], [0.25]]
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output and "stopped" in output and process.returncode == 0
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(url[-5:]))):
        raise AssertionError("it still listens")


def test_nonsense_is_never_the_servers_fault(tmp_path: Path, started: Any) -> None:
    pytest.importorskip("schemathesis", reason="fuzzing needs schemathesis: pip install schemathesis")
    rewards = json.dumps({"redness": 1, "embedded": 1, "shapes": 1, "compressibility": 1})
    process, url = started("--reward", rewards, ADVFLOW_REWARD_TOKEN="secret")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--seed", "1"),
            *("-H", "Authorization: Bearer secret", "--checks", "not_a_server_error,status_code_conformance"),
            *("--max-examples", "300", "--phases", "examples,coverage,fuzzing"),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=tmp_path,  # where it leaves what it has found
    )
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-4000:]
    assert process.poll() is None
