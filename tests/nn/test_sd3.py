"""A patched SD3 transformer is the stock one: outputs, gradients of the adapters, state dicts, before and after."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_checks import KERNEL_DEVICE, RecordedOps
from torch import Tensor, nn

import advflow_ext as af
from advflow_ext.integrations import _sd3_block
from advflow_ext.testing import relative_error

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from diffusers import SD3Transformer2DModel  # noqa: E402
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0  # noqa: E402
from diffusers.models.normalization import RMSNorm  # noqa: E402
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # noqa: E402

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
TARGETS += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
# A whole model in float32: the roundings of both, a few times 6e-8 an op, through some hundred ops.
FLOAT32_ERROR = 1e-5
HALF_PRECISION_RATIO = 1.5


def adapters(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=TARGETS)


def transformer(layers: int, heads: int, head_dim: int, lora: bool = True, **options) -> SD3Transformer2DModel:
    """Random weights of a size at which every term matters; frozen but for the adapters."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": 24,
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    model = SD3Transformer2DModel(**settings | options)
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 / max(parameter.shape[-1], 4) ** 0.5)
    if lora:
        model.add_adapter(adapters())
    return model.to(KERNEL_DEVICE)


def tiny(**options) -> SD3Transformer2DModel:
    return transformer(3, 2, 32, **options)


def inputs(dtype: torch.dtype = torch.float32, side: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(KERNEL_DEVICE, dtype)

    return {
        "hidden_states": normal(2, 4, side, side),
        "encoder_hidden_states": normal(2, 3, 24),
        "pooled_projections": normal(2, 16),
        "timestep": torch.tensor([100.0, 700.0], device=KERNEL_DEVICE),
    }


def run(model: nn.Module, given: dict[str, Tensor], call: Callable[..., tuple[Tensor]] | None = None) -> list[Tensor]:
    """The output, and the gradients of everything that is trained."""
    model.zero_grad(set_to_none=True)
    out = (model if call is None else call)(**given, return_dict=False)[0]
    if not out.requires_grad:
        return [out]
    pattern = torch.arange(out.numel(), device=out.device).remainder(5).sub(2).view(out.shape).to(out.dtype)
    (out * pattern).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = FLOAT32_ERROR) -> None:
    assert len(actual) == len(expected)
    errors = [relative_error(one, other) for one, other in zip(actual, expected, strict=True)]
    assert max(errors) <= tolerance, errors


@pytest.fixture(scope="module")
def model() -> SD3Transformer2DModel:
    return tiny()


@pytest.fixture(scope="module")
def stock(model) -> list[Tensor]:
    return run(model, inputs())


@pytest.fixture(autouse=True)
def nothing_is_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


