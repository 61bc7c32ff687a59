"""What torch.compile hands to its backend where our ops stand, on a GPU that need not be there.

Prints one JSON line an op: for each launch of a kernel in its graph the tensors it is said to write, and the raw ops
that are left; last, by how many kernels' sources the code compiled for each raw op is cached. Run as a program, in a
process of its own, since Triton's interpreter, which the other tests use, cannot be switched off again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

import advflow_ext as af

B, N, M, H, D = 2, 10, 5, 24, 64
ROW, SAMPLE, TEXT, HEAD, JOINT = (B, N, H * D), (B, H * D), (B, M, H * D), (D,), (B, N + M, H, D)
Op = Callable[..., tuple[Tensor, ...]]


class Driver:
    """Of a GPU that is asked nothing but its kind."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def traced(op: Op, shapes: list[tuple[int, ...]], dynamic: bool) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"writes": [], "ours": []}

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                found["writes"].append(node.kwargs["tensors_to_clone"])
            elif "advflow" in str(node.target):
                found["ours"].append(str(node.target))
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        tensors = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        torch.compile(op, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=backend))(*tensors)
    return found


def fused(residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    return af.nn.gate_residual_layer_norm_modulate(residual, [(x, gate)], (scale, shift))


def fused_backward(modulation_grad: bool) -> Op:
    def op(h: Tensor, x: Tensor, gate: Tensor, scale: Tensor, d_h: Tensor, d_y: Tensor) -> tuple[Tensor, ...]:
        kept = [x] if modulation_grad else []
        arguments = (h, kept, [gate], [scale], d_h, [d_y], 1e-6, h.dtype, modulation_grad)
        return tuple(torch.ops.advflow.adaln_backward(*arguments))

    return op


def joint(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    text, weights = rest[:3], rest[3:]
    return af.nn.joint_qk_norm(q, k, v, *weights[:2], heads=H, text=text, text_weights=weights[2:])


def image_alone(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return af.nn.joint_qk_norm(q, k, v, *weights, heads=H)


def joint_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    grads, image, text, weights = tensors[:3], tensors[3:5], tensors[5:7], tensors[7:]
    return tuple(torch.ops.advflow.joint_qk_norm_backward(grads, image, text, weights, None, None, N, 1e-6, False))


OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "fused": (fused, [ROW, ROW, SAMPLE, SAMPLE, SAMPLE]),
    "fused backward": (fused_backward(False), [ROW, ROW, SAMPLE, SAMPLE, ROW, ROW]),
    "fused backward, trained modulation": (fused_backward(True), [ROW, ROW, SAMPLE, SAMPLE, ROW, ROW]),
    "joint": (joint, [ROW] * 3 + [TEXT] * 3 + [HEAD] * 4),
    "image alone": (image_alone, [ROW] * 3 + [HEAD] * 2),
    "joint backward": (joint_backward, [JOINT] * 3 + [ROW] * 2 + [TEXT] * 2 + [HEAD] * 4),
}


def main() -> None:
    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(Driver())
        for name in ("current_device", "_lazy_init"):
            mock.patch.object(torch.cuda, name, lambda: 0).start()
    for name, (op, shapes) in OPS.items():
        for dynamic in (False, True):
            print(json.dumps({"op": name, "dynamic": dynamic} | traced(op, shapes, dynamic)), flush=True)
    names = ("adaln", "adaln_backward", "joint_qk_norm", "joint_qk_norm_backward")
    print(json.dumps({name: len(get_triton_kernels_for_op(f"advflow::{name}")) for name in names}))


if __name__ == "__main__":
    main()
