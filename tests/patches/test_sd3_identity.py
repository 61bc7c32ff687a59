"""What a patched transformer takes for diffusers' own: the class alone, whatever somebody else's is called."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advflow_ext as af

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

import diffusers
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero, RMSNorm
from peft.tuners.lora.layer import Linear as LoraLinear

from advflow_ext.patches import _diffusers, _sd3_block
from tests.patches.sd3_models import assert_same, inputs, run, transformer

BLOCK = "transformer_blocks.1"


def small(**options: Any) -> Any:
    return transformer(3, 2, 16, **options)


def one_plus_weight(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
    return out


def derived(cls: type, forward: Callable[..., Any], name: str = "forward") -> type:
    """A class of the same name as `cls`, derived from it, that computes something else."""
    return type(cls.__name__, (cls,), {name: forward})


def halved(cls: type, name: str = "forward") -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = getattr(cls, name)(self, *args, **kwargs)
        return tuple(each * 0.5 for each in out) if isinstance(out, tuple) else out * 0.5

    return derived(cls, forward, name)


class ForeignNorm(nn.Module):
    """Not derived from anybody's norm."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.eps, self.bias = nn.Parameter(weight, requires_grad=False), 1e-6, None

    forward = one_plus_weight


ForeignNorm.__name__ = "RMSNorm"


class ForeignProcessor:
    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any
    ) -> Any:
        found = JointAttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)
        return tuple(each + 0.1 for each in found) if isinstance(found, tuple) else found + 0.1


ForeignProcessor.__name__ = "JointAttnProcessor2_0"


def become(path: str, cls: Callable[[type], type]) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        module = block.get_submodule(path)
        module.__class__ = cls(type(module))

    return change


def with_foreign_norm(block: Any) -> None:
    block.attn.norm_k = ForeignNorm(block.attn.norm_k.weight.detach())


DISGUISES: dict[str, tuple[Callable[[Any], None], str]] = {
    "processor": (lambda block: block.attn.set_processor(ForeignProcessor()), f"{BLOCK}.attn"),
    "processor derived": (
        lambda block: block.attn.set_processor(halved(JointAttnProcessor2_0, "__call__")()),
        f"{BLOCK}.attn",
    ),
    "rms norm": (with_foreign_norm, f"{BLOCK}.attn"),
    "rms norm derived": (become("attn.norm_q", lambda cls: derived(cls, one_plus_weight)), f"{BLOCK}.attn"),
    "attention": (become("attn", halved), f"{BLOCK}.attn"),
    "adaln": (become("norm1", halved), BLOCK),
    "adaln of the text": (become("norm1_context", halved), BLOCK),
    "layer norm inside": (become("norm1.norm", halved), BLOCK),
    "layer norm": (become("norm2", halved), BLOCK),
    "layer norm of the text": (become("norm2_context", halved), BLOCK),
    "feed forward": (become("ff", halved), f"{BLOCK}.ff"),
    "activation": (become("ff.net.0", halved), f"{BLOCK}.ff"),
    "low rank": (become("attn.to_v", halved), f"{BLOCK}.attn.to_v"),
    "block": (become("", halved), BLOCK),
}


# Unverified, for verifying would put right what was taken for diffusers' own; once with it.
@pytest.mark.parametrize(("disguise", "verify"), [*((name, False) for name in DISGUISES), ("block", "first")])
def test_somebody_else_s_class_of_the_same_name_keeps_its_computation(disguise: str, verify: Any) -> None:
    change, kept = DISGUISES[disguise]
    model = small()
    stock = run(model, inputs())
    if disguise == "block":
        model.transformer_blocks[1].__class__ = halved(JointTransformerBlock)
    else:
        change(model.transformer_blocks[1])
    expected = run(model, inputs())
    assert (expected[0] - stock[0]).norm() > 1e-3 * stock[0].norm()
    with af.apply_to_sd3(model, verify=verify) as patch:
        assert list(patch.kept) == [kept], patch
        assert_same(run(model, inputs()), expected)


