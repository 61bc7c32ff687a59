"""The CUDA source of the loss core, against fp64 PyTorch and against itself.

Runs on the launch shim everywhere and, unchanged, on a GPU (``-m gpu``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_harness import (
    STATS,
    UNSUPPORTED_DTYPE,
    Inputs,
    ResidualKernels,
    placed,
    poisoned,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}

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


@st.composite
def cases(draw: st.DrawFn) -> tuple[Inputs, torch.Tensor]:
    """Inputs (on the CPU, tightly packed) and coefficients with some zeros."""
    elements = draw(lengths)
    batch = draw(st.integers(1, 4 if elements < 5_000 else 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor() -> torch.Tensor:
        dtype = draw(st.sampled_from(DTYPES))
        return torch.randn(batch, elements, generator=generator).to(dtype)

    def maybe() -> torch.Tensor | None:
        return tensor() if draw(st.booleans()) else None

    kind = draw(st.sampled_from(["u", "x0", "eps"]))
    noise = tensor() if kind == "x0" else None
    mix = draw(st.sampled_from([0.0, 0.1, 1.0, 2.0]))
    inputs = Inputs(tensor(), tensor(), noise, maybe(), maybe(), mix=mix, target_is_eps=kind == "eps")
    coef = torch.randn(batch, 3, generator=generator) * (torch.rand(batch, 3, generator=generator) > 0.2)
    return inputs, coef


def zeros_for_absent(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    v = inputs.v.double()
    u = inputs.target.double() if inputs.noise is None else inputs.noise.double() - inputs.target.double()
    o = v if inputs.v_old is None else inputs.v_old.double()
    p = v if inputs.v_ref is None else inputs.v_ref.double()
    return v, u, o, p


def expected_stats(inputs: Inputs) -> torch.Tensor:
    v, u, o, p = zeros_for_absent(inputs)
    absent = torch.zeros_like(v)
    if inputs.target_is_eps:
        columns = [u * (v - o), (v - o) ** 2, (v - p) ** 2, u**2, *[absent] * 4]
    elif inputs.v_old is None:
        columns = [(v - u) ** 2, absent, (v - p) ** 2, absent, (v - u).abs(), *[absent] * 3]
    else:
        mixed = [((o - u) + sign * inputs.mix * (v - o)).abs() if inputs.mix else absent for sign in (1, -1)]
        columns = [(v - u) ** 2, (v - o) ** 2, (v - p) ** 2, (o - u) ** 2, (v - u).abs(), (o - u).abs(), *mixed]
    return torch.stack(columns, dim=-1).mean(dim=1)


def expected_grad(inputs: Inputs, coef: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient and the sum of its terms' magnitudes, which bounds what fp32 can resolve of it."""
    v, u, o, p = zeros_for_absent(inputs)
    a, b, c = coef.double().unbind(1)
    first = u if inputs.target_is_eps else v - u
    terms = torch.stack([a[:, None] * first, b[:, None] * (v - o), c[:, None] * (v - p)])
    scale = 2.0 / inputs.shape[1]
    return scale * terms.sum(0), scale * terms.abs().sum(0)


def on(kernels: ResidualKernels, inputs: Inputs, offset: int = 0) -> Inputs:
    return inputs.map(lambda tensor: placed(tensor, kernels.device, offset))


