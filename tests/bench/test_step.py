"""The step's bench: its arithmetic, how kernels are put to sites, and whole runs of a small transformer on the CPU."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")
pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from torch._C._autograd import DeviceType

from bench.roofline import __main__ as roofline
from bench.roofline import models
from bench.roofline.__main__ import NO_GRAD, TRAIN_BACKWARD, TRAIN_FORWARD, Rates, total
from bench.roofline.account import OTHER
from bench.roofline.models import SIZES, Work
from bench.roofline.sites import (
    ADALN,
    ATTENTION,
    GATE,
    GELU,
    GEMM,
    LORA,
    LORA_GEMM,
    NORM2,
    QK_NORM,
    ROTARY,
    SITES,
    STREAMS,
)
from bench.step import __main__ as step
from bench.step import profile as step_profile
from bench.step import reweight
from bench.step import variants as step_variants
from bench.step.profile import COMPILED, LOSS, PROFILE_SITES, UPDATE
from bench.step.variants import Outcome, Variant

CPU = torch.device("cpu")
WORK = Work("tiny", 3, 32, 10)


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny transformer with its first block, which attends twice, and a last one."""
    config = SIZES["tiny"].config() | {"num_layers": 2}
    monkeypatch.setitem(SIZES, "tiny", models.Size(lambda: config, 4, 3, 32, 10))


def test_mfu_is_the_share_of_the_peak() -> None:
    assert step.mfu(flops=300e12, seconds=2.0, peak_tflops=600.0) == pytest.approx(0.25)


def test_throughput_is_that_of_the_medians() -> None:
    row: dict[str, Any] = {"times": {"rollout": {"median": 1.0}, "training": {"median": 3.0}}}
    step.throughput(row, batch=6, flops=step.Flops(rollout=10**12, training=9 * 10**12), peak_tflops=10.0)
    assert row["images_per_second"] == {"rollout": 6.0, "training": 2.0, "step": 1.5}
    assert row["mfu"] == pytest.approx({"rollout": 0.1, "training": 0.3, "step": 0.25})


def test_host_gaps_are_what_the_kernels_leave_over() -> None:
    row = {
        "times": {"rollout": {"median": 1.0}, "training": {"median": 3.0}},
        "profile": {
            "rollout": {GEMM: {"seconds": 0.5, "launches": 1}, OTHER: {"seconds": 0.7, "launches": 1}},
            "training": {GEMM: {"seconds": 2.0, "launches": 1}},
        },
    }
    assert step.host_gaps(row) == {"rollout": 0.0, "training": pytest.approx(1.0)}


def test_flops_are_those_of_the_account_times_the_passes() -> None:
    account = roofline.measure("stock", "bf16", WORK, Rates(1.0, 1.0, 1.0))
    forward, training = total(account, (NO_GRAD,)).flops, total(account, (TRAIN_FORWARD, TRAIN_BACKWARD)).flops
    low_rank = total(account, (NO_GRAD,), LORA_GEMM).flops
    flops = step.flops_of(WORK, steps=7, timesteps=3)
    assert flops.rollout == 7 * forward
    assert flops.training == 3 * (forward + (forward - low_rank) + training)
    assert flops.step == flops.rollout + flops.training


def test_a_variant_may_be_half_as_far_again_from_fp32_as_stock() -> None:
    exact, stock = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.1])

    def outcome(gradients: torch.Tensor) -> Outcome:
        return Outcome(stock, stock, gradients)

    def verdict(gradients: torch.Tensor) -> dict[str, Any]:
        return step.check(outcome(gradients), outcome(stock), Outcome(exact, exact, exact))

    assert verdict(torch.tensor([3.14, 4.0]))["green"]
    wrong = verdict(torch.tensor([3.16, 4.0]))
    assert not wrong["green"] and wrong["velocity"]["green"] and not wrong["gradients"]["green"]
    assert wrong["gradients"]["from_fp32"] == pytest.approx(0.032, rel=1e-3)
    assert wrong["gradients"]["stock_from_fp32"] == pytest.approx(0.02, rel=1e-3)
    assert not verdict(torch.tensor([torch.nan, 4.0]))["green"]


