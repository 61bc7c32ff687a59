"""Every kernel compiles for Ampere and Hopper: no spills, and no access narrower than the data allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """In a process of its own: what interprets kernels cannot compile them."""
    program = Path(__file__).with_name("compile_ahead.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, program]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_every_variant_is_compiled_for_both(compiled):
    assert {row["capability"] for row in compiled} == {80, 90}
    assert len(compiled) == len({(row["kernel"], row["capability"], row["dtype"]) for row in compiled}) == 70


def test_nothing_is_spilled(compiled):
    """But for two registers of FLUX's norms where their weights are trained, by Triton 3.6."""
    spilled = {(row["kernel"], row["capability"], row["stack"]) for row in compiled if row["stack"] or row["local"]}
    assert spilled <= ({("qk_norm backward text=True rotary grad=True", 90, 8)} if OLD_TRITON else set())


def test_every_load_is_wide(compiled):
    """But for the one float32 a row that stands beside the outputs, of q and of k, and for one of a rotation's table,
    of the image and of the text. Triton 3.6 loads each of them twice. A softmax reads numbers of a row."""
    narrow = {(row["kernel"], row["capability"]): row["loads"] - row["wide_loads"] for row in compiled}
    times = 2 if OLD_TRITON else 1
    assert min(row["wide_loads"] for row in compiled) > 0
    of_rows = {"statistics ref=False": 2, "statistics ref=True": 2, "gradient ref=False": 7, "gradient ref=True": 11}
    for (kernel, _), count in narrow.items():
        if kernel.startswith("softmax"):
            assert count == of_rows[kernel.removeprefix("softmax ")], kernel
            continue
        streams = 2 if "text=True" in kernel else 1
        assert count == times * (2 if kernel.endswith("outputs") else streams if "rotary" in kernel else 0), kernel