def apart(kernels: ResidualKernels, inputs: Inputs, places: list[tuple[int, int]]) -> Inputs:
    """Each tensor at its own offset, its rows its own gap apart; a gap of -1 is one row for all."""
    place = iter(places)

    def of(tensor: torch.Tensor) -> torch.Tensor:
        offset, gap = next(place)
        if gap < 0:
            return placed(tensor[:1], kernels.device, offset).expand_as(tensor)
        return placed(tensor, kernels.device, offset, gap)

    return inputs.map(of)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@pytest.mark.parametrize("eps", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", [33, 64])
def test_the_upstream_gradient_multiplies_the_coefficients(kernels: ResidualKernels, length: int, eps: bool) -> None:
    v, target, v_old, v_ref = torch.randn(4, 5, length).unbind()
    inputs = on(kernels, Inputs(v, target, None, v_old, v_ref, target_is_eps=eps))
    coef = torch.randn(5, 3)
    coef[2] = 0.0
    per_row = torch.randn(5, 2)[:, 0]
    for upstream in (per_row, per_row[1], per_row[1].expand(5)):
        scaled = coef * (upstream[:, None] if upstream.dim() else upstream)
        grad = kernels.grad(inputs, coef.to(kernels.device), upstream=upstream.to(kernels.device))
        assert same_bits(grad, kernels.grad(inputs, scaled.to(kernels.device)))
    for bad in (float("nan"), float("inf")):
        per_row[2] = bad  # of the dropped row
        grad = kernels.grad(inputs, coef.to(kernels.device), upstream=per_row.to(kernels.device))
        assert grad.isfinite().all() and not grad[2].any()


@property_test
@given(case=cases(), offset=st.sampled_from([0, 0, 1, 3, 8]))
def test_statistics_match_fp64(kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor], offset: int) -> None:
    inputs, _ = case
    stats = kernels.stats(on(kernels, inputs, offset)).cpu().double()
    v, u, o, p = zeros_for_absent(inputs)
    # One element alone may be all cancellation, and <eps (v - v_old)> is a sum of both signs, so the bound has a term
    # in the size of the inputs.
    size = torch.stack([v**2, u**2, o**2, p**2]).sum(0).mean(1, keepdim=True)
    expected = expected_stats(inputs)
    small = size if inputs.target_is_eps else torch.minimum(size, size.sqrt())
    assert (stats - expected).abs().le(4e-7 * expected.abs() + 1e-7 * (1 + inputs.mix) * small).all()
    assert not stats[:, (expected == 0).all(0)].any()


@property_test
@given(case=cases(), offset=st.sampled_from([0, 0, 1, 3, 8]))
def test_gradient_matches_fp64(kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor], offset: int) -> None:
    inputs, coef = case
    grad = kernels.grad(on(kernels, inputs, offset), coef.to(kernels.device), offset).cpu()
    assert grad.dtype == inputs.v.dtype
    expected, size = expected_grad(inputs, coef)
    v, u, o, p = zeros_for_absent(inputs)
    cancellation = 2.0 / inputs.shape[1] * (coef.abs().sum(1, keepdim=True) * (v.abs() + u.abs() + o.abs() + p.abs()))
    rounding = EPS[grad.dtype] * expected.abs() + SMALLEST[grad.dtype]
    assert (grad.double() - expected).abs().le(1.001 * rounding + 4e-7 * size + 2e-7 * cancellation).all()


@property_test
@given(case=cases(), offset=st.integers(1, 7))
def test_vector_and_scalar_paths_agree_bitwise(
    kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor], offset: int
) -> None:
    inputs, coef = case
    whole = inputs.shape[1] // 8 * 8 or 8
    inputs = inputs.map(lambda tensor: tensor.repeat(1, 8)[:, :whole] if whole > tensor.shape[1] else tensor[:, :whole])
    coef = coef.to(kernels.device)
    aligned, shifted = on(kernels, inputs), on(kernels, inputs, offset)
    assert same_bits(kernels.stats(aligned), kernels.stats(shifted))
    assert same_bits(kernels.grad(aligned, coef), kernels.grad(shifted, coef, offset))
    assert same_bits(kernels.grad(aligned, coef), kernels.grad(aligned, coef, offset))


where_rows_lie = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 4, 8]), st.sampled_from([-1, 0, 1, 3, 4, 8, 64, 4096])), min_size=5, max_size=5
)


@property_test
@given(case=cases(), places=where_rows_lie)
@example(  # rows of a multiple of eight elements that begin on odd addresses, behind a first row that is aligned
    case=(Inputs(*torch.arange(5 * 3 * 16.0).view(5, 3, 16).bfloat16().unbind()), torch.ones(3, 3)),
    places=[(0, 1), (0, 4), (0, 8), (0, -1), (0, 0)],
)
def test_where_the_rows_lie_does_not_change_a_bit(
    kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor], places: list[tuple[int, int]]
) -> None:
    inputs, coef = case[0], case[1].to(kernels.device)
    strided = apart(kernels, inputs, places)
    dense = on(kernels, strided.map(lambda tensor: tensor.cpu()))
    assert same_bits(kernels.stats(strided), kernels.stats(dense))
    assert same_bits(kernels.grad(strided, coef), kernels.grad(dense, coef))


