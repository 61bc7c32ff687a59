"""The account of bytes of the SD3 transformer, on the embedded pipeline's."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")
pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from bench.roofline import __main__ as roofline
from bench.roofline.__main__ import NO_GRAD, PASSES, TRAIN_BACKWARD, TRAIN_FORWARD, Rates, total
from bench.roofline.account import GRADIENT_SUMS, Origin, Source, trace
from bench.roofline.cuda_choices import CudaChoices
from bench.roofline.models import SIZES, Work, build_fake, fake_inputs
from bench.roofline.sites import (
    ADALN,
    ATTENTION,
    GATE,
    GELU,
    GEMM,
    JOINT,
    LORA,
    LORA_GEMM,
    NORM2,
    QK_NORM,
    ROTARY,
    SITES,
    STREAMS,
    site_of,
)

WORK = Work("tiny", 3, 32, 10)
SD3_SITES = set(SITES) - {ROTARY, STREAMS}  # it has neither
RATES = Rates(790.0, 500.0, 4300.0)
Result = dict[str, Any]
measured = functools.cache(roofline.measure)  # seconds each

# The embedded transformer: four blocks, attention to the text in all, a second attention to the image in one; the last
# block drops the text after its attention.
QK_NORMS = 4 * 4 + 2
ADAPTERS = 4 * 8 - 1
MLPS = 4 + 3


@pytest.fixture(scope="module")
def stock() -> Result:
    return measured("stock", "bf16", WORK, RATES)


@pytest.fixture(scope="module")
def rms_norm() -> Result:
    return measured("rms_norm", "bf16", WORK, RATES)


def launches(result: Result, pass_name: str, site: str) -> int:
    return total(result, (pass_name,), site).launches


def saved(result: Result) -> int:
    return sum(result["saved"].values())


def test_the_sites_sum_to_the_total(stock: Result) -> None:
    assert {row["site"] for row in stock["rows"]} == SD3_SITES and set(stock["saved"]) <= SD3_SITES
    for pass_name in PASSES:
        parts = [total(stock, (pass_name,), site) for site in SITES]
        whole = total(stock, (pass_name,))
        assert whole.launches > 0
        assert sum(part.launches for part in parts) == whole.launches
        assert sum(part.bytes for part in parts) == whole.bytes
        assert sum(part.flops for part in parts) == whole.flops
        assert sum(part.seconds for part in parts) == pytest.approx(whole.seconds)


def test_the_launches_of_stock_are_those_of_its_source(stock: Result) -> None:
    expected = {
        QK_NORM: 8 * QK_NORMS,  # cast, square, mean, + eps, rsqrt, * rsqrt, cast, * weight
        GELU: MLPS,
        ATTENTION: 5,
        GATE: 2 * (2 * MLPS + 1),  # gate *, residual +: after both attentions and the MLP
        NORM2: 4 * MLPS,  # norm, 1 + scale, *, + shift
        LORA_GEMM: 2 * ADAPTERS,
    }
    assert {site: launches(stock, TRAIN_FORWARD, site) for site in expected} == expected
    assert launches(stock, TRAIN_BACKWARD, GELU) == MLPS
    # Stock diffusers does the same whether gradients are asked for or not.
    for site in SITES:
        assert total(stock, (NO_GRAD,), site) == total(stock, (TRAIN_FORWARD,), site)


def test_gradients_reach_the_adapters_alone(stock: Result) -> None:
    assert stock["trainable"] == ADAPTERS * 2 * 64 * 32
    assert launches(stock, TRAIN_FORWARD, GRADIENT_SUMS) == 0 < launches(stock, TRAIN_BACKWARD, GRADIENT_SUMS)
    # An adapter needs the gradients of both its weights and, but for the first block's, those of what goes in.
    assert 3 * ADAPTERS < launches(stock, TRAIN_BACKWARD, LORA_GEMM) <= 4 * ADAPTERS
    # A frozen weight costs one GEMM backward at most, and those of the modulations cost none.
    assert launches(stock, TRAIN_BACKWARD, GEMM) < launches(stock, TRAIN_FORWARD, GEMM)


def test_flops_are_those_of_the_flop_counter(stock: Result) -> None:
    with FakeTensorMode(), CudaChoices():
        transformer = build_fake("tiny", torch.bfloat16)
        inputs = fake_inputs(transformer, WORK)
        with FlopCounterMode(display=False) as counter:
            transformer(**inputs, return_dict=False)[0].sum().backward()
    assert total(stock, (TRAIN_FORWARD, TRAIN_BACKWARD)).flops == counter.get_total_flops()


def test_one_fused_norm_changes_its_own_site(stock: Result, rms_norm: Result) -> None:
    assert launches(rms_norm, TRAIN_FORWARD, QK_NORM) == 2 * QK_NORMS  # the heads are a strided view: copy, norm
    for pass_name in PASSES:
        assert total(rms_norm, (pass_name,), QK_NORM).bytes < total(stock, (pass_name,), QK_NORM).bytes
        for site in (ADALN, NORM2, GATE, GELU, LORA, LORA_GEMM, ATTENTION, GEMM):
            assert total(rms_norm, (pass_name,), site) == total(stock, (pass_name,), site)
    assert saved(rms_norm) < saved(stock)
    assert rms_norm["saved"][GELU] == stock["saved"][GELU]


def test_fp32_adapters_cost_casts_and_memory(stock: Result) -> None:
    result = measured("stock", "fp32", WORK, RATES)
    assert saved(result) > saved(stock)
    for pass_name in PASSES:
        assert launches(result, pass_name, LORA) > launches(stock, pass_name, LORA)
        assert total(result, (pass_name,), QK_NORM) == total(stock, (pass_name,), QK_NORM)
    assert result["trainable"] == stock["trainable"]


def test_time_is_the_longer_of_compute_and_memory() -> None:
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    gemm, add = trace(lambda: torch.mm(x, weight) + x, nn.Module(), lambda _: "here", backward=False).events
    flops, moved = 2 * 64**3, 3 * 4 * 64**2
    assert Rates(1e-6, 1.0, 1e9).seconds(gemm) == pytest.approx(flops / 1e6)
    assert Rates(1e9, 1.0, 1e-3).seconds(gemm) == pytest.approx(moved / 1e6)
    assert Rates(1.0, 1.0, 1.0).seconds(add) == pytest.approx(moved / 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stand_in_computes_rms_norm(dtype: torch.dtype) -> None:
    heads = torch.randn(2, 5, 3, 8, dtype=torch.float64).to(dtype).transpose(1, 2)
    weight, grad = torch.rand(8).to(dtype), torch.randn(2, 3, 5, 8).to(dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.rms_norm(x, (8,), weight.to(x.dtype), 1e-6)
        return y, torch.autograd.grad(y, x, grad.to(x.dtype))[0]

    exact = run(heads.double().requires_grad_())
    with CudaChoices():
        ours = run(heads.clone().requires_grad_())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, expected in zip(ours, exact, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        torch.testing.assert_close(mine.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_stand_ins_refuse_what_they_cannot_account_for() -> None:
    with CudaChoices(), pytest.raises(ValueError, match="frozen weight"):
        F.rms_norm(torch.randn(2, 8), (8,), torch.ones(8, requires_grad=True))
    with CudaChoices(), pytest.raises(ValueError, match="last dimension"):
        F.rms_norm(torch.randn(2, 8), (2, 8))


def test_attention_is_one_fused_operator() -> None:
    with FakeTensorMode(), CudaChoices():
        q = torch.empty(2, 5, 3, 8, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        step = lambda: F.scaled_dot_product_attention(q, q, q).sum()  # noqa: E731
        events = trace(step, nn.Module(), site_of, backward=True).events
    attention = [event for event in events if event.site == ATTENTION]
    assert [event.op.split(".")[1] for event in attention] == [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    ]
    forward_flops = 2 * 2 * 2 * 3 * 5 * 5 * 8
    assert [event.flops for event in attention] == [forward_flops, forward_flops * 5 // 2]


def test_our_operators_are_one_launch_each(stock: Result) -> None:
    result = measured("ours", "bf16", WORK, RATES)
    attentions = 5  # four blocks, one of them with a second attention
    assert launches(result, TRAIN_FORWARD, QK_NORM) == launches(result, NO_GRAD, QK_NORM) == attentions
    ours = [row for row in result["rows"] if row["op"].startswith("advflow.")]
    assert {row["site"] for row in ours} == {QK_NORM, ADALN, GATE} and {row["pass"] for row in ours} == set(PASSES)
    # In each stream of a block: gates with the norm that follows, and the gate of the MLP; the last context has none.
    assert launches(result, NO_GRAD, GATE) == 4 * 4 - 2
    assert not total(result, PASSES, NORM2).launches
    assert total(result, PASSES, JOINT).bytes < total(stock, PASSES, JOINT).bytes / 4
    assert not total(result, (NO_GRAD,), LORA_GEMM).launches  # merged
    assert sum(result["saved"].values()) < sum(stock["saved"].values())


@pytest.mark.parametrize(
    ("model", "layers", "attentions"),
    [("flux1-dev", {"num_layers": 1, "num_single_layers": 1}, 2), ("qwen-image", {"num_layers": 1}, 1)],
)
def test_of_flux_and_qwen_image_norm_and_rotation_become_one_launch(
    model: str, layers: dict[str, int], attentions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SIZES[model]
    config = size.config() | layers | {"num_attention_heads": 2}
    monkeypatch.setitem(SIZES, model, dataclasses.replace(size, config=lambda: config))
    work = Work(model, 2, 64, 10)
    stock, ours = (roofline.measure(variant, "bf16", work, RATES) for variant in ("stock", "ours"))
    assert launches(stock, NO_GRAD, ROTARY) >= 6 * attentions and not total(ours, PASSES, ROTARY).launches
    assert launches(ours, NO_GRAD, QK_NORM) == attentions
    # Two streams: norm, gate with norm, gate of each; one stream: norm and gate.
    for site, count in ((GATE, 4 * 1 + (attentions - 1)), (ATTENTION, attentions), (NORM2, 0)):
        assert launches(ours, NO_GRAD, site) == count
    for pass_name in PASSES:
        assert total(ours, (pass_name,), GEMM).flops == total(stock, (pass_name,), GEMM).flops
        assert total(ours, (pass_name,)).bytes < total(stock, (pass_name,)).bytes
    assert roofline.variants(work) == (["stock", "ours"] if model == "flux1-dev" else ["stock", "rms_norm", "ours"])


def test_the_parts_of_a_patched_block_are_marked_and_nothing_else_is_guessed() -> None:
    from advflow_ext.patches import _fused

    def site(function: str) -> str:
        op = torch.ops.aten.mul.Tensor
        return site_of(Origin(op, "forward", "elementwise", source=Source(str(_fused.__file__), function, 1)))

    assert site("FusedBlock._modulate.<locals>.fused") == site("projected") == ADALN
    assert site("FusedBlock._feed_forward.<locals>.stock") == site("_gated") == GATE
    assert site("FusedBlock._joint_qkv.<locals>.fused") == QK_NORM and site("SD3Block._attention") == JOINT
    assert site("FusedBlock._projected") == LORA
    assert site("FluxSingleBlock._attention") == JOINT and site("_projected_together") == STREAMS
    with pytest.raises(ValueError, match=r"FusedBlock\._new of a patched block issues operators"):
        site("FusedBlock._new.<locals>.fused")


def test_the_command_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "measure", measured)
    path, picture = tmp_path / "roofline.json", tmp_path / "images" / "roofline.png"
    arguments = ["--model", "tiny", "--batch", "3", "--text-tokens", "10", "--adapters", "bf16", "--json", str(path)]
    assert roofline.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "ours against stock" in printed and "not measured" in printed
    for site in (*SD3_SITES, "saved activations", "of these elementwise"):
        assert site in printed
    document = json.loads(path.read_text())
    assert document["work"] == {"model": "tiny", "batch": 3, "px": 32, "text_tokens": 10}
    assert [result["variant"] for result in document["results"]] == ["stock", "rms_norm", "ours"]
    assert document["environment"]["commit"] and document["environment"]["diffusers"]
    assert roofline.main(["--render", str(path), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "tiny", "--px", "33"], "--px 33: tiny needs a multiple of 4 up to 32"),
        (["--px", "8192"], "--px 8192: sd35-medium needs a multiple of 16 up to 6144"),
        (["--batch", "0"], "expected a whole number, 1 or more"),
        (["--batch", "-3"], "expected a whole number, 1 or more"),
        (["--gbps", "nan"], "expected a positive number"),
        (["--tflops", "fast"], "expected a positive number"),
        (["--adapters", "bf16,fp8"], "'fp8': choose from bf16, fp32"),
        (["--render", "x.json"], "go together"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        roofline.main(arguments)
    assert complaint in capsys.readouterr().err
