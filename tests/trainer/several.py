"""Processes that run a function together, as torchrun's do, without the start of Python that each of those costs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node 2 -m advflow train".split()
_MODULES = ["torch", "torch.distributed.fsdp", "peft", "advflow.run.trainer", "advflow.models.sd3"]
_PATIENCE = 900.0  # seconds: more than any job takes, on a busy machine too


def run_together(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function` in `size` processes whose environment is torchrun's. Fails where one of them does, or hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = get_context("forkserver")  # which has imported everything once
    context.set_forkserver_preload(_MODULES)
    processes = [
        context.Process(
            target=_call, args=({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    try:
        while running:
            ended = wait(list(running), _PATIENCE)
            assert ended, f"{len(running)} processes do not end"
            for sentinel in ended:
                process = running.pop(sentinel)  # type: ignore[index]
                process.join()
                assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def start(
    folder: Path, launcher: list[str], *words: str, seconds: float = _PATIENCE
) -> subprocess.CompletedProcess[str]:
    """A job that a launcher such as TORCHRUN starts in a folder, which may hold a reward of its own."""
    return subprocess.run(
        [sys.executable, *launcher, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def _call(environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