@pytest.mark.parametrize("gap", [8, 9], ids=["vector", "scalar"])
def test_rows_may_be_far_apart(kernels: ResidualKernels, gap: int) -> None:
    """Farther than 32 bits count elements; nothing but the two rows is ever touched."""
    values = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    storage = torch.empty(2**31 + 32, dtype=values.dtype, device=kernels.device)
    far = storage.as_strided((2, 16), (2**31 + gap, 1)).copy_(values)
    coef = torch.ones(2, 3, device=kernels.device)
    strided, dense = Inputs(*[far] * 5), on(kernels, Inputs(*[values] * 5))
    assert same_bits(kernels.stats(strided), kernels.stats(dense))
    assert same_bits(kernels.grad(strided, coef), kernels.grad(dense, coef))


@property_test
@given(case=cases())
def test_a_row_does_not_depend_on_its_batch(kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor]) -> None:
    inputs, coef = case
    stats = kernels.stats(on(kernels, inputs))
    grad = kernels.grad(on(kernels, inputs), coef.to(kernels.device))
    for row in range(inputs.shape[0]):
        alone = on(kernels, inputs.map(lambda tensor, row=row: tensor[row : row + 1]))
        assert same_bits(kernels.stats(alone), stats[row : row + 1])
        assert same_bits(kernels.grad(alone, coef[row : row + 1].to(kernels.device)), grad[row : row + 1])


@property_test
@given(case=cases(), poison=st.sampled_from([float("nan"), float("inf")]))
def test_a_zero_coefficient_hides_whatever_its_tensor_holds(
    kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor], poison: float
) -> None:
    inputs, coef = case
    for column, name in enumerate(["target", "v_old", "v_ref"]):
        if getattr(inputs, name) is None:
            continue
        # The other coefficients stay, or the whole row would be skipped and the term never formed.
        without = coef.clone()
        without[:, column] = 0.0
        spoiled: dict[str, Any] = {name: torch.full_like(getattr(inputs, name), poison)}
        poisoned_inputs = replace(inputs, **spoiled)
        clean = kernels.grad(on(kernels, inputs), without.to(kernels.device))
        assert same_bits(kernels.grad(on(kernels, poisoned_inputs), without.to(kernels.device)), clean)


@property_test
@given(case=cases())
def test_a_dropped_row_is_exact_zero_and_leaves_its_neighbours_alone(
    kernels: ResidualKernels, case: tuple[Inputs, torch.Tensor]
) -> None:
    inputs, coef = case
    clean = kernels.grad(on(kernels, inputs), coef.to(kernels.device))
    stats = kernels.stats(on(kernels, inputs))
    coef = coef.clone()
    coef[0] = 0.0

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.full_like(tensor[:1], float("nan")), tensor[1:]])

    spoiled = on(kernels, inputs.map(spoil))
    grad = kernels.grad(spoiled, coef.to(kernels.device))
    assert same_bits(grad[:1], torch.zeros_like(grad[:1]))
    assert same_bits(grad[1:], clean[1:])
    assert same_bits(kernels.stats(spoiled)[1:], stats[1:])
    assert kernels.stats(spoiled)[0].isnan().any()


def negated(kernels: ResidualKernels, values: torch.Tensor, dtype: torch.dtype, elements: int) -> torch.Tensor:
    """``-values`` by way of the gradient of v = 0, in rows of a power of two so that the store alone can round."""
    rows = torch.nn.functional.pad(values, (0, -values.numel() % elements)).view(-1, elements)
    inputs = on(kernels, Inputs(v=torch.zeros(rows.shape, dtype=dtype), target=rows))
    coef = torch.tensor([elements / 2, 0.0, 0.0], device=kernels.device).repeat(rows.shape[0], 1)
    return kernels.grad(inputs, coef).cpu().view(-1)[: values.numel()]


