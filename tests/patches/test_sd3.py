"""A patched SD3 transformer is the stock one: outputs, gradients of the adapters, state dicts, before and after.

One file, for nearly every test compares the same small model, patched, with itself as it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import advflow_ext as af
from advflow_ext.kernels import triton_ops
from advflow_ext.patches import _fused
from advflow_ext.testing import relative_error
from tests.nn.kernel_checks import KERNEL_DEVICE, RecordedOps

pytest.importorskip("diffusers", reason="the trainer's dependencies are not installed")

from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from peft import get_peft_model, get_peft_model_state_dict

from tests.patches.sd3_models import adapters, assert_same, backward_nodes, inputs, run, tiny, transformer

HALF_PRECISION_RATIO = 1.5


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
    assert dict.fromkeys(state, True) == {
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


def test_no_grad_equals_grad_to_the_bit(model, stock):
    with af.apply_to_sd3(model):
        learner = run(model, inputs())[0]
        with torch.no_grad():
            rollout = model(**inputs(), return_dict=False)[0]
    assert torch.equal(learner, rollout)
    assert_same([rollout], stock[:1])


def test_projections_of_one_stream_are_one_function(model):
    """Of image and text in three blocks; after attention each layer is one, in the last block the image's alone."""
    with af.apply_to_sd3(model, verify=False):
        nodes = backward_nodes(model(**inputs(), return_dict=False)[0])
    assert nodes["_LowRankLinearsBackward"] == 3 * 2 + 3 + 2


@contextmanager
def counted_low_rank_products() -> Iterator[list[object]]:
    """What is multiplied by a matrix of four rows, as the adapters' A are."""
    seen: list[object] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_) and 4 in args[1].shape:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield seen


def test_infer_mode_runs_on_merged_weights_and_follows_the_adapters():
    model = tiny()
    plain = run(model, inputs())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def images() -> list[Tensor]:
        with torch.no_grad():
            return [model(**inputs(), return_dict=False)[0]]

    model.disable_adapters()
    base = images()
    model.enable_adapters()
    with af.apply_to_sd3(model, mode="infer") as patch:
        assert patch.replaced["lora"] == 23
        assert_same(images(), plain[:1])
        with counted_low_rank_products() as products:
            assert_same(images(), plain[:1])
        assert not products
        model.disable_adapters()
        assert_same(images(), base)
        model.enable_adapters()
        assert_same(images(), plain[:1])
        assert_same(run(model, inputs()), plain)  # asking for gradients, unmerged
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(2)
        doubled = images()
    assert_same(doubled, images())
    assert not torch.allclose(doubled[0], plain[0])


def test_infer_mode_runs_two_adapters_unmerged():
    two = tiny()
    two.add_adapter(adapters(2), adapter_name="second")
    two.set_adapter(["default", "second"])
    with torch.no_grad():
        expected = two(**inputs(), return_dict=False)[0]
        with af.apply_to_sd3(two, mode="infer"):
            assert_same([two(**inputs(), return_dict=False)[0]], [expected])


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


@pytest.fixture
def first_and_last() -> SD3Transformer2DModel:
    """Two blocks, for tracing takes seconds each: the one that attends twice and the one that ends the context."""
    return transformer(2, 2, 32)


def test_compiles_into_one_graph(first_and_last):
    stock = run(first_and_last, inputs())
    with af.apply_to_sd3(first_and_last):
        compiled = torch.compile(first_and_last, fullgraph=True, backend="aot_eager")
        assert_same(run(first_and_last, inputs(), compiled), stock)


def test_regional_compilation(first_and_last):
    regional = first_and_last
    stock = run(regional, inputs())
    with af.apply_to_sd3(regional):
        regional._repeated_blocks = ["JointTransformerBlock"]  # which diffusers leaves empty for SD3
        regional.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert_same(run(regional, inputs()), stock)


@pytest.mark.slow
def test_blocks_of_a_kind_share_what_is_compiled():
    """Five blocks of three kinds: with two attentions, with one, and the last."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    deep, counter = transformer(4, 2, 32), CompileCounterWithBackend("aot_eager")
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
        (nn.LayerNorm(32, bias=False), "its norm_k is not a weighted RMS norm, or it has hooks"),
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


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        ("norm1", "transformer_blocks.1"),
        ("norm2", "transformer_blocks.1"),
        ("norm2_context", "transformer_blocks.1"),
        ("attn", "transformer_blocks.1.attn"),
        ("attn.norm_q", "transformer_blocks.1.attn"),
        ("attn.to_q", None),
        ("attn.add_v_proj", None),
        ("ff", None),
        ("ff.net.0", None),
        ("ff.net.0.proj", None),
    ],
)
def test_hooks_inside_a_block_are_called_and_shown_what_stays(stock, part, kept):
    other, shown = tiny(), []
    module = other.transformer_blocks[1].get_submodule(part)
    module.register_forward_hook(lambda module, args, out: shown.append((out, _copy(out))))
    with af.apply_to_sd3(other) as patch, torch.no_grad():
        assert list(patch.kept) == ([kept] if kept else [])
        assert_same([other(**inputs(), return_dict=False)[0]], stock[:1])
    assert shown
    for out, as_it_was in shown:
        assert torch.equal(out if isinstance(out, Tensor) else out[0], as_it_was)


def _copy(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return (out if isinstance(out, Tensor) else out[0]).clone()


def test_a_zero_loaded_into_a_norm_later_does_no_harm():
    other = tiny()
    with af.apply_to_sd3(other):
        run(other, inputs())
        with torch.no_grad():
            other.transformer_blocks[1].attn.norm_q.weight[3] = 0
        patched = run(other, inputs())
    assert_same(patched, run(other, inputs()))


def test_a_batch_that_is_not_finite_costs_no_op_its_trust(model, stock):
    bad = inputs()
    bad["hidden_states"][0] = torch.nan
    with af.apply_to_sd3(model):
        run(model, bad)
        with RecordedOps() as recorded:
            assert_same(run(model, inputs()), stock)
    assert {"joint_qk_norm", "adaln"} <= {name for name, _ in recorded.calls}


def test_what_was_taken_back_can_be_patched_again(model, stock):
    patch = af.apply_to_sd3(model)
    twin = copy.deepcopy(model)
    patch.unapply()
    with af.apply_to_sd3(twin) as again:
        assert again.replaced["qk_norm"] == 4
        assert_same(run(twin, inputs()), stock)


def test_a_forward_that_somebody_else_replaced_is_kept_and_said():
    other = tiny()
    block = other.transformer_blocks[1]
    block.forward = block.forward
    with af.apply_to_sd3(other) as patch:
        assert patch.kept == {"transformer_blocks.1": "its forward has been replaced already"}
        assert patch.replaced["gate"] == 2


def test_a_wrong_kernel_is_found_out_and_replaced(model, stock, monkeypatch):
    fused = _fused.joint_qk_norm

    def wrong(*tensors: Tensor, **options) -> tuple[Tensor, ...]:
        q, k, v = fused(*tensors, **options)
        return 1.01 * q, k, v

    monkeypatch.setattr(_fused, "joint_qk_norm", wrong)
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
    monkeypatch.setattr(triton_ops, "_HAS_TRITON", False)
    with af.apply_to_sd3(model, lora=False) as patch, RecordedOps() as recorded:
        assert patch.kept["blocks"].startswith("Triton does not run on") and not patch.replaced
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
