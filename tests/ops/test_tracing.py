"""Every op where no value is at hand: fake tensors, make_fx, export, torch.func; and inference-mode tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import advflow_ext as af
from advflow_ext.doctor.every_op import NAMES, OPTIONS, RESULTS, Drawing, Inputs, leaves, run
from tests.ops.every_op import same_bits

SPACES = {"native": af, "reference": af.reference}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
each_op = pytest.mark.parametrize("name", NAMES)
WITH_GRADIENT = [name for name in NAMES if leaves(name)]


def draw(name: str) -> Inputs:
    return Drawing((4, 3, 5), torch.float32, "cpu").inputs(name)


def function_of(name: str, space: Any, inputs: Inputs) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The op as a function of its tensors alone, and the tensors."""
    keys = [key for key, value in inputs.items() if isinstance(value, Tensor)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = {**inputs, **dict(zip(keys, tensors, strict=True))}
        if name in RESULTS:
            return tuple(getattr(space, name)(**given))
        out = getattr(space, name)(**given, **OPTIONS.get(name, {}))
        return (out.loss, out.metrics.values) if name.endswith("_loss") else (out,)

    return call, [inputs[key].detach() for key in keys]


@each_space
@each_op
def test_fake_tensors_give_shapes_and_dtypes(name, space):
    inputs = draw(name)
    expected = run(name, inputs, space)
    with FakeTensorMode() as mode:
        outputs = run(name, mapped_to(mode, inputs), space)
    assert outputs.keys() == expected.keys()
    for key, value in expected.items():
        assert (outputs[key].shape, outputs[key].dtype) == (value.shape, value.dtype), key


def mapped_to(mode: FakeTensorMode, inputs: Inputs) -> Inputs:
    return {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}


# Symbols take seconds through the reference, whose losses of a family share all but their last lines.
SYMBOLS_ONCE_A_FAMILY = {"diffusion_nft_loss", "flow_awr_loss", "awm_loss", "flow_cps_loss", "grpo_guard_loss"}


def traced_with_symbols(name: str, space: str) -> Any:
    apart = space == "reference" and name in SYMBOLS_ONCE_A_FAMILY
    return pytest.param(
        name, SPACES[space], "symbolic", marks=[pytest.mark.slow] * apart, id=f"{name}-{space}-symbolic"
    )


@pytest.mark.parametrize(
    ("name", "space", "mode"),
    [
        *(
            pytest.param(name, SPACES[space], mode, id=f"{name}-{space}-{mode}")
            for name in NAMES
            for space in SPACES
            for mode in ("real", "fake")
        ),
        *(traced_with_symbols(name, space) for name in NAMES for space in SPACES),
    ],
)
def test_make_fx_traces_what_the_op_computes(name, space, mode):
    call, tensors = function_of(name, space, draw(name))
    traced = make_fx(call, tracing_mode=mode)(*tensors)
    for found, expected in zip(traced(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(found, expected)


@each_space
@each_op
def test_export_holds_what_the_op_computes(name, space):
    call, tensors = function_of(name, space, draw(name))

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            return call(*given)

    program = torch.export.export(Module(), tuple(tensors))
    for found, expected in zip(program.module()(*tensors), call(*tensors), strict=True):
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func and forward-mode differentiation


def scalar_of(name: str, space: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The op's sum as a function of the first tensor that takes a gradient."""
    inputs = draw(name)
    call, tensors = function_of(name, space, inputs)
    place = [key for key, value in inputs.items() if isinstance(value, Tensor)].index(leaves(name)[0])

    def scalar(x: Tensor) -> Tensor:
        return call(*tensors[:place], x, *tensors[place + 1 :])[0].sum()

    return scalar, tensors[place]


def gradient(scalar: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(scalar(leaf), leaf)[0]


@each_space
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_torch_func_transforms_are_served(name, space):
    scalar, x = scalar_of(name, space)
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = gradient(scalar, x)
    torch.testing.assert_close(torch.func.grad(scalar)(x), expected, rtol=1e-4, atol=1e-6)

    value, slope = torch.func.jvp(scalar, (x,), (tangent,))
    torch.testing.assert_close(value, scalar(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, (expected * tangent).sum().to(slope), rtol=1e-3, atol=1e-5)

    several = torch.stack([x, x + 0.1 * tangent])
    torch.testing.assert_close(
        torch.func.vmap(scalar)(several), torch.stack([scalar(row) for row in several]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(scalar))(several),
        torch.stack([gradient(scalar, row) for row in several]),
        rtol=1e-4,
        atol=1e-6,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Inference mode: every rollout makes its tensors there


@each_space
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_tensors_of_inference_mode_change_no_bit(name, space):
    inputs = draw(name)
    expected = run(name, inputs, space)
    with torch.inference_mode():
        made_there = {
            key: value.clone() if isinstance(value, Tensor) and key not in leaves(name) else value
            for key, value in inputs.items()
        }
    assert any(value.is_inference() for value in made_there.values() if isinstance(value, Tensor))
    assert same_bits(run(name, made_there, space), expected)


@each_op
def test_ops_run_within_inference_mode(name):
    inputs = draw(name)
    call, tensors = function_of(name, af, inputs)
    expected = call(*tensors)
    with torch.inference_mode():
        found = call(*(tensor.clone() for tensor in tensors))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