@pytest.mark.parametrize(
    ("name", "around", "site"),
    [
        ("vectorized_elementwise_kernel", ["aten::mul", f"site: {QK_NORM}", f"site: {LOSS}"], QK_NORM),
        ("vectorized_elementwise_kernel", ["aten::mul", f"site: {LOSS}"], LOSS),
        ("vectorized_elementwise_kernel", ["aten::mul"], OTHER),
        ("sm90_xmma_gemm_bf16", ["aten::addmm", f"site: {LORA_GEMM}"], LORA_GEMM),
        ("nvjet_hsh_128x256", ["aten::mm", "CompiledFunction"], GEMM),
        ("pytorch_flash::flash_fwd_kernel", ["aten::_flash_attention_forward"], ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", [], ATTENTION),
        ("triton_poi_fused_add_mul_3", ["CompiledFunction"], COMPILED),
        ("forward_kernel", ["advflow::joint_qk_norm", "CompiledFunction"], QK_NORM),
        ("forward_kernel", ["advflow::adaln", "CompiledFunction"], ADALN),
        ("residual_stats_kernel", ["advflow_ext::forward_loss", f"site: {OTHER}"], LOSS),
    ],
)
def test_a_kernel_belongs_to_the_innermost_mark_else_to_its_name(name: str, around: list[str], site: str) -> None:
    assert step_profile.site_of_kernel(name, around) == site


def operator(name: str, kernels: list[tuple[str, float]], parent: Any = None) -> Any:
    launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, kernels=launched, cpu_parent=parent)


def on_device(name: str, duration: float, annotation: bool = False) -> Any:
    elapsed = SimpleNamespace(elapsed_us=lambda: duration)
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA, kernels=[], time_range=elapsed, is_user_annotation=annotation
    )


def test_every_kernel_counts_once_whether_linked_or_not() -> None:
    mark = operator(f"site: {GATE}", [(f"site: {GATE}", 9.0)])  # the range itself, seen on the device
    events = [
        mark,
        operator("aten::mul", [("elementwise", 2.0)], mark),
        operator("aten::add", [("elementwise", 3.0)]),
        on_device(f"site: {GATE}", 9.0, annotation=True),
        on_device("elementwise", 2.0),
        on_device("elementwise", 3.0),
        on_device("triton_red_fused_mean", 5.0),
        on_device("triton_red_fused_mean", 7.0),
    ]
    found = {site: (share.seconds, share.launches) for site, share in step_profile._kernels(events).items()}
    assert found == {
        GATE: (pytest.approx(2e-6), 1),
        OTHER: (pytest.approx(3e-6), 1),
        COMPILED: (pytest.approx(12e-6), 2),
    }


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "step.json"
    status = step.main(["--device", "cpu", "--json", str(path), *arguments])
    document: dict[str, Any] = json.loads(path.read_text())
    assert status == 0, document["results"]
    return document


def assert_complete(document: dict[str, Any], variants: list[str]) -> None:
    assert [row["variant"] for row in document["results"]] == document["variants"] == variants
    for row in document["results"]:
        assert row["check"]["green"] and "error" not in row
        assert all(0 < row["check"][part]["from_fp32"] < 0.05 for part in ("velocity", "rollout_velocity", "gradients"))
        assert all(row["times"][phase]["samples"] == document["rounds"] for phase in step.PHASES)
        assert all(
            row[measure][part] > 0 for measure in ("images_per_second", "mfu") for part in (*step.PHASES, "step")
        )
        assert row["peak_extra_bytes"] > 0
        for phase in step.PHASES:
            assert set(row["profile"][phase]) <= set(PROFILE_SITES)
            assert row["launches"][phase] == sum(site["launches"] for site in row["profile"][phase].values()) > 0


