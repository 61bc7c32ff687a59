"""Compiles every Triton kernel for GPUs that need not be there; prints one JSON line a variant. Run as a program.

In a process of its own, since Triton's interpreter, which the other tests use, cannot be switched off again.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from advflow_ext.kernels import adaln, qk_norm, softmax_rows_triton

CAPABILITIES = (80, 90)
EPS = 1e-6
# Pointers that are always of another type than the activations: angles, sums of gradients, and factors kept for them;
# of logits all but the gradient that is written.
FLOAT32 = re.compile(r"rotary$|rstd$|sums$|d_w[qk]$|logits$|others$|log_prob$|entropy$|kl$|state$|of_")
OTHER_TYPES = {"targets": "*i64", "live": "*i1"}


def variants() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """SD3.5's shapes, and FLUX.1's with their rotation: name, kernel, constants, warps."""
    for text in (True, False):
        constants = {"HAS_TEXT": text, "ROTARY": True, "D": 128, "ROWS": qk_norm.ROWS, "EPS": EPS}
        more = constants | {"KEEP_RSTD": False}
        yield f"qk_norm forward text={text} rotary", qk_norm.forward_kernel, more, qk_norm.FORWARD_WARPS
        for grad in (False, True):
            more = constants | {"FROM_OUTPUT": False, "WEIGHT_GRAD": grad}
            name = f"qk_norm backward text={text} rotary grad={grad}"
            yield name, qk_norm.backward_kernel, more, qk_norm.BACKWARD_WARPS
        constants |= {"ROTARY": False, "D": 64}
        for keep in (False, True):
            more = constants | {"KEEP_RSTD": keep}
            yield f"qk_norm forward text={text} rstd={keep}", qk_norm.forward_kernel, more, qk_norm.FORWARD_WARPS
        for kind, output, grad in (("inputs", False, False), ("weights", False, True), ("outputs", True, False)):
            more = constants | {"FROM_OUTPUT": output, "WEIGHT_GRAD": grad}
            yield f"qk_norm backward text={text} {kind}", qk_norm.backward_kernel, more, qk_norm.BACKWARD_WARPS
    width = 1536
    head, tail = adaln.tiles(width)
    for gates, norms in ((0, 1), (0, 2), (1, 0), (1, 1), (2, 1)):
        constants = {"GATES": gates, "NORMS": norms, "EPS": EPS, "WIDTH": width, "HEAD": head, "TAIL": tail}
        yield f"adaln forward {gates} {norms}", adaln.forward_kernel, constants, adaln.forward_warps(head)
        for grad in (False, True):
            rows = adaln.ROWS_OF_A_PARTIAL if grad else 1
            more = constants | {"HAS_D_H": gates > 0, "MODULATION_GRAD": grad, "ROWS": rows}
            warps = adaln.backward_warps(head, grad)
            yield f"adaln backward {gates} {norms} grad={grad}", adaln.backward_kernel, more, warps
    for ref in (False, True):
        constants = {"HAS_REF": ref, "BLOCK": softmax_rows_triton.BLOCK}
        warps = softmax_rows_triton.STATISTICS_WARPS
        yield f"softmax statistics ref={ref}", softmax_rows_triton.statistics_kernel, constants, warps
        more = constants | {"HAS_ENTROPY": True}
        warps = softmax_rows_triton.GRADIENT_WARPS
        yield f"softmax gradient ref={ref}", softmax_rows_triton.gradient_kernel, more, warps


def untouched(name: str, constants: dict[str, Any]) -> bool:
    """Whether such a variant is launched without this tensor."""
    given = constants.get
    if "BLOCK" in constants:  # of a softmax
        return name in ("others", "kl", "of_kl") and not given("HAS_REF")
    if "GATES" in constants:  # of adaln
        branches = given("GATES") if given("MODULATION_GRAD", True) or not re.match(r"x_\d$", name) else 0
        counts = {"x": branches, "gate": branches, "d_x": branches, "scale": given("NORMS"), "shift": given("NORMS")}
        counts |= {"y": given("NORMS"), "d_y": given("NORMS")}
        kind, _, which = name.rpartition("_")
        if kind in counts and which.isdecimal():
            return int(which) > (counts[kind] or 0)
        there = {"h_out": given("GATES"), "d_residual": given("NORMS"), "d_h": given("HAS_D_H")}
        return not (there | {"sums": given("MODULATION_GRAD")}).get(name, True)
    if re.match(r"(joint_v|grad_v|d_v|v|(d_)?text_([qkv]|w[qk]))$", name):
        kept_inputs = not given("FROM_OUTPUT") or name not in ("text_q", "text_k")
        return not (given("HAS_TEXT") and kept_inputs)
    there = {
        "rotary": given("ROTARY"),
        "rstd": given("KEEP_RSTD") or given("FROM_OUTPUT"),
        "d_wq": given("WEIGHT_GRAD"),
        "d_wk": given("WEIGHT_GRAD"),
    }
    return not there.get(name, True)


def compile_ahead(kernel: Any, constants: dict[str, Any], warps: int, dtype: str, capability: int) -> Any:
    """As a launch with contiguous, 16-byte aligned tensors of SD3.5's width would compile it."""
    signature, hints, values = {}, {}, {}
    for i, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants or untouched(name, constants):
            signature[name] = "constexpr"
            values[(i,)] = constants.get(name)
        elif name in ("rows", "tokens", "image_tokens", "heads", "chunks", "vocabulary") or "_s" in name[-3:]:
            signature[name] = "i32"
            if "_s" in name[-3:] or name == "vocabulary":
                hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = OTHER_TYPES.get(name, "*fp32" if FLOAT32.match(name) else f"*{dtype}")
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def main() -> None:
    for name, kernel, constants, warps in variants():
        for capability in CAPABILITIES:
            compiled = compile_ahead(kernel, constants, warps, "bf16", capability)
            ptx = compiled.asm["ptx"]
            row = {"kernel": name, "dtype": "bf16", "capability": capability, "warps": warps}
            row |= resources(compiled.asm["cubin"])
            row["wide_loads"] = len(
                re.findall(r"(?:ld\.global|cp\.async)[.\w:]*(?:\.v[248]\.b\d+| .*0x(?:8|10),)", ptx)
            )
            row["loads"] = len(re.findall(r"ld\.global", ptx))
            row["shared"] = compiled.metadata.shared
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
