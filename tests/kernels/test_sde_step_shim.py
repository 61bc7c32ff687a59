"""The CUDA source of the sampler step, against fp64 PyTorch, against the CPU kernel and against itself.

Runs on the launch shim everywhere and, unchanged, on a GPU (``-m gpu``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from advflow_ext.kernels.sde_step import sde_step_op, transition_deviation_sq_op
from advflow_ext.testing import UNIT_ROUNDOFF
from tests.kernels.kernel_harness import (
    UNSUPPORTED_DTYPE,
    SdeStepKernels,
    StepInputs,
    StepOutputs,
    TransitionInputs,
    placed,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALLEST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}

property_test = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Around a warp's and a block's tile, the first split boundary, and both kinds of length.
lengths = st.one_of(
    st.integers(1, 300),
    st.integers(1, 70_000),
    st.integers(1, 8_750).map(lambda n: 8 * n),
    st.sampled_from([255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097, 4104, 8192, 65_536]),
)
seeds_of_any_size = st.integers(-(2**63), 2**63 - 1)


@st.composite
def cases(draw: st.DrawFn, drawn: bool | None = None) -> StepInputs:
    """Inputs on the CPU, tightly packed; ``drawn``: whether the noise is, None: either."""
    elements = draw(lengths)
    batch = draw(st.integers(1, 4 if elements < 5_000 else 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def latent() -> torch.Tensor:
        return torch.randn(batch, elements, generator=generator).to(draw(st.sampled_from(DTYPES)))

    c_x, c_v = 0.5 + torch.rand(batch, generator=generator), -torch.rand(batch, generator=generator)
    sigma = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0]), min_size=batch, max_size=batch)))
    inputs = StepInputs(latent(), latent(), torch.stack([c_x, c_v, sigma], 1), dtype=draw(st.sampled_from(DTYPES)))
    if drawn if drawn is not None else draw(st.booleans()):
        seeds = draw(st.lists(seeds_of_any_size, min_size=batch, max_size=batch))
        return replace(inputs, seeds=torch.tensor(seeds))
    return replace(inputs, noise=latent())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def same_step(a: StepOutputs, b: StepOutputs) -> bool:
    return all(map(same_bits, a, b))


def run(kernels: SdeStepKernels, inputs: StepInputs, offset: int = 0) -> StepOutputs:
    return StepOutputs(*(out.cpu() for out in kernels.step(inputs.on(kernels.device, offset), offset)))


def kernel_noise(kernels: SdeStepKernels, seeds: torch.Tensor, elements: int) -> torch.Tensor:
    """What the kernel draws: the step from zero with mean 0 and sigma 1."""
    zeros = torch.zeros(len(seeds), elements)
    return run(kernels, StepInputs(zeros, zeros, torch.tensor([[1.0, 1.0, 1.0]] * len(seeds)), seeds=seeds)).x_next


def check_against_truth(inputs: StepInputs, out: StepOutputs, noise: torch.Tensor, device: str) -> None:
    v, x, noise = inputs.v.double(), inputs.x.double(), noise.double()
    c_x, c_v, sigma = inputs.coef.double()[:, :, None].unbind(1)
    mean = c_x * x + c_v * v
    size = (c_x * x).abs() + (c_v * v).abs()
    noisy = sigma != 0
    expected = torch.where(noisy, mean + sigma * noise, mean)
    stored = out.x_next.double()
    one_rounding = UNIT_ROUNDOFF[inputs.dtype] * expected.abs() * 1.001 + SMALLEST[inputs.dtype]
    fp32 = 2.0**-23 * (size + sigma * noise.abs().nan_to_num())
    assert ((stored - expected).abs() <= one_rounding + fp32).all()

    # Of the latent as it is stored, whatever it was rounded to; a difference of numbers of this size, over sigma.
    eps = torch.where(noisy, (stored - mean) / sigma, 0)
    fp32 = torch.where(noisy, 2.0**-22 * (size + stored.abs()) / sigma, 0) + 2.0**-22 * eps.abs()
    assert ((out.eps.double() - eps).abs() <= fp32).all()
    assert_is_their_mean_square(inputs, out, device)


def deviations(inputs: StepInputs, out: StepOutputs) -> torch.Tensor:
    """x_next - mean as the kernel rounds it where nothing is fused, 0 of a deterministic step."""
    c_x, c_v, sigma = inputs.coef[:, :, None].unbind(1)
    deviation = out.x_next.float() - c_x * inputs.x.float() - c_v * inputs.v.float()
    return torch.where(sigma == 0, 0, deviation)


def assert_is_their_mean_square(inputs: StepInputs, out: StepOutputs, device: str) -> None:
    """Summed in float64, without rounding them in turn; on a GPU multiplications and additions are fused."""
    expected = deviations(inputs, out).double().square().mean(1)
    fused = device == "cuda"
    torch.testing.assert_close(out.deviation_sq, expected, rtol=1e-3 if fused else 1e-13, atol=1e-12 if fused else 0)


@property_test
@given(inputs=cases(), offset=st.sampled_from([0, 0, 1, 3, 8]))
def test_matches_fp64(sde_kernels: SdeStepKernels, inputs: StepInputs, offset: int) -> None:
    noise = inputs.noise
    if inputs.seeds is not None:
        noise = kernel_noise(sde_kernels, inputs.seeds, inputs.v.shape[1])
    assert noise is not None
    check_against_truth(inputs, run(sde_kernels, inputs, offset), noise, sde_kernels.device)


@property_test
@given(inputs=cases(drawn=True), offset=st.sampled_from([0, 1]))
def test_drawn_noise_is_as_good_as_given(sde_kernels: SdeStepKernels, inputs: StepInputs, offset: int) -> None:
    assert inputs.seeds is not None
    noise = kernel_noise(sde_kernels, inputs.seeds, inputs.v.shape[1])
    given_noise = replace(inputs, seeds=None, noise=noise)
    assert same_step(run(sde_kernels, inputs, offset), run(sde_kernels, given_noise, offset))


@property_test
@given(seeds=st.lists(seeds_of_any_size, min_size=1, max_size=3), elements=lengths)
@example(seeds=[0, -1, 1 - 2**63], elements=65_537)
def test_draws_what_the_cpu_kernel_draws(sde_kernels: SdeStepKernels, seeds: list[int], elements: int) -> None:
    zeros, coef = torch.zeros(len(seeds), elements), torch.tensor([[1.0, 1.0, 1.0]] * len(seeds))
    on_cpu, _, _ = sde_step_op(zeros, zeros, coef, None, torch.tensor(seeds), None)
    drawn = kernel_noise(sde_kernels, torch.tensor(seeds), elements)
    if sde_kernels.device == "cpu":
        assert torch.equal(drawn, on_cpu)
    # The same integers: with any other the normals would have nothing in common.
    torch.testing.assert_close(drawn, on_cpu, rtol=1e-6, atol=1e-7)


@property_test
@given(inputs=cases())
def test_agrees_with_the_cpu_kernel(sde_kernels: SdeStepKernels, inputs: StepInputs) -> None:
    out = run(sde_kernels, inputs)
    x_next, eps, deviation_sq = sde_step_op(inputs.v, inputs.x, inputs.coef, inputs.noise, inputs.seeds, inputs.dtype)
    if sde_kernels.device == "cpu":
        assert same_bits(out.x_next, x_next) and same_bits(out.eps, eps)
    torch.testing.assert_close(out.x_next, x_next, rtol=2 * UNIT_ROUNDOFF[inputs.dtype], atol=1e-6)
    torch.testing.assert_close(
        out.deviation_sq, deviation_sq, rtol=1e-3 if sde_kernels.device == "cuda" else 1e-6, atol=0
    )


@property_test
@given(inputs=cases(), offset=st.integers(1, 7))
def test_vector_and_scalar_paths_agree_bitwise(sde_kernels: SdeStepKernels, inputs: StepInputs, offset: int) -> None:
    whole = -(-inputs.v.shape[1] // 8) * 8
    latents = {name: getattr(inputs, name) for name in ("v", "x", "noise")}
    longer = {name: t.repeat(1, 8)[:, :whole].contiguous() for name, t in latents.items() if t is not None}
    inputs = replace(inputs, **longer)
    assert same_step(run(sde_kernels, inputs), run(sde_kernels, inputs, offset))


@property_test
@given(
    inputs=cases(),
    places=st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 4, 8]), st.sampled_from([-1, 0, 1, 3, 4, 8, 64, 4096])),
        min_size=3,
        max_size=3,
    ),
)
def test_where_the_rows_lie_does_not_change_a_bit(
    sde_kernels: SdeStepKernels, inputs: StepInputs, places: list[tuple[int, int]]
) -> None:
    strided: dict[str, Any] = {}
    for name, (offset, gap) in zip(("v", "x", "noise"), places, strict=True):
        tensor = getattr(inputs, name)
        if tensor is None:
            continue
        one_row = gap < 0  # for all
        tensor = placed(tensor[:1] if one_row else tensor, sde_kernels.device, offset, max(gap, 0)).expand_as(tensor)
        strided[name] = tensor
    dense: dict[str, Any] = {name: tensor.cpu() for name, tensor in strided.items()}
    on_device = {"coef": inputs.coef.to(sde_kernels.device)}
    if inputs.seeds is not None:
        on_device["seeds"] = inputs.seeds.to(sde_kernels.device)
    out = StepOutputs(*(part.cpu() for part in sde_kernels.step(replace(inputs, **strided, **on_device))))
    assert same_step(out, run(sde_kernels, replace(inputs, **dense)))


@property_test
@given(inputs=cases())
def test_a_row_does_not_depend_on_its_batch(sde_kernels: SdeStepKernels, inputs: StepInputs) -> None:
    together = run(sde_kernels, inputs)
    for row in range(inputs.v.shape[0]):
        alone = run(sde_kernels, inputs.rows(slice(row, row + 1)))
        assert same_step(alone, StepOutputs(*(out[row : row + 1] for out in together)))


@property_test
@given(inputs=cases(drawn=False), poison=st.sampled_from([float("nan"), float("inf")]))
def test_a_deterministic_row_never_reads_its_noise(
    sde_kernels: SdeStepKernels, inputs: StepInputs, poison: float
) -> None:
    inputs.coef[0, 2] = 0.0
    assert inputs.noise is not None
    noise = torch.cat([torch.full_like(inputs.noise[:1], poison), inputs.noise[1:]])
    out = run(sde_kernels, replace(inputs, noise=noise))
    assert same_step(out, run(sde_kernels, inputs))
    assert same_bits(out.eps[0], torch.zeros_like(out.eps[0])) and not out.deviation_sq[0]
    drawn = run(sde_kernels, replace(inputs, noise=None, seeds=torch.arange(len(noise))))
    assert same_bits(out.x_next[0], drawn.x_next[0]) and same_bits(drawn.eps[0], out.eps[0])


@property_test
@given(inputs=cases())
def test_a_bad_row_leaves_its_neighbours_alone(sde_kernels: SdeStepKernels, inputs: StepInputs) -> None:
    clean = run(sde_kernels, inputs)
    coef = inputs.coef.clone()
    coef[0] = float("nan")
    out = run(sde_kernels, replace(inputs, coef=coef))
    assert all(part[0].isnan().all() for part in out)
    assert same_step(StepOutputs(*(part[1:] for part in out)), StepOutputs(*(part[1:] for part in clean)))


@pytest.mark.parametrize("elements", [8, 5], ids=["vector", "scalar"])
def test_more_rows_than_a_grid_dimension(sde_kernels: SdeStepKernels, elements: int) -> None:
    batch = 65_536 + 3
    generator = torch.Generator().manual_seed(1)
    v, x, noise = (torch.randn(batch, elements, generator=generator) for _ in range(3))
    inputs = StepInputs(v, x, torch.rand(batch, 3, generator=generator) + 0.1, noise)
    check_against_truth(inputs, run(sde_kernels, inputs), noise, sde_kernels.device)


def test_a_long_row_keeps_its_digits(sde_kernels: SdeStepKernels) -> None:
    elements = 2**22 + 8
    generator = torch.Generator().manual_seed(2)
    v, x, noise = (torch.randn(1, elements, generator=generator) for _ in range(3))
    inputs = StepInputs(v, x, torch.tensor([[0.9, -0.1, 0.5]]), noise)
    assert_is_their_mean_square(inputs, run(sde_kernels, inputs), sde_kernels.device)


@pytest.mark.parametrize("name", ["v", "x", "noise", "dtype"])
def test_fp64_is_refused_before_anything_is_written(sde_kernels: SdeStepKernels, name: str) -> None:
    zeros = torch.zeros(2, 16, device=sde_kernels.device)
    inputs = StepInputs(zeros, zeros, torch.zeros(2, 3, device=sde_kernels.device), zeros)
    workspace, outputs = sde_kernels.buffers(inputs)
    wide: dict[str, Any] = {name: torch.float64 if name == "dtype" else zeros.double()}
    assert sde_kernels.try_step(replace(inputs, **wide), workspace, outputs) == UNSUPPORTED_DTYPE
    assert workspace.isnan().all() and all(out.isnan().all() for out in outputs)


def test_an_empty_batch_is_no_launch(sde_kernels: SdeStepKernels) -> None:
    empty = torch.zeros(0, 16)
    out = run(sde_kernels, StepInputs(empty, empty, torch.zeros(0, 3), empty))
    assert out.x_next.shape == (0, 16) and out.deviation_sq.shape == (0,)


@given(batch=st.integers(1, 10**6), elements=st.integers(1, 2**40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(batch=1, elements=2**40)
def test_workspace_is_linear_in_rows_and_small(sde_kernels: SdeStepKernels, batch: int, elements: int) -> None:
    row = sde_kernels.workspace_bytes(1, elements)
    assert sde_kernels.workspace_bytes(batch, elements) == batch * row
    assert 8 <= row <= 128 * 8


# ---------------------------------------------------------------------------------------------------------------------
# A transition that is stored


def stored(inputs: StepInputs, out: StepOutputs, **options: Any) -> TransitionInputs:
    return TransitionInputs(inputs.v, inputs.x, out.x_next, inputs.coef, **options)


@property_test
@given(inputs=cases(), offset=st.sampled_from([0, 0, 1, 3, 8]))
def test_a_stored_step_has_the_bits_of_the_step(sde_kernels: SdeStepKernels, inputs: StepInputs, offset: int) -> None:
    out = run(sde_kernels, inputs)
    given_ = stored(inputs, out).on(sde_kernels.device, offset)
    assert same_bits(sde_kernels.deviation_sq(given_).cpu(), out.deviation_sq)
    assert same_bits(sde_kernels.eps(given_, offset).cpu(), out.eps)
    if sde_kernels.device == "cpu":
        on_cpu = transition_deviation_sq_op(inputs.v, inputs.x, out.x_next, inputs.coef)
        torch.testing.assert_close(out.deviation_sq, on_cpu, rtol=1e-13, atol=0)


@property_test
@given(inputs=cases(), dtype=st.sampled_from(DTYPES), offset=st.sampled_from([0, 1, 8]), data=st.data())
def test_a_weighted_deviation_is_rounded_once(
    sde_kernels: SdeStepKernels, inputs: StepInputs, dtype: torch.dtype, offset: int, data: st.DataObject
) -> None:
    out = run(sde_kernels, inputs)
    batch = len(inputs.v)
    weight = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, -2.5, 1e-3]), min_size=batch, max_size=batch)))
    found = sde_kernels.eps(stored(inputs, out, weight=weight, dtype=dtype).on(sde_kernels.device, offset), offset)
    # Without a dtype to round to, the weight shows the deviation itself, fused or not.
    given_ = stored(inputs, out, weight=torch.ones(batch)).on(sde_kernels.device, offset)
    deviation = sde_kernels.eps(given_, offset).cpu()
    assert torch.equal(found.cpu(), (deviation * weight[:, None]).to(dtype))
    if sde_kernels.device == "cpu":
        assert torch.equal(deviation, deviations(inputs, out))


@pytest.mark.parametrize("elements", [16, 5])
def test_a_row_without_weight_or_noise_is_not_read(sde_kernels: SdeStepKernels, elements: int) -> None:
    bad = torch.full((2, elements), float("nan"))
    coef = torch.tensor([[1.0, -0.1, 0.5], [1.0, -0.1, 0.0]])
    given_ = TransitionInputs(bad, bad, bad, coef, torch.tensor([0.0, 1.0])).on(sde_kernels.device)
    assert not sde_kernels.eps(given_).any()
    assert sde_kernels.deviation_sq(given_)[1] == 0 and sde_kernels.deviation_sq(given_)[0].isnan()


@pytest.mark.parametrize("name", ["v", "x", "x_next", "dtype"])
def test_fp64_transitions_are_refused(sde_kernels: SdeStepKernels, name: str) -> None:
    zeros = torch.zeros(2, 16, device=sde_kernels.device)
    wide: dict[str, Any] = {name: torch.float64 if name == "dtype" else zeros.double()}
    given_ = replace(TransitionInputs(zeros, zeros, zeros, torch.ones(2, 3, device=sde_kernels.device)), **wide)
    with pytest.raises(AssertionError, match=f"transition_deviation returned {UNSUPPORTED_DTYPE}"):
        sde_kernels.eps(given_)
