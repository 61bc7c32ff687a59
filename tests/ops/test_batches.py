"""Every op on batches in the shapes in which trainers hold them: the numbers of the plain call, in their shape."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from advflow_ext.doctor.every_op import LATENTS, NAMES, OPTIONS, Drawing, Inputs, Outputs, run
from advflow_ext.testing.transition_strategies import TABLES
from tests.ops.every_op import same_bits
from tests.ops.transitions import SPACES

each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
each_op = pytest.mark.parametrize("name", NAMES)
B, S = 4, 3
ELEMENTS = (2, 5)


def draw(name: str) -> Inputs:
    return Drawing((B * S, *ELEMENTS), torch.float32, "cpu").inputs(name)


def is_number(name: str, key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key not in LATENTS[name]


def folded(name: str, inputs: Inputs) -> Inputs:
    """As [B, S, ...] with [B, S]."""

    def of(value: Any) -> Any:
        return value.detach().unflatten(0, (B, S)).requires_grad_(value.requires_grad)

    return {key: of(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def assert_same_in_that_shape(name: str, outputs: Outputs, plain: Outputs) -> None:
    assert outputs.keys() == plain.keys()
    for key, value in plain.items():
        expected = value if key == "metrics" else value.unflatten(0, (B, S))
        assert outputs[key].shape == expected.shape, key
        assert torch.equal(outputs[key], expected), key


@each_space
@each_op
def test_steps_of_an_image_are_so_many_samples(name: str, space: Any) -> None:
    """And what comes back of each, or as its gradient, has the shape of what went in."""
    inputs = draw(name)
    assert_same_in_that_shape(name, run(name, folded(name, inputs), space), run(name, inputs, space))


@each_space
@each_op
@pytest.mark.parametrize("ones", [(1,), (1, 1, 1)])
def test_a_number_may_have_ones_behind_it(name: str, ones: tuple[int, ...], space: Any) -> None:
    inputs = draw(name)
    shaped = {k: v.view(-1, *ones) if is_number(name, k, v) else v for k, v in inputs.items()}
    assert same_bits(run(name, shaped, space), run(name, inputs, space))


@each_space
@each_op
@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 1, 1)])
def test_a_number_an_image_stands_for_all_its_steps(name: str, shape: tuple[int, ...], space: Any) -> None:
    """Of several numbers: one alone would leave nothing to tell the steps by."""
    inputs = draw(name)
    numbers = [key for key, value in inputs.items() if is_number(name, key, value)]
    if len(numbers) < 2:
        pytest.skip("the op takes one number a sample")
    inputs[numbers[0]] = inputs[numbers[0]][:B].repeat_interleave(S)
    shaped = folded(name, inputs)
    shaped[numbers[0]] = inputs[numbers[0]][::S].view(shape)
    assert_same_in_that_shape(name, run(name, shaped, space), run(name, inputs, space))


@each_space
@pytest.mark.parametrize("name", ["advantage_flow_loss", "flow_grpo_loss", "sde_step", "transition_log_prob"])
def test_a_batch_of_steps_compiles_whole(name: str, space: Any) -> None:
    inputs = folded(name, draw(name))
    torch._dynamo.reset()
    compiled = torch.compile(getattr(space, name), fullgraph=True, backend="aot_eager")
    outputs, plain = run(name, inputs, space, compiled), run(name, inputs, space)
    for key, value in plain.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-5, atol=1e-6)


@each_space
def test_a_mean_is_over_all_steps(space: Any) -> None:
    inputs = draw("flow_grpo_loss")
    options = OPTIONS["flow_grpo_loss"]
    plain = space.flow_grpo_loss(**inputs, **options)
    shaped = space.flow_grpo_loss(**folded("flow_grpo_loss", inputs), **options)
    assert shaped.loss.dim() == 0 and torch.equal(shaped.loss, plain.loss)


@each_space
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_t_may_be_one_for_all(shape: tuple[int, ...], space: Any) -> None:
    """0-dimensional, as a scheduler holds it; of one sample in any shape of ones."""
    batch = 1 if shape else 6
    inputs = Drawing((batch, 3, 5), torch.float32, "cpu").inputs("awm_log_prob")
    t = torch.tensor(0.3)
    plain = run("awm_log_prob", {**inputs, "t": t.expand(batch).clone()}, space)
    assert same_bits(run("awm_log_prob", {**inputs, "t": t.view(shape)}, space), plain)


@each_space
def test_options_fold_with_the_rest(space: Any) -> None:
    inputs = draw("flow_grpo_loss")
    low, high = torch.linspace(0.01, 0.3, B * S), torch.linspace(0.1, 0.5, B)
    plain = space.flow_grpo_loss(**inputs, clip=(low, high.repeat_interleave(S)), reduction="none")
    shaped = folded("flow_grpo_loss", inputs)
    out = space.flow_grpo_loss(**shaped, clip=(low.view(B, S), high.view(B, 1)), reduction="none")
    assert torch.equal(out.loss, plain.loss.view(B, S)) and torch.equal(out.metrics.values, plain.metrics.values)


@each_space
def test_an_int_or_a_single_step_stands_for_all(space: Any) -> None:
    inputs = draw("flow_grpo_loss")
    whole = {**inputs, "index": torch.full((B * S,), 3)}
    plain = run("flow_grpo_loss", whole, space)
    for index in (3, torch.tensor(3), torch.tensor(3, dtype=torch.int32), torch.full((B * S,), 3, dtype=torch.int32)):
        assert same_bits(run("flow_grpo_loss", {**inputs, "index": index}, space), plain)
    shaped = folded("flow_grpo_loss", inputs)
    for index in (3, torch.tensor(3)):
        assert_same_in_that_shape("", run("flow_grpo_loss", {**shaped, "index": index}, space), plain)


def test_channels_of_one_are_no_steps() -> None:
    """[N, 1] beside [N, 1, H, W] is either, and gives the same numbers."""
    inputs = Drawing((5, 1, 4, 4), torch.float32, "cpu").inputs("flow_grpo_loss")
    shaped = {**inputs, "advantages": inputs["advantages"].view(5, 1)}
    outputs, plain = run("flow_grpo_loss", shaped), run("flow_grpo_loss", inputs)
    assert torch.equal(outputs["values"].flatten(), plain["values"])
    assert torch.equal(outputs["grad_v"], plain["grad_v"])


@each_space
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"advantages": torch.zeros(4, 2)}, r"advantages has shape \[4, 2\]; accepted is one value a sample, \[4\]"),
        ({"advantages": torch.zeros(1, 4)}, r"advantages has shape \[1, 4\]"),
        ({"advantages": torch.zeros(1, 1)}, r"advantages has shape \[1, 1\]"),
        ({"advantages": torch.tensor(0.5)}, r"advantages has shape \[\]"),
        ({"index": torch.zeros(3, 4, dtype=torch.int64)}, r"index has shape \[3, 4\]; accepted is one step a"),
        ({"index": torch.zeros(4, 1)}, r"index is torch.float32; accepted is an int64 or int32 tensor"),
        ({"clip": torch.zeros(4, 3)}, r"clip has shape \[4, 3\]; accepted are a number"),
    ],
)
def test_other_shapes_are_refused(change: dict[str, Any], sentence: str, space: Any) -> None:
    v, v_old, eps = torch.randn(3, 4, 5, 6)
    arguments = {"v": v, "v_old": v_old, "eps": eps, "table": TABLES[0], "index": 3, "advantages": torch.ones(4)}
    with pytest.raises(ValueError, match=sentence):
        space.flow_grpo_loss(**{**arguments, **change})


@each_space
def test_trainers_spellings(space: Any) -> None:
    forward = Drawing((6, 3, 5), torch.float32, "cpu").inputs("diffusion_nft_loss")
    for theirs, ours in (("positive_only", "positive"), ("negative_only", "negative"), ("one_only", "one")):
        pair = [space.diffusion_nft_loss(**forward, mode=mode, reduction="none").loss for mode in (theirs, ours)]
        assert torch.equal(*pair)
    inputs = Drawing((6, 3, 5), torch.float32, "cpu").inputs("awm_loss")
    for theirs, ours in (("Uniform", "uniform"), ("t**2", "t2")):
        pair = [space.awm_loss(**inputs, weighting=name, reduction="none").loss for name in (theirs, ours)]
        assert torch.equal(*pair)
        given = {key: inputs[key] for key in ("v", "x0", "noise", "t")}
        assert torch.equal(*(space.awm_log_prob(**given, weighting=name) for name in (theirs, ours)))
    with pytest.raises(ValueError, match=r"mode is 'all_only'; accepted are 'all', 'positive', 'negative'"):
        space.diffusion_nft_loss(**forward, mode="all_only")
    with pytest.raises(ValueError, match=r"weighting is 't\*\*3'; accepted are 'uniform', 't', 't2'"):
        space.awm_loss(**inputs, weighting="t**3")


@each_space
def test_a_number_given_twice_is_pythons_own_error(space: Any) -> None:
    v, t, A = torch.randn(2, 3), torch.full((2,), 0.5), torch.ones(2)
    for first, second in itertools.product((t, t[:, None], torch.ones(7)), repeat=2):
        with pytest.raises(TypeError, match="multiple values for argument 't'"):
            space.advantage_flow_loss(v, v, v, first, A, v_old=v, t=second)


@each_space
def test_an_argument_too_many_is_pythons_own_error(space: Any) -> None:
    v, t, A = torch.randn(2, 3), torch.full((2,), 0.5), torch.ones(2)
    for time in (t, t[:, None]):
        for more in ((v,), (v,) * 40):
            with pytest.raises(TypeError, match=f"takes 5 positional arguments but {5 + len(more)}"):
                space.advantage_flow_loss(v, v, v, time, A, *more)