def test_tiny_model_with_adapters(model, stock):
    classes = [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch = af.apply_to_sd3(model)
    assert patch.replaced == {"adaln": 3, "gate": 3, "gelu": 3, "qk_norm": 4, "lora": 23} and not patch.kept
    with RecordedOps() as recorded:
        patched = run(model, inputs())
    names = [name for name, _ in recorded.calls]
    # Verified once for each kind of call and run once for each call: what counts is that nothing was left out.
    assert {"joint_qk_norm", "joint_qk_norm_backward", "adaln", "adaln_backward"} == set(names)
    assert_same(patched, stock)
    assert {name: True for name in state} == {
        name: torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()
    }
    patch.unapply()
    patch.unapply()
    assert [type(module) for module in model.modules()] == classes
    for one, other in zip(run(model, inputs()), stock, strict=True):
        assert torch.equal(one, other)


def test_launches_of_one_training_step(model):
    """Per block: AdaLN of both streams, QK norm once or twice, gate and norm of both, gate of both."""
    with af.apply_to_sd3(model, verify=False), RecordedOps() as recorded:
        run(model, inputs())
    names = [name for name, _ in recorded.calls]
    # Three blocks of image 3 and text 3 ops; the last has no context after attention: 2 fewer. Attention: 4.
    assert (names.count("adaln"), names.count("joint_qk_norm")) == (3 * 3 + 3 * 3 - 2, 4)
    # Before the first adapter nothing is differentiated, so the first block's second attention has no backward.
    assert names.count("joint_qk_norm_backward") == 3


@pytest.mark.parametrize("off", ["qk_norm", "adaln", "gate", "gelu", "lora"])
def test_each_op_alone_and_all_but_each(model, stock, off):
    everything = dict.fromkeys(("qk_norm", "adaln", "gate", "gelu", "lora"), True)
    for flags in (everything | {off: False}, dict.fromkeys(everything, False) | {off: True}):
        with af.apply_to_sd3(model, verify=False, **flags) as patch:
            assert set(patch.replaced) == {name for name, on in flags.items() if on}
            assert_same(run(model, inputs()), stock)


def test_no_grad_equals_grad(model, stock):
    with af.apply_to_sd3(model), torch.no_grad():
        out = model(**inputs(), return_dict=False)[0]
    assert_same([out], stock[:1])


def test_infer_mode_runs_on_merged_weights_and_gives_them_back(model, stock):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = len(model._state_dict_pre_hooks)
    with af.apply_to_sd3(model, mode="infer") as patch, torch.no_grad():
        assert patch.replaced["lora"] == 23
        merged = model.transformer_blocks[1].attn.to_q.base_layer.weight
        assert not torch.equal(merged, state["transformer_blocks.1.attn.to_q.base_layer.weight"])
        assert_same([model(**inputs(), return_dict=False)[0]], stock[:1])
    assert len(model._state_dict_pre_hooks) == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for one, other in zip(run(model, inputs()), stock, strict=True):
        assert torch.equal(one, other)


def test_infer_mode_leaves_two_adapters_unmerged_and_says_so():
    two = tiny()
    two.add_adapter(adapters(2), adapter_name="second")
    two.set_adapter(["default", "second"])
    expected = run(two, inputs())
    with af.apply_to_sd3(two, mode="infer") as patch:
        assert patch.kept == {"merged weights": "2 adapters are active, and exactly one can be merged"}
        assert_same(run(two, inputs()), expected)


def test_bfloat16_is_no_further_from_float64_than_stock(model):
    half, exact = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().double()
    given = inputs(torch.bfloat16)
    truth = run(exact, {name: tensor.double() for name, tensor in given.items()})
    theirs = [relative_error(a, b) for a, b in zip(run(half, given), truth, strict=True)]
    with af.apply_to_sd3(half) as patch:
        ours = [relative_error(a, b) for a, b in zip(run(half, given), truth, strict=True)]
        assert patch.replaced["qk_norm"] == 4
    assert ours[0] <= HALF_PRECISION_RATIO * theirs[0]
    # Single gradients of a few hundred numbers scatter; together they are thousands.
    assert sum(e**2 for e in ours) ** 0.5 <= HALF_PRECISION_RATIO * sum(e**2 for e in theirs) ** 0.5


def test_autocast_over_a_float32_base(model):
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        theirs = run(model, inputs())
        with af.apply_to_sd3(model):
            ours = run(model, inputs())
    truth = run(copy.deepcopy(model).double(), {name: tensor.double() for name, tensor in inputs().items()})
    errors = [[relative_error(a, b) ** 2 for a, b in zip(each, truth, strict=True)] for each in (ours, theirs)]
    assert sum(errors[0]) ** 0.5 <= HALF_PRECISION_RATIO * sum(errors[1]) ** 0.5


def test_two_blocks_of_full_width():
    full = transformer(2, 24, 64)
    given = inputs(side=2)
    stock = run(full, given)
    with af.apply_to_sd3(full) as patch:
        assert patch.replaced == {"adaln": 2, "gate": 2, "gelu": 2, "qk_norm": 3, "lora": 15}
        assert_same(run(full, given), stock)
    assert_same(run(full, given), stock, 0.0)


def test_full_fine_tuning():
    full = tiny(lora=False).requires_grad_(True)
    stock = run(full, inputs())
    with af.apply_to_sd3(full) as patch:
        assert "lora" not in patch.replaced
        assert_same(run(full, inputs()), stock)


def test_classes_and_every_model_made_of_them(model, stock):
    with af.apply_to_sd3() as patch:
        assert set(patch.replaced) == {"qk_norm", "adaln", "gate", "gelu", "lora"}
        with RecordedOps() as recorded:
            assert_same(run(model, inputs()), stock)
        assert recorded.calls
        with pytest.raises(ValueError, match="JointTransformerBlock is patched already"):
            af.apply_to_sd3()
    for one, other in zip(run(model, inputs()), stock, strict=True):
        assert torch.equal(one, other)


def test_inside_peft_and_gradient_checkpointing():
    base = tiny(lora=False)
    wrapped = get_peft_model(base, adapters())
    stock, saved = run(wrapped, inputs()), get_peft_model_state_dict(wrapped)
    base.enable_gradient_checkpointing()
    with af.apply_to_sd3(wrapped):
        assert_same(run(wrapped, inputs()), stock)
        patched = get_peft_model_state_dict(wrapped)
    assert list(patched) == list(saved) and all(torch.equal(patched[name], saved[name]) for name in saved)


def test_compiles_into_one_graph(model, stock):
    with af.apply_to_sd3(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(run(model, inputs(), compiled), stock)


def test_regional_compilation():
    regional = tiny()
    stock = run(regional, inputs())
    with af.apply_to_sd3(regional):
        regional._repeated_blocks = ["JointTransformerBlock"]  # which diffusers leaves empty for SD3
        regional.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert_same(run(regional, inputs()), stock)


def test_blocks_of_a_kind_share_what_is_compiled():
    """Six blocks of three kinds: with two attentions, with one, and the last."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    deep, counter = transformer(6, 2, 32), CompileCounterWithBackend("aot_eager")
    deep.transformer_blocks.insert(1, copy.deepcopy(deep.transformer_blocks[0]))
    stock = run(deep, inputs())
    with af.apply_to_sd3(deep, verify=False):
        for block in deep.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
        assert_same(run(deep, inputs()), stock)
    # The first block differs from the second in that nothing before it asks for gradients.
    assert counter.frame_count <= 4


def test_a_copy_of_a_patched_model_is_patched_on_its_own(stock):
    original = tiny()
    with af.apply_to_sd3(original):
        twin = copy.deepcopy(original)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.zero_()
        with RecordedOps() as recorded:
            assert_same(run(twin, inputs()), stock)
        assert recorded.calls


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(32, bias=False), "its norm_k is not a weighted RMS norm"),
        (RMSNorm(64, eps=1e-6), "its norm_k is not a norm of single heads, or has an epsilon of its own"),
        (RMSNorm(32, eps=1e-5), "its norm_k is not a norm of single heads, or has an epsilon of its own"),
        (None, "it has no norm_k"),
    ],
)
def test_other_norms_are_kept_and_said(norm, reason):
    other = tiny()
    other.transformer_blocks[2].attn.norm_k = norm
    with af.apply_to_sd3(other) as patch:
        assert patch.kept == {"transformer_blocks.2.attn": reason}


def test_a_forward_that_somebody_else_replaced_is_kept_and_said():
    other = tiny()
    block = other.transformer_blocks[1]
    block.forward = block.forward
    with af.apply_to_sd3(other) as patch:
        assert patch.kept == {"transformer_blocks.1": "its forward has been replaced already"}
        assert patch.replaced["gate"] == 2


def test_a_wrong_kernel_is_found_out_and_replaced(model, stock, monkeypatch):
    fused = _sd3_block.joint_qk_norm

    def wrong(*tensors: Tensor, **options) -> tuple[Tensor, ...]:
        q, k, v = fused(*tensors, **options)
        return 1.01 * q, k, v

    monkeypatch.setattr(_sd3_block, "joint_qk_norm", wrong)
    with af.apply_to_sd3(model), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = run(model, inputs())
        second = run(model, inputs())
    assert_same(first, stock)
    assert_same(second, stock)
    messages = [str(warning.message) for warning in said if "the fused qk_norm differs" in str(warning.message)]
    assert len(messages) == 2  # joint attention and the second attention, each once


def test_environment_switches_ops_off(model, stock, monkeypatch):
    monkeypatch.setenv("ADVFLOW_DISABLE", "qk_norm, lora")
    with af.apply_to_sd3(model) as patch:
        assert set(patch.replaced) == {"adaln", "gate", "gelu"}
    monkeypatch.setenv("ADVFLOW_DISABLE", "qknorm")
    with pytest.raises(ValueError, match="a name in ADVFLOW_DISABLE is 'qknorm'; accepted are 'qk_norm', 'adaln'"):
        af.apply_to_sd3(model)


def test_what_is_not_covered_is_kept_and_said(stock):
    other = tiny()
    other.transformer_blocks[1].attn.set_processor(FusedJointAttnProcessor2_0())
    other.transformer_blocks[2].set_chunk_feed_forward(3, dim=1)
    with af.apply_to_sd3(other) as patch:
        assert patch.kept == {
            "transformer_blocks.1.attn": "its attention processor is FusedJointAttnProcessor2_0",
            "transformer_blocks.2": "feed-forward chunking is on",
        }
        assert "kept transformer_blocks.2: feed-forward chunking is on" in str(patch)
        other.transformer_blocks[1].attn.set_processor(JointAttnProcessor2_0())
        assert_same(run(other, inputs()), stock)


def test_without_triton_the_stock_blocks_run_and_the_report_says_so(model, stock, monkeypatch):
    monkeypatch.setattr(_sd3_block._backend, "_HAS_TRITON", False)
    with af.apply_to_sd3(model, lora=False) as patch, RecordedOps() as recorded:
        assert patch.kept["blocks"].startswith("Triton does not run on")
        for one, other in zip(run(model, inputs()), stock, strict=True):
            assert torch.equal(one, other)
    assert not recorded.calls


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match="model is a Linear without JointTransformerBlocks; accepted is an SD3"):
        af.apply_to_sd3(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="verify is True; accepted are 'first' and False"):
        af.apply_to_sd3(model, verify=True)
    with pytest.raises(ValueError, match="gate is 1; accepted are True and False"):
        af.apply_to_sd3(model, gate=1)
    with pytest.raises(ValueError, match="mode is 'fast'; accepted are 'train', 'infer'"):
        af.apply_to_sd3(model, mode="fast")
    with pytest.raises(ValueError, match="mode is 'infer' without a model; accepted for the classes is 'train'"):
        af.apply_to_sd3(mode="infer")
    with af.apply_to_sd3(model), pytest.raises(ValueError, match="model is patched already"):
        af.apply_to_sd3(model)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    from torch import distributed

    store = distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    distributed.init_process_group("nccl" if KERNEL_DEVICE == "cuda" else "gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_inside_data_parallel(one_process, stock):
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(tiny())
    with af.apply_to_sd3(wrapped) as patch:
        assert patch.replaced["qk_norm"] == 4
        assert_same(run(wrapped, inputs()), stock)


@pytest.mark.parametrize("order", ["before", "after"])
def test_inside_fully_sharded_data_parallel(one_process, stock, order):
    from torch.distributed.fsdp import fully_shard

    sharded = tiny()
    if order == "before":
        af.apply_to_sd3(sharded)
    for block in sharded.transformer_blocks:
        fully_shard(block)
    fully_shard(sharded)
    if order == "after":
        af.apply_to_sd3(sharded)
    found = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in run(sharded, inputs())]
    assert_same(found, stock)
