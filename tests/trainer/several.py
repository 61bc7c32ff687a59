"""Processes that run a function together, as torchrun's do, without the start of Python that each of those costs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

import torch

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


def _call(environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
