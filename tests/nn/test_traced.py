"""torch.compile sees the launches of our kernels, not closed ops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import advflow_ext as af

WRITES = {
    "fused": ["h_out", "y_1"],
    "fused backward": ["d_residual", "d_x_1"],
    "fused backward, trained modulation": ["d_residual", "d_x_1", "sums"],
    "joint": ["joint_q", "joint_k", "joint_v"],
    "image alone": ["joint_q", "joint_k"],
    "joint backward": ["d_q", "d_k", "d_v", "d_text_q", "d_text_k", "d_text_v"],
}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    program = Path(__file__).with_name("traced.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    output = subprocess.run([sys.executable, program], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in output.stdout.splitlines()]


def test_each_op_is_one_launch_that_writes_its_results_and_nothing_else(lines: list[dict[str, Any]]) -> None:
    """What a launch is said to write Inductor copies before, unless it is new."""
    expected = [
        {"op": op, "dynamic": dynamic, "writes": [names], "ours": []}
        for op, names in WRITES.items()
        for dynamic in (False, True)
    ]
    assert lines[:-1] == expected


def test_what_is_compiled_is_cached_by_the_source_of_our_kernels(lines: list[dict[str, Any]]) -> None:
    assert lines[-1] == {"adaln": 1, "adaln_backward": 1, "joint_qk_norm": 1, "joint_qk_norm_backward": 1}


def fused(residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    return af.nn.gate_residual_layer_norm_modulate(residual * 2, [(x, gate)], (scale, shift))


def joint(q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor) -> tuple[Tensor, ...]:
    text, weights = (q + 1, k + 1, v + 1), (weight_q * 2, weight_k * 2)
    return af.nn.joint_qk_norm(q, k, v, weight_q, weight_k, heads=2, text=text, text_weights=weights)


ROW, SAMPLE, HEAD = (2, 33, 128), (2, 128), (64,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: Inductor compiles for it")
@pytest.mark.parametrize(("op", "shapes"), [(fused, [ROW, ROW, *[SAMPLE] * 3]), (joint, [*[ROW] * 3, *[HEAD] * 2])])
@pytest.mark.parametrize("frozen", [0, 2])
def test_inductor_computes_what_eager_code_does(
    op: Callable[..., tuple[Tensor, ...]], shapes: list[tuple[int, ...]], frozen: int
) -> None:
    tensors = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    for tensor in tensors[len(tensors) - frozen :]:
        tensor.requires_grad_(False)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def results(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        found = function(*tensors)
        return [*found, *torch.autograd.grad([each.square().sum() for each in found], wanted)]

    for one, other in zip(results(torch.compile(op, fullgraph=True)), results(op), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