@pytest.mark.parametrize(
    ("cls", "kept"),
    [
        (RMSNorm, {"attn"}),
        (AdaLayerNormZero, {""}),
        (nn.LayerNorm, {""}),
        (Attention, {"attn"}),
        (GELU, {"ff"}),
        (FeedForward, {"ff"}),
        (JointTransformerBlock, {""}),
        (LoraLinear, {"attn.to_q"}),
    ],
)
def test_a_class_whose_forward_was_exchanged_keeps_it(
    cls: type, kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    original = cls.forward  # type: ignore[attr-defined]

    def exchanged(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        return tuple(None if each is None else each * 0.5 for each in out) if isinstance(out, tuple) else out * 0.5

    monkeypatch.setattr(cls, "forward", exchanged)
    expected = run(model, inputs())
    with af.apply_to_sd3(model) as patch:
        assert {f"{BLOCK}.{part}".rstrip(".") for part in kept} <= set(patch.kept), patch
        assert_same(run(model, inputs()), expected)
    with af.apply_to_sd3(verify=False) as patch:
        assert_same(run(model, inputs()), expected)


def test_an_exchanged_forward_of_linear_layers_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen projections of one stream are one function, where a gradient goes through them."""
    model, given, original = small(lora=False), inputs(), nn.Linear.forward
    given["hidden_states"].requires_grad_()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.5 * original(self, x))
    expected = run(model, given)
    with af.apply_to_sd3(model, verify=False):
        assert_same(run(model, given), expected)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_own_rms_norm(eps: float | None, dtype: torch.dtype) -> None:
    model = small(lora=False)
    for block in model.transformer_blocks:
        for attn in filter(None, (block.attn, block.attn2)):
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if (old := getattr(attn, name)) is not None:
                    norm = nn.RMSNorm(16, eps=eps)
                    norm.weight = old.weight
                    setattr(attn, name, norm)
            attn.to_q.weight.mul_(1e-2)  # so that the epsilon matters
    model.to(dtype)
    given = {name: tensor.to(dtype) for name, tensor in inputs().items()}
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
        with af.apply_to_sd3(model) as patch:
            found = model(**given, return_dict=False)[0]
    if eps is None:
        assert (
            set(patch.kept.values()) == {"its norm_q leaves its epsilon to torch"} and "qk_norm" not in patch.replaced
        )
    else:
        assert not patch.kept and patch.replaced["qk_norm"] == 4
    assert_same([found], [expected], 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-6])
def test_an_epsilon_that_no_op_takes_is_left_to_its_module(eps: float) -> None:
    model = small()
    block = model.transformer_blocks[1]
    for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k, block.norm2):
        norm.eps = eps
    with torch.no_grad():
        expected = model(**inputs(), return_dict=False)[0]
        with af.apply_to_sd3(model) as patch:
            found = model(**inputs(), return_dict=False)[0]
    assert list(patch.kept) == [BLOCK]
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("cls", [RMSNorm, nn.LayerNorm, AdaLayerNormZero])
def test_verifying_asks_the_module_itself(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a class taken for what it is not, the first comparison would find it out."""
    model, original = small(), cls.forward

    def exchanged(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        return (1.1 * out[0], *out[1:]) if isinstance(out, tuple) else 1.1 * out

    monkeypatch.setattr(cls, "forward", exchanged)
    monkeypatch.setattr(_diffusers, "is_as_written", lambda *_: True)
    expected = run(model, inputs())
    with af.apply_to_sd3(model) as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not patch.kept
        found = run(model, inputs())
    assert_same(found, expected)
    assert any("differs from float64" in str(warning.message) for warning in said)


def test_a_block_of_diffusers_0_31_takes_no_arguments_of_joint_attention() -> None:
    model = small()
    block = model.transformer_blocks[1]
    block.set_chunk_feed_forward(1, dim=0)
    fused = _sd3_block.SD3Block(frozenset({"gate"}), _diffusers.sd3_classes(), None)

    def old(block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> str:
        return "old"

    x = torch.zeros(2, 3, 32)
    assert fused.forward(old, block, x, x, x[:, 0]) == "old"  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("version", ["0.30.3", "0.29.0.dev0"])
def test_an_older_diffusers_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ImportError, match=f"diffusers is {version}; accepted by apply_to_sd3 is 0.31 or newer."):
        af.apply_to_sd3(small())


LOAD = """
import sys, torch
model, given = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save((model(**given, return_dict=False)[0], [type(m).__module__ for m in model.modules()]), sys.argv[2])
assert not any(name.startswith("advflow_ext") for name in sys.modules)
"""


def test_a_saved_model_is_loaded_as_diffusers_own(tmp_path: Path) -> None:
    model = small()
    given = inputs()
    with torch.no_grad():
        stock = model(**given, return_dict=False)[0]
    patch = af.apply_to_sd3(model)
    with torch.no_grad():
        model(**given, return_dict=False)
    torch.save((model, given), tmp_path / "model.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment)
    out, _ = torch.load(tmp_path / "out.pt")
    assert torch.equal(out, stock)
    loaded, _ = torch.load(tmp_path / "model.pt", weights_only=False)
    patch.unapply()
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    expected = run(model, given)
    with af.apply_to_sd3(loaded) as again:
        assert not again.kept and again.replaced == patch.replaced
        assert_same(run(loaded, given), expected)
    for one, other in zip(run(loaded, given), expected, strict=True):
        assert torch.equal(one, other)


def test_copies_of_a_patched_model_and_of_its_report() -> None:
    model = small()
    patch = af.apply_to_sd3(model)
    twin, block = copy.deepcopy(model), copy.copy(model.transformer_blocks[0])
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert type(block) is type(model.transformer_blocks[0])
    report = pickle.loads(pickle.dumps(patch))
    assert (report.replaced, report.kept, report.active) == (patch.replaced, patch.kept, False)
    report.unapply()
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert type(pickle.loads(pickle.dumps(model.transformer_blocks[0], protocol))) is JointTransformerBlock
    patch.unapply()
    assert type(model.transformer_blocks[0]) is JointTransformerBlock
    assert_same(run(twin, inputs()), run(model, inputs()), 0.0)


def test_a_model_is_not_saved_with_a_cache_on() -> None:
    model = small()
    with (
        af.nn.ModulationCache(model),
        pytest.raises(RuntimeError, match="copied or saved while its ModulationCache is on"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)