def all_values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("elements", [8, 2], ids=["vector", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_read_exactly(kernels: ResidualKernels, dtype: torch.dtype, elements: int) -> None:
    values = all_values(dtype)
    values = values[~(values.isfinite() & (values.double().abs() > torch.finfo(torch.float32).max / elements))]
    read = -negated(kernels, values, torch.float32, elements)
    assert torch.equal(read.isnan(), values.isnan())
    assert torch.equal(read[~read.isnan()], values.float()[~values.isnan()])


@pytest.mark.parametrize("elements", [8, 2], ids=["vector", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stores_round_to_nearest_even(kernels: ResidualKernels, dtype: torch.dtype, elements: int) -> None:
    exact = all_values(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    halfway = exact[:-1] / 2 + exact[1:] / 2
    random = torch.randint(-(2**31), 2**31 - 1, (2**15,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([65_519.0, 65_520.0, 65_536.0, torch.finfo(torch.float32).max, 0.0])
    values = torch.cat(
        [halfway, halfway.nextafter(exact[1:]), halfway.nextafter(exact[:-1]), random.int().view(torch.float32), edges]
    )
    values = values[values.double().abs() <= torch.finfo(torch.float32).max * 2 / elements]
    stored = negated(kernels, values, dtype, elements)
    assert torch.equal(stored, (-values).to(dtype))


@pytest.mark.parametrize("elements", [8, 5], ids=["vector", "scalar"])
def test_more_rows_than_a_grid_dimension(kernels: ResidualKernels, elements: int) -> None:
    batch = 65_536 + 3
    generator = torch.Generator().manual_seed(1)
    inputs = Inputs(*(torch.randn(batch, elements, generator=generator) for _ in range(2)))
    coef = torch.randn(batch, 3, generator=generator)
    assert torch.allclose(kernels.stats(on(kernels, inputs)).cpu().double(), expected_stats(inputs), rtol=1e-5)
    grad = kernels.grad(on(kernels, inputs), coef.to(kernels.device)).cpu().double()
    assert torch.allclose(grad, expected_grad(inputs, coef)[0], atol=1e-5)


@pytest.mark.parametrize("target_is_eps", [False, True], ids=["forward", "reverse"])
def test_a_long_row_keeps_its_digits(kernels: ResidualKernels, target_is_eps: bool) -> None:
    elements = 2**22 + 8
    generator = torch.Generator().manual_seed(2)
    inputs = Inputs(*(torch.randn(1, elements, generator=generator) for _ in range(5)), mix=0.5)
    if target_is_eps:
        inputs = replace(inputs, noise=None, target_is_eps=True)
    expected = expected_stats(inputs)
    # <eps (v - v_old)> is near zero here; what it must resolve is a log-ratio beside terms of this size.
    size = torch.where(expected.abs() < 0.01, 1.0, expected)
    error = ((kernels.stats(on(kernels, inputs)).cpu().double() - expected) / size).abs().max()
    assert error <= 3e-7


@pytest.mark.parametrize("name", ["v", "target", "noise", "v_old", "v_ref"])
def test_fp64_is_refused_before_anything_is_written(kernels: ResidualKernels, name: str) -> None:
    wide: dict[str, Any] = {name: torch.zeros(2, 16, dtype=torch.float64)}
    inputs = on(kernels, replace(Inputs(*[torch.zeros(2, 16)] * 5), **wide))
    workspace = poisoned(kernels.workspace_bytes(2, 16) // 4, torch.float32, kernels.device)
    out = poisoned(64, torch.float32, kernels.device)
    assert kernels.try_stats(inputs, workspace, out) == UNSUPPORTED_DTYPE
    assert kernels.try_grad(inputs, torch.zeros(2, 3, device=kernels.device), out) == UNSUPPORTED_DTYPE
    assert out.isnan().all() and workspace.isnan().all()


def test_an_empty_batch_is_no_launch(kernels: ResidualKernels) -> None:
    inputs = Inputs(torch.zeros(0, 16, device=kernels.device), torch.zeros(0, 16, device=kernels.device))
    assert kernels.stats(inputs).shape == (0, STATS)
    assert kernels.grad(inputs, torch.zeros(0, 3, device=kernels.device)).shape == (0, 16)


@given(batch=st.integers(1, 10**6), elements=st.integers(1, 2**40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(batch=1, elements=2**40)
def test_workspace_is_linear_in_rows_and_small(kernels: ResidualKernels, batch: int, elements: int) -> None:
    row = kernels.workspace_bytes(1, elements)
    assert kernels.workspace_bytes(batch, elements) == batch * row
    assert 4 * STATS <= row <= 128 * 4 * STATS
