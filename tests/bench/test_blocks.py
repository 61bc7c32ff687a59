"""The ops of a block in the bench: byte counts, what passes and what does not, and a tiny run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from advflow_ext.bench.__main__ import main
from advflow_ext.bench.harness import timing
from advflow_ext.bench.harness.registry import OURS, Case
from advflow_ext.bench.ops import plans
from advflow_ext.bench.ops.block import FORWARD, HEAD_DIM, LIGER, QUACK, TRAINED, Block, operands, shape_obstacle
from advflow_ext.bench.ops.blocks import BLOCKS
from advflow_ext.bench.ops.lora_linear import LoraLinear
from advflow_ext.kernels import triton_ops

SHAPE = (2, 3, 128)
CPU = torch.device("cpu")


def uncompiled(block: Block, where: torch.device = CPU) -> dict[str, object]:
    return {name: each for name, each in block.implementations(where).items() if "compile" not in name}


# Activations of one shape, and of image and text tokens together: read or written forward; and backward, where norm
# weights or modulation are frozen; and in addition where they are trained.
PASSES = {
    "joint_qk_norm": (6, 8, 0),
    "joint_qk_norm_image": (4, 6, 0),
    "layer_norm_modulate": (2, 3, 0),
    "layer_norm_modulate_2": (3, 4, 0),
    "gate_residual": (3, 2, 1),
    "gate_residual_layer_norm_modulate": (4, 5, 1),
    "gate_residual_layer_norm_modulate_2": (5, 6, 2),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_byte_count(name: str, dtype: str, size: int) -> None:
    tokens = 3 + 3 if name == "joint_qk_norm" else 3
    forward, backward, trained = (count * 2 * tokens * 128 * size for count in PASSES[name])
    counted = [BLOCKS[each].bytes_moved(Case(each, SHAPE, dtype, None)) for each in of(name)]
    assert counted == [forward, forward + backward, forward + backward + trained]


def of(name: str) -> list[str]:
    return [f"{name}_forward", name, f"{name}_trained"]


def test_byte_count_of_a_low_rank_layer() -> None:
    activation, weight, adapters = 2 * 3 * 128, 128 * 128, 2 * 32 * 128

    def counted(name: str, dtype: str) -> int:
        return BLOCKS[name].bytes_moved(Case(name, SHAPE, dtype, None))

    assert counted("lora_linear_forward", "bf16") == 2 * (2 * activation + weight + adapters)
    assert counted("lora_linear", "bf16") == 2 * (5 * activation + 2 * weight + 3 * adapters)
    assert counted("lora_linear_fp32", "bf16") == 2 * (5 * activation + 2 * weight) + 4 * 3 * adapters


@pytest.mark.parametrize("name", [name for name in BLOCKS if not name.startswith("lora")])
def test_a_forward_pass_reads_and_writes_what_is_counted(name: str) -> None:
    """Without gradients every input is read once and every result written once; the small vectors are not counted."""
    block = BLOCKS[f"{name.removesuffix('_forward').removesuffix('_trained')}_forward"]
    case = Case("any", SHAPE, "bf16", None)
    arguments = block.arguments(case, CPU, 0)
    results = block.implementations(CPU)["eager"].run(arguments)
    activations, _ = operands(arguments.call)
    assert block.bytes_moved(case) == sum(tensor.nbytes for tensor in (*activations, *results))


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_asked_for_as_the_mode_says(name: str) -> None:
    block = BLOCKS[name]
    arguments = block.arguments(Case(name, SHAPE, "bf16", None), CPU, 0)
    activations, parameters = operands(arguments.call)
    assert all(tensor.requires_grad == (block.mode != FORWARD) for tensor in activations)
    trained = parameters[2:] if isinstance(block, LoraLinear) else parameters
    assert all(tensor.requires_grad == (block.mode == TRAINED) for tensor in trained)
    if isinstance(block, LoraLinear):
        assert not any(tensor.requires_grad for tensor in parameters[:2])
    results = block.implementations(CPU)[OURS].run(arguments)
    wanted = sum(tensor.requires_grad for tensor in (*activations, *parameters))
    assert len(results) == len(block.result_shapes(SHAPE)) + wanted


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_uncompiled_implementation_is_right_and_wrong_answers_are_red(name: str, dtype: str, device: str) -> None:
    block, where = BLOCKS[name], torch.device(device)
    case = Case(name, SHAPE, dtype, None)
    arguments = block.arguments(case, where, seed=0)
    truth = block.truth(arguments)
    for label, implementation in uncompiled(block, where).items():
        result = implementation.run(arguments)
        check = block.check(case, arguments, truth, result, implementation.standard)
        assert check.green, (label, check)
        for i, tensor in enumerate(result):
            for wrong in (tensor * 1.1, tensor * torch.nan, torch.zeros_like(tensor)):
                spoiled = (*result[:i], wrong, *result[i + 1 :])
                assert not block.check(case, arguments, truth, spoiled, implementation.standard).green


def test_ours_is_held_to_less_than_the_others() -> None:
    block = BLOCKS["gate_residual"]
    case = Case("gate_residual", SHAPE, "bf16", None)
    arguments = block.arguments(case, CPU, 0)
    truth = block.truth(arguments)
    off = tuple((tensor * (1 + 2**-7)).bfloat16() for tensor in truth)
    assert not block.check(case, arguments, truth, off, OURS).green
    assert block.check(case, arguments, truth, off, "baseline").green


def test_text_is_that_of_sd35_and_never_longer_than_the_image() -> None:
    block = BLOCKS["joint_qk_norm"]
    for tokens, text in ((1024, 205), (4096, 205), (3, 3)):
        assert block.result_shapes((2, tokens, 1536))[0] == (2, tokens + text, 1536 // HEAD_DIM, HEAD_DIM)


def test_a_library_has_a_row_where_it_is_installed_and_not_elsewhere() -> None:
    for installed in (True, False):
        with mock.patch("advflow_ext.bench.ops.block.is_installed", return_value=installed):
            rows = {device: BLOCKS["joint_qk_norm"].implementations(torch.device(device)) for device in ("cpu", "cuda")}
            assert (LIGER in rows["cpu"]) == (LIGER in rows["cuda"]) == (QUACK in rows["cuda"]) == installed
            assert QUACK not in rows["cpu"]  # it has CUDA kernels alone
            assert not {LIGER, QUACK} & BLOCKS["gate_residual"].implementations(CPU).keys()


def test_the_gpu_plan_measures_every_op_of_a_block_at_the_size_of_a_training_step() -> None:
    planned = [each for each in plans.gpu_plan() if each.case.op in BLOCKS]
    at_training = {each.case.op for each in planned if each.case.shape == (9, 1024, 1536) and each.case.dtype == "bf16"}
    assert at_training == set(BLOCKS)
    compiled = {each.case.op for each in planned if "compile" not in each.without}
    assert compiled == set(BLOCKS)
    sizes = {each.case.shape for each in planned if each.case.op == "joint_qk_norm"}
    assert sizes == {*((batch, 1024, 1536) for batch in (1, 4, 9, 16)), (4, 4096, 1536)}
    assert any(each.case.dtype == "fp32" for each in planned)
    assert not any(each.case.op in BLOCKS for each in plans.cpu_plan())


@pytest.mark.parametrize("shape", [(8, 16, 64, 64), (4, 3, 100), (4, 64)])
def test_other_shapes_are_refused(shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert shape_obstacle(SHAPE) is None
    text = "x".join(map(str, shape))
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--ops", "joint_qk_norm", "--shapes", text])
    assert f"shape {text}: accepted for the ops of a block is batch x tokens x width" in capsys.readouterr().err


OPS = "joint_qk_norm_trained,layer_norm_modulate_2,gate_residual_layer_norm_modulate_2_trained,gate_residual_forward"


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_tiny_run(
    interpreted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton's interpreter runs the kernels; without it the reference stands in for them, and the report says so."""
    if interpreted:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("where there is a GPU, kernels are compiled")
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    out = tmp_path / "run.json"
    words = f"--device cpu --plot none --ops {OPS} --shapes 1x2x64 --dtypes fp32 --rounds 1 --only ours,eager,copy"
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1" if interpreted else "0"}):
        assert triton_ops.serves(torch.empty(1)) == interpreted
        assert main(f"{words} --json {out}".split()) == 0
    said = capsys.readouterr().out
    assert ("'ours' is the reference in the ops of a block" in said) != interpreted
    assert "liger_kernel is not installed" in said or LIGER in BLOCKS["joint_qk_norm"].implementations(CPU)
    document = json.loads(out.read_text())
    assert [each["case"]["op"] for each in document["results"]] == OPS.split(",")
    for result in document["results"]:
        assert all(each["check"]["green"] and each["times"] for each in result["implementations"])


def test_the_kernels_and_not_the_reference_are_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, kernels are compiled")
    from advflow_ext.kernels import adaln

    block = BLOCKS["layer_norm_modulate"]
    arguments = block.arguments(Case("layer_norm_modulate", (1, 2, 64), "fp32", None), CPU, 0)
    calls = mock.Mock(wraps=adaln.forward)
    monkeypatch.setattr(adaln, "forward", calls)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    block.implementations(CPU)[OURS].run(arguments)
    assert calls.call_count == 1
