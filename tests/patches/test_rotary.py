"""Patched FLUX.1 and Qwen-Image transformers are the stock ones: outputs, gradients of the adapters, both ways."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import advflow_ext as af
from advflow_ext.testing import relative_error
from tests.nn.kernel_checks import RecordedOps

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

import diffusers
from diffusers.models.transformers import transformer_flux, transformer_qwenimage
from peft import get_peft_model

from advflow_ext.patches import _fused, _rotary
from tests.patches.rotary_models import FLUX, QWEN_IMAGE, Family, as_dtype, qwen_image, qwen_image_inputs
from tests.patches.sd3_models import adapters, assert_same, run

HALF_PRECISION_RATIO = 1.5
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HOMES = {id(FLUX): transformer_flux, id(QWEN_IMAGE): transformer_qwenimage}
ROTATIONS = {id(FLUX): "apply_rotary_emb", id(QWEN_IMAGE): "apply_rotary_emb_qwen"}


@pytest.fixture(scope="module", params=[FLUX, QWEN_IMAGE], ids=["flux", "qwen_image"])
def family(request: pytest.FixtureRequest) -> Family:
    found: Family = request.param
    return found


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return family.make()


@pytest.fixture(scope="module")
def stock(family: Family, model: Any) -> list[Tensor]:
    return run(model, family.inputs())


@pytest.fixture(autouse=True)
def nothing_is_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


def test_tiny_model_with_adapters(family: Family, model: Any, stock: list[Tensor]) -> None:
    classes = [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch = family.apply(model)
    assert patch.replaced == family.replaced and not patch.kept
    with RecordedOps() as recorded:
        patched = run(model, family.inputs())
    assert {"joint_qk_norm", "joint_qk_norm_backward", "adaln", "adaln_backward"} == {
        name for name, _ in recorded.calls
    }
    assert_same(patched, stock)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    patch.unapply()
    assert [type(module) for module in model.modules()] == classes
    for one, other in zip(run(model, family.inputs()), stock, strict=True):
        assert torch.equal(one, other)


def test_every_norm_modulation_and_gate_is_one_launch(family: Family, model: Any) -> None:
    with family.apply(model, verify=False), RecordedOps() as recorded, torch.no_grad():
        model(**family.inputs(), return_dict=False)
    names = [name for name, _ in recorded.calls]
    # Two streams: norm, gate with norm, gate, of each. One stream: norm, gate.
    expected = 6 + 2 if family is FLUX else 2 * 6
    assert (names.count("adaln"), names.count("joint_qk_norm")) == (expected, family.replaced["qk_norm"])


@pytest.mark.parametrize("off", ["qk_norm", "adaln", "gate", "gelu", "lora"])
def test_all_ops_but_one(family: Family, model: Any, stock: list[Tensor], off: str) -> None:
    with family.apply(model, verify=False, **{off: False}) as patch:
        assert set(patch.replaced) == set(family.replaced) - {off}
        assert_same(run(model, family.inputs()), stock)


def test_bfloat16_is_no_further_from_float64_than_stock(family: Family, model: Any) -> None:
    """FLUX without cuDNN's attention, by which, supposedly, gradients of the stock model were 1e38 on an H200, and of
    the patched one NaN (torch 2.11)."""
    half, exact = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().double()
    given = as_dtype(family.inputs(), torch.bfloat16)
    truth = run(exact, as_dtype(given, torch.float64))
    with sdpa_kernel(WITHOUT_CUDNN) if family is FLUX else nullcontext():
        theirs = [relative_error(a, b) for a, b in zip(run(half, given), truth, strict=True)]
        with family.apply(half) as patch:
            ours = [relative_error(a, b) for a, b in zip(run(half, given), truth, strict=True)]
    assert patch.replaced == family.replaced and max(theirs) < 0.1
    assert ours[0] <= HALF_PRECISION_RATIO * theirs[0]
    # Single gradients of a few hundred numbers scatter; together they are thousands.
    assert sum(e**2 for e in ours) ** 0.5 <= HALF_PRECISION_RATIO * sum(e**2 for e in theirs) ** 0.5


def test_infer_mode_runs_on_merged_weights(family: Family, model: Any, stock: list[Tensor]) -> None:
    with family.apply(model, mode="infer"), torch.no_grad():
        assert_same([model(**family.inputs(), return_dict=False)[0]], stock[:1])


def test_inside_peft_and_gradient_checkpointing(family: Family) -> None:
    base = family.make(lora=False)
    wrapped = get_peft_model(base, adapters())
    stock = run(wrapped, family.inputs())
    base.enable_gradient_checkpointing()
    with family.apply(wrapped):
        assert_same(run(wrapped, family.inputs()), stock)


def test_compiles_into_one_graph(family: Family, model: Any, stock: list[Tensor]) -> None:
    with family.apply(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(run(model, family.inputs(), compiled), stock)


@pytest.mark.slow
def test_regional_compilation(family: Family) -> None:
    regional = family.make()
    stock = run(regional, family.inputs())
    with family.apply(regional):
        regional.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert_same(run(regional, family.inputs()), stock)


def test_a_rotation_of_somebody_else_s_is_found_out(
    family: Family, model: Any, stock: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, name = HOMES[id(family)], ROTATIONS[id(family)]
    own = getattr(home, name)
    monkeypatch.setattr(home, name, lambda x, *given, **more: own(x.flip(-1), *given, **more).flip(-1))
    other = run(model, family.inputs())
    assert relative_error(other[0], stock[0]) > 1e-3
    with family.apply(model), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_same(run(model, family.inputs()), other)
    assert any("the fused qk_norm differs from float64" in str(warning.message) for warning in said)


def test_attention_is_the_dispatcher_s_with_the_backend_that_was_set(
    family: Family, model: Any, stock: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = HOMES[id(family)]
    own, seen = home.dispatch_attention_fn, []

    def recorded(*args: Any, **given: Any) -> Tensor:
        seen.append(given["backend"])
        out: Tensor = own(*args, **given)
        return out

    monkeypatch.setattr(home, "dispatch_attention_fn", recorded)
    model.set_attention_backend("_native_math")
    try:
        with family.apply(model), torch.no_grad():
            assert_same([model(**family.inputs(), return_dict=False)[0]], stock[:1])
    finally:
        model.reset_attention_backend()
    assert len(seen) == family.replaced["qk_norm"] and len(set(seen)) == 1 and seen[0] is not None


class ForeignNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def foreign_norm(block: Any) -> None:
    norm = ForeignNorm(16, eps=1e-6)
    norm.weight = block.attn.norm_q.weight
    block.attn.norm_q = norm


def hooked_norm(block: Any) -> None:
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
    norms[0].register_forward_hook(lambda module, args, out: 0.5 * out)


def own_forward(block: Any) -> None:
    stock = block.forward
    # No scale and no shift, which the norm that follows would not see.
    block.forward = lambda *args, **given: tuple(each.roll(1, -1) for each in stock(*args, **given))


@pytest.mark.parametrize(("change", "part"), [(foreign_norm, ".attn"), (hooked_norm, ""), (own_forward, "")])
def test_what_is_somebody_else_s_is_kept_and_said(family: Family, stock: list[Tensor], change: Any, part: str) -> None:
    other = family.make()
    change(other.get_submodule(family.blocks))
    expected = run(other, family.inputs())
    assert relative_error(expected[0], stock[0]) > 1e-3
    with family.apply(other) as patch:
        assert list(patch.kept) == [f"{family.blocks}{part}"], patch
        assert_same(run(other, family.inputs()), expected)


def test_fused_projections_are_kept(family: Family) -> None:
    other = family.make(lora=False)
    attn = other.get_submodule(f"{family.blocks}.attn")
    attn.fuse_projections()
    with family.apply(other) as patch:
        assert patch.kept == {f"{family.blocks}.attn": "its projections are fused"}


def test_blocks_given_arguments_for_attention_run_their_own_forward(family: Family, model: Any) -> None:
    name = "joint_attention_kwargs" if family is FLUX else "attention_kwargs"
    with family.apply(model), torch.no_grad(), RecordedOps() as recorded:
        model(**family.inputs(), **{name: {"foreign": 1}} if family is FLUX else {name: {}}, return_dict=False)
    assert bool(recorded.calls) is (family is not FLUX)


def test_an_exchanged_forward_keeps_its_blocks(family: Family, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block = type(model.get_submodule(family.blocks))
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **given: own(*args, **given))
    with family.apply(model) as patch:
        assert patch.kept[family.blocks] == f"it is a {block.__name__} with an exchanged forward"


def test_a_modulation_that_was_exchanged_keeps_the_blocks_of_qwen_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_qwenimage.QwenImageTransformerBlock, "_modulate", lambda *given: given)
    with af.apply_to_qwen_image(qwen_image()) as patch:
        assert "transformer_blocks.0" in patch.kept


def test_modulations_by_token_are_kept() -> None:
    other = qwen_image(zero_cond_t=True)
    given = qwen_image_inputs() | {"img_shapes": [[(1, 1, 2), (1, 1, 2)]] * 2}
    expected = run(other, given)
    with af.apply_to_qwen_image(other) as patch:
        assert (
            set(patch.kept.values()) == {"its tokens have modulations of their own"} and "adaln" not in patch.replaced
        )
        assert_same(run(other, given), expected)


def test_a_text_without_a_mask() -> None:
    model, given = qwen_image(), qwen_image_inputs() | {"encoder_hidden_states_mask": None}
    expected = run(model, given)
    with af.apply_to_qwen_image(model):
        assert_same(run(model, given), expected)


def test_what_float16_cannot_hold_is_its_largest_number() -> None:
    assert _rotary.clipped(torch.tensor([torch.inf, -torch.inf, 1.0]).half()).tolist() == [65504.0, -65504.0, 1.0]


def test_a_wrong_kernel_is_found_out_and_replaced(
    family: Family, model: Any, stock: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = _fused.layer_norm_modulate
    monkeypatch.setattr(_fused, "layer_norm_modulate", lambda *args, **given: (1.01 * fused(*args, **given)[0],))
    with family.apply(model), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_same(run(model, family.inputs()), stock)
    assert any("the fused adaln differs from float64" in str(warning.message) for warning in said)


@pytest.mark.parametrize(
    ("version", "function", "accepted"),
    [("0.34.0", "apply_to_flux", "0.35"), ("0.38.0", "apply_to_qwen_image", "0.39")],
)
def test_an_older_diffusers_is_refused(
    version: str, function: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ImportError, match=f"diffusers is {version}; accepted by {function} is {accepted} or newer."):
        getattr(af, function)(nn.Linear(2, 2))


def test_blocks_that_take_other_arguments_are_refused(
    family: Family, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = type(model.get_submodule(family.blocks))
    names: dict[str, Any] = {}
    # As a newer diffusers would have written it, in its own file.
    exec(f"class {block.__name__}:\n def forward(self, hidden_states, temb): pass", vars(HOMES[id(family)]), names)
    monkeypatch.setattr(block, "forward", names[block.__name__].forward)
    with pytest.raises(
        ImportError, match=rf"{block.__name__} of this diffusers takes \(hidden_states, temb\); accepted"
    ):
        family.apply(model)


def test_bad_arguments_are_named(family: Family, model: Any) -> None:
    with pytest.raises(
        ValueError, match="model is a Linear without (Flux|QwenImage).*; accepted is a (FLUX.1|Qwen-Image)"
    ):
        family.apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="gate is 1; accepted are True and False"):
        family.apply(model, gate=1)
    with family.apply(model), pytest.raises(ValueError, match="model is patched already"):
        family.apply(model)
