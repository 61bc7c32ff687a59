"""The bench's own arithmetic, and one tiny run of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from advflow_ext import _native
from advflow_ext.bench.__main__ import main, parser, plan
from advflow_ext.bench.harness import chart, memory, report, timing
from advflow_ext.bench.harness.registry import COPY, OURS, Case, Check, cases, limits, parse_shapes
from advflow_ext.bench.ops import plans
from advflow_ext.bench.ops.blocks import BLOCKS
from advflow_ext.bench.ops.losses import LOSSES
from advflow_ext.bench.ops.plans import OPS, chosen
from advflow_ext.conformance.rows import SOURCES

CASE = Case("advantage_flow_loss", (2, 4, 8, 8), "fp32", with_ref=True)
CPU = torch.device("cpu")
native = pytest.mark.skipif(not _native.serves(torch.empty(1)), reason="without kernels ours is the reference")


def test_quantiles_interpolate() -> None:
    times = timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.q20, times.median, times.q80, times.samples) == (2.0, 3.5, 5.0, 6)
    assert timing.summarise([7.0]).q80 == 7.0


def test_steady_means_a_narrow_spread() -> None:
    assert timing.Times(1.0, 1.2, 1.5, 9).to_json()["steady"]
    assert not timing.Times(1.0, 1.2, 1.6, 9).to_json()["steady"]


def test_rotation_outruns_the_cache_within_limits() -> None:
    assert timing.input_sets(bytes_per_set=10, cache_bytes=100) * 10 > 2 * 100
    assert timing.input_sets(bytes_per_set=10**9, cache_bytes=1) == 2
    assert timing.input_sets(bytes_per_set=1, cache_bytes=10**9) == 256


def test_every_implementation_goes_first_in_turn() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    timing.round_robin(calls, torch.device("cpu"), rounds=3, warmup=0)
    assert "".join(order) == "abcbcacab"


def test_per_call_divides_all_but_the_count() -> None:
    assert timing.per_call(timing.Times(2.0, 4.0, 6.0, 5), 2) == timing.Times(1.0, 2.0, 3.0, 5)


def test_shapes_are_parsed_or_named_in_the_error() -> None:
    assert parse_shapes("8x16x64x64, 8x1024x64") == [(8, 16, 64, 64), (8, 1024, 64)]
    for bad in ["8", "8x", "axb", "0x4", "8x-1"]:
        with pytest.raises(ValueError, match=bad):
            parse_shapes(bad)


def test_cases_are_all_combinations() -> None:
    found = list(cases(chosen(("advantage_flow_loss",)), None, ["fp32", "bf16"], (False, True)))
    assert len(found) == len(set(found)) == 12
    found = list(cases(chosen(("sde_step",)), [(2, 3)], ["fp32"], (False, True)))
    assert found == [Case("sde_step", (2, 3), "fp32", None)]


LATENT_OPS = [name for name in OPS if name not in BLOCKS]  # theirs are in test_blocks.py

TENSORS = {  # of the latents' shape: read for the loss and again for the gradient, and the gradient written
    **dict.fromkeys(["advantage_flow_loss", "diffusion_nft_loss", "awm_loss", "flow_awr_loss"], 2 * 4 + 1),
    **dict.fromkeys(["reward_weighted_loss", *(loss.name for loss in LOSSES if loss.reads_back)], 2 * 3 + 1),
    **dict.fromkeys(["transition_log_prob", "awm_log_prob"], 2 * 3 + 1),
    "sde_step": 2 + 1,
    "residual_stats": 5,
    "residual_grad": 5 + 1,
    "sde_step_kernel": 3 + 1,
}


@pytest.mark.parametrize("name", LATENT_OPS)
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_byte_count(name: str, dtype: str, size: int) -> None:
    ref = OPS[name].refs[0]
    eps = 512 * 4 if name.startswith("sde_step") else 0  # the noise of a step is float32
    assert OPS[name].bytes_moved(Case(name, (2, 4, 8, 8), dtype, ref)) == TENSORS[name] * 512 * size + eps
    if ref is False:
        with_ref = Case(name, (2, 4, 8, 8), dtype, with_ref=True)
        assert OPS[name].bytes_moved(with_ref) == (TENSORS[name] + 2) * 512 * size


@native
@pytest.mark.parametrize("name", LATENT_OPS)
def test_a_call_reads_the_tensors_that_are_counted(name: str) -> None:
    op = OPS[name]
    case = Case(name, (2, 4, 8, 8), "fp32", op.refs[-1])
    tensors = [value for value in op.arguments(case, CPU, 0).call.values() if isinstance(value, torch.Tensor)]
    latents = sum(tensor.shape == case.shape for tensor in tensors)
    written = {"sde_step": 2, "sde_step_kernel": 2, "residual_stats": 0}.get(name, 1)
    passes = 2 if name.endswith(("_loss", "_log_prob")) else 1
    assert op.bytes_moved(case) == (passes * latents + written) * 512 * 4


def test_peak_is_the_highest_running_total() -> None:
    assert memory.peak_of([4, 8, -8, 4, -4, -4]) == 12
    assert memory.peak_of([-4, 4]) == 0


def test_peak_memory_of_known_work() -> None:
    x = torch.zeros(2**20)
    one = x.nbytes
    for work, peak in [(lambda: x + x, 1), (lambda: (x + x) * x, 2), (lambda: (x + x).mul_(x), 1)]:
        assert memory.peak_extra_bytes(work, CPU) == pytest.approx(peak * one, rel=0.01)


@native
@pytest.mark.parametrize("name", LATENT_OPS)
def test_ours_needs_the_memory_of_its_results_alone(name: str, device: str) -> None:
    """One gradient, or the next x and its noise; beyond that numbers a sample, partial sums, and rounding of sizes."""
    op, where = OPS[name], torch.device(device)
    case = Case(name, (8, 16, 128, 128), "fp32", op.refs[-1])
    arguments = op.arguments(case, where, 0)
    ours = op.implementations(where)[OURS]
    peak = memory.peak_extra_bytes(lambda: ours.run(arguments), where)
    results = {"sde_step": 2, "sde_step_kernel": 2, "residual_stats": 0}.get(name, 1)
    latent = 8 * 16 * 128 * 128 * 4
    assert results * latent <= peak <= (results + 0.02) * latent


@native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", LATENT_OPS)
def test_every_uncompiled_implementation_is_right_and_wrong_answers_are_red(name: str, dtype: str, device: str) -> None:
    op, where = OPS[name], torch.device(device)
    shape = (2, 4, 8, 8) if dtype == "fp16" else (9, 16, 32, 32)  # fp16 has no room for 1 / (9 * 16384)
    for ref in op.refs:
        case = Case(name, shape, dtype, ref)
        arguments = op.arguments(case, where, seed=0)
        truth = op.truth(arguments)
        for label, implementation in op.implementations(where).items():
            if "compile" in label:
                continue
            numbers, latents = implementation.run(arguments)
            check = op.check(case, arguments, truth, (numbers, latents), implementation.standard)
            assert check.green, (label, check)
            wrong = []
            if numbers.numel():
                # By the size of the losses, which may cancel.
                wrong += [(numbers + 0.1 * truth.size, latents), (numbers * torch.nan, latents)]
            if latents.numel():
                wrong += [(numbers, latents * 1.1), (numbers, latents * torch.nan)]
            assert wrong
            for result in wrong:
                assert not op.check(case, arguments, truth, result, implementation.standard).green


def test_half_precision_limits_allow_one_rounding() -> None:
    assert limits(torch.float32, "ours") == (1e-6, 1e-6)
    numbers, latents = limits(torch.bfloat16, "ours")
    assert numbers == 1e-6 and latents == pytest.approx(2.0**-8, rel=1e-3)
    for standard in ("baseline", "public"):
        assert all(
            loose > strict for loose, strict in zip(limits(torch.bfloat16, standard), (numbers, latents), strict=True)
        )


def test_plans_cover_what_they_say() -> None:
    assert len(list(plans.cpu_plan())) == 12
    assert set(OPS["advantage_flow_loss"].implementations(torch.device("cuda"))) >= plans.COMPILED
    planned = [each.case for each in plans.gpu_plan()]
    assert len(planned) == len(set(planned))
    assert {case.op for case in planned if case.shape == (8, 16, 64, 64) and case.dtype == "bf16"} == set(LATENT_OPS)
    sizes = {(batch, 16, 64, 64) for batch in (1, 8, 16, 32, 64, 128, 256)} | {(64, 16, 128, 128), (1, 16, 21, 90, 160)}
    for op in (*plans.SWEPT, *plans.KERNELS):
        assert {case.shape for case in planned if case.op == op and case.dtype == "fp32"} >= sizes
    for op in plans.KERNELS:
        for dtype in ("fp32", "bf16"):
            assert max(OPS[op].bytes_moved(case) for case in planned if (case.op, case.dtype) == (op, dtype)) >= 2**28


def planned(words: str, device: torch.device = CPU) -> list[plans.Planned]:
    return plan(parser().parse_args(words.split()), device)


def test_who_asks_for_nothing_gets_every_op_of_a_trainer_once() -> None:
    assert [each.case.op for each in planned("")] == list(plans.LATENT_OPS)
    assert {each.case.dtype for each in planned("")} == {"fp32"}
    assert all("compile" not in each.without for each in planned(""))
    assert all(each.without >= {"compile", "plain compile"} for each in planned("--quick"))
    assert all("compile" not in each.without for each in planned("--quick --only ours,compile"))
    assert planned("--sweep") == list(plans.cpu_plan())


def test_the_ops_of_a_block_are_timed_where_their_kernels_run_and_the_shape_is_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans.triton_ops, "serves", lambda x: True)
    assert {each.case.op for each in planned("")} > {"joint_qk_norm", "lora_linear", "gate_residual"}
    assert {each.case.op for each in planned("--shapes 8x16x64x64")} == set(plans.LATENT_OPS)
    assert {"joint_qk_norm", "flow_grpo_loss"} <= {each.case.op for each in planned("--shapes 2x8x64")}


def test_every_published_form_names_its_commit() -> None:
    assert {op.source for op in plans.LATENT_OPS.values()} <= SOURCES.keys()


def test_a_copy_moves_the_bytes_asked_for() -> None:
    first, second = timing.copies(1000, 2, CPU)
    target, (source,) = first.func.__self__, first.args  # type: ignore[attr-defined]
    source.fill_(3)
    first()
    assert target.nbytes + source.nbytes == 1000 and bool((target == 3).all())
    assert second.args[0].data_ptr() != source.data_ptr()  # type: ignore[attr-defined]


def row(name: str, median: float, green: bool = True) -> dict[str, Any]:
    check = Check(0.0, 0.0 if green else 1.0, 1e-6, 1e-6)
    times = timing.Times(median, median, median, 3).to_json()
    return {
        "implementation": name,
        "check": asdict(check) | {"green": check.green},
        "times": times,
        "graph_times": None,
        "peak_extra_bytes": 64,
    }


def result(*rows: dict[str, Any], dtype: str = "fp32", bytes_moved: int = 10**9) -> dict[str, Any]:
    case = {"op": "op", "shape": [2, 3], "dtype": dtype, "with_ref": None, "name": "case"}
    return {
        "case": case,
        "source": "flow_grpo",
        "implementations": list(rows),
        "bytes_moved": bytes_moved,
        "gradient_bytes": 64,
    }


def test_a_speed_up_needs_two_correct_results() -> None:
    assert report.speedup([row("ours", 1.0), row("eager", 3.0)], "eager") == 3.0
    assert report.speedup([row("ours", 1.0), row("eager", 3.0, green=False)], "eager") is None
    assert report.speedup([row("ours", 1.0, green=False), row("eager", 3.0)], "eager") is None
    assert report.speedup([row("eager", 3.0)], "eager") is None


def test_the_table_hides_speed_beside_a_red_result() -> None:
    red = report.table(result(row("ours", 1.0), row("eager", 3.0, green=False)), 1e10)
    assert "3.00x" not in red and "latents by 1.00e+00" in red
    text = report.table(result(row("ours", 1.0), row("eager", 3.0)), 1e10)
    assert "3.00x" in text and text.startswith("case, public: yifan123/flow_grpo @")


def test_a_failed_baseline_is_shown_not_fatal() -> None:
    failed = {"implementation": "compile", "check": {"green": False}, "error": "RuntimeError: no compiler"}
    text = report.table(result(row("ours", 1.0), failed), 1e10)
    assert "compile              failed: RuntimeError: no compiler" in text


def test_a_gpu_names_its_folder() -> None:
    assert report.slug("NVIDIA H200") == "nvidia-h200"
    assert report.slug("NVIDIA GeForce RTX 4090 (mobile)") == "nvidia-geforce-rtx-4090-mobile"


def test_a_whole_run_writes_a_complete_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "run.json"
    drawn = tmp_path / "charts" / "bench.html"
    words = "--device cpu --ops advantage_flow_loss --shapes 2x4x8x8 --rounds 2 --ref without --only ours,eager"
    status = main(f"{words} --json {out} --plot {drawn}".split())
    assert status == 0
    document = json.loads(out.read_text())
    assert {"date", "commit", "cpu", "cores", "torch", "native"} <= document["environment"].keys()
    assert [result["case"]["dtype"] for result in document["results"]] == ["fp32", "bf16"]
    for result in document["results"]:
        assert {each["implementation"] for each in result["implementations"]} == {"ours", "eager"}
        assert document["left_out"] == []
        assert all(each["check"]["green"] and each["times"]["samples"] == 2 for each in result["implementations"])
    assert drawn.read_text() == chart.html(document)


def test_what_there_was_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "run.json"
    words = "--device cpu --plot none --ops advantage_flow_loss --shapes 2x4x8x8 --rounds 2 --only ours,copy"
    assert main(f"{words} --limit 0 --json {out}".split()) == 0
    document = json.loads(out.read_text())
    assert document["results"] == [] and len(document["left_out"]) == 4
    assert "left out after 0 s: advantage_flow_loss 2x4x8x8 fp32 no v_ref, " in capsys.readouterr().out


def test_a_copy_stands_beside_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "run.json"
    words = "--device cpu --plot none --ops advantage_flow_loss --shapes 2x4x8x8 --rounds 2 --ref without"
    main(f"{words} --only eager,copy --json {out}".split())
    for found in json.loads(out.read_text())["results"]:
        assert [each["implementation"] for each in found["implementations"]] == ["eager", COPY]


@pytest.mark.parametrize("bad", ["--only oars", "--ops nothing", "--dtypes fp8", "--shapes 8", "--plot bench.svg"])
def test_unknown_names_are_refused(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(bad.split())
    assert bad.split()[1] in capsys.readouterr().err