def test_a_run_on_the_cpu(two_blocks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["stock-fp32", "stock", "ours"]
    out = tmp_path / "folder" / "step.md"
    document = run(
        tmp_path,
        "--variants",
        ",".join(variants),
        "--rounds",
        "2",
        "--steps",
        "1",
        "--timesteps",
        "1",
        "--out",
        str(out),
    )
    assert_complete(document, variants)
    assert document["environment"]["diffusers"] and document["work"] == {
        "model": "tiny", "batch": 3, "px": 32, "text_tokens": 10,
    }  # fmt: skip
    stock, ours = document["results"][1:]
    assert stock["check"]["velocity"]["from_stock"] == 0 < ours["check"]["velocity"]["from_stock"]
    everywhere = {site for phase in step.PHASES for site in stock["profile"][phase]}
    assert everywhere == {*SITES, LOSS, UPDATE} - {ROTARY, STREAMS}  # which SD3 has not
    # Low-rank layers call less than PEFT's, views among it, and a rollout on merged weights nothing for them.
    calls = [sum(row["profile"]["training"][site]["launches"] for site in (LORA, LORA_GEMM)) for row in (stock, ours)]
    assert calls[1] < calls[0]
    assert LORA not in ours["profile"]["rollout"] and LORA in stock["profile"]["rollout"]
    printed, written = capsys.readouterr().out, out.read_text()
    for words in ("Triton does not run on cpu here: ours' blocks are the stock ones", "say nothing about a GPU"):
        assert words in printed and words in written
    assert "| images/s |" in written and "MFU" in printed


@pytest.mark.slow
def test_a_run_of_every_variant(two_blocks: None, tmp_path: Path) -> None:
    document = run(tmp_path, "--variants", ",".join(step.VARIANTS), "--algorithm", "advantage_flow")
    assert_complete(document, list(step.VARIANTS))


def test_sites_of_a_profile_are_those_of_the_account(two_blocks: None) -> None:
    inputs = step_variants.make_inputs(WORK, 2, 1, CPU)
    variant = Variant("stock", step_variants.make_base("tiny", CPU), "diffusion_nft")
    found = step_profile.by_site(
        lambda backward: variant.accumulate(inputs, inputs.draws[0], inputs.noise, backward), variant.model, CPU, False
    )
    account = roofline.measure("stock", "fp32", WORK, Rates(1.0, 1.0, 1.0))
    # Rollout policy, reference, and learner. GEMMs are kernels here too, though under autocast as many casts join them.
    passes = (NO_GRAD, NO_GRAD, TRAIN_FORWARD, TRAIN_BACKWARD)
    for site in (ATTENTION, GELU):
        expected = sum(total(account, (name,), site).launches for name in passes)
        assert found[site].launches >= expected > 0
    for site in (QK_NORM, ADALN, NORM2, GATE, LORA, LORA_GEMM, GEMM, LOSS):
        assert found[site].launches > 0 and found[site].seconds > 0


def test_variants_share_the_base_and_start_alike(two_blocks: None) -> None:
    base = step_variants.make_base("tiny", CPU)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    inputs = step_variants.make_inputs(WORK, 2, 1, CPU)
    variants = [Variant(name, base, "diffusion_nft") for name in ("stock", "ours")]
    starts = [step_variants.adapter_weights(variant.model, "learner") for variant in variants]
    assert starts[0].keys() == starts[1].keys() and len(starts[0]) > 0
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    for variant, weights in zip(variants, starts, strict=True):
        assert shared <= {parameter.data_ptr() for parameter in variant.model.parameters()}
        learner = {name: parameter.clone() for name, parameter in weights.items()}
        variant.roll_out(inputs)
        variant.train(inputs)
        assert all(not torch.equal(learner[name], weights[name]) for name in learner)
    assert all(torch.equal(before[name], parameter) for name, parameter in base.named_parameters())


def test_a_batch_in_parts_comes_to_the_same(two_blocks: None) -> None:
    base, inputs = step_variants.make_base("tiny", CPU), step_variants.make_inputs(WORK, 2, 1, CPU).in_fp32()
    variant = Variant("stock-fp32", base, "diffusion_nft")
    whole, parts = variant.outcome(inputs), variant.outcome(inputs, at_a_time=2)
    for name in ("velocity", "rollout_velocity", "gradients"):
        assert step.relative(getattr(parts, name), getattr(whole, name)) < 1e-5


def test_a_variant_that_fails_does_not_hide_the_others(
    two_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        warnings.warn("the stock formula serves", RuntimeWarning, stacklevel=1)
        raise RuntimeError("out of luck\nand of words")

    monkeypatch.setattr(step_variants, "_loop_policies", refuse)
    path = tmp_path / "step.json"
    assert (
        step.main(
            ["--device", "cpu", "--variants", "ours,stock", "--steps", "1", "--timesteps", "1", "--json", str(path)]
        )
        == 1
    )
    ours, stock = json.loads(path.read_text())["results"]
    assert ours["error"] == "RuntimeError: out of luck" and not ours["check"]["green"]
    assert stock["check"]["green"] and stock["images_per_second"]["step"] > 0
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: out of luck" in printed and "ours warned: the stock formula serves" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--variants", "stock,theirs"],
            "'theirs': choose from stock-fp32, stock, compile, ours, ours+compile, stock+graph",
        ),
        (["--model", "tiny", "--px", "33"], "--px 33: tiny needs a multiple of 4 up to 32"),
        (["--steps", "0"], "expected a whole number, 1 or more"),
        (["--timesteps", "-1"], "expected a whole number, 1 or more"),
        (["--rounds", "two"], "expected a whole number, 1 or more"),
        (["--peak-tflops", "0"], "expected a positive number"),
        (["--algorithm", "ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])
    assert "--device cuda: no CUDA device is usable here" in capsys.readouterr().err


def test_missing_packages_are_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("diffusers", "peft") else object())
    assert step.main([]) == 1
    assert "needs diffusers and peft, which cannot be imported here" in capsys.readouterr().err


@pytest.mark.slow
def test_iterations_with_a_second_pass_and_without_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reweight.json"
    assert reweight.main(["--steps", "2", "--rounds", "2", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert {name: len(each) for name, each in result["all"].items()} == {"second pass": 2, "reweighted": 2}
    assert result["speedup"] == result["seconds"]["second pass"] / result["seconds"]["reweighted"]
    assert "2 of 10 steps: " in capsys.readouterr().out
