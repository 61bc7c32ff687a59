"""Statistics of a softmax over a head, and their gradient: the raw operators, and Triton's rows beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import advflow_ext as af
from advflow_ext.kernels import linear_softmax
from advflow_ext.testing import relative_error
from tests.nn.kernel_checks import KERNEL_DEVICE
from tests.ops.token_draws import draw, mapped, value_and_gradients, wide

WEIGHTS = {"kl_weight": 0.7, "entropy_weight": 0.05}
raw = torch.ops.advflow


@pytest.fixture
def triton_rows(kernels_serve_here: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of 16 logits, several to a row; how many rows each launch had."""
    from advflow_ext.kernels import softmax_rows_triton as rows

    launched: list[int] = []
    for name in ("statistics", "gradient"):
        run = getattr(rows, name)
        monkeypatch.setattr(rows, name, lambda z, *rest, run=run: launched.append(len(z)) or run(z, *rest))
    monkeypatch.setattr(rows, "BLOCK", 16)
    return launched


@pytest.mark.parametrize("kl", ["k3", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [16, 37])
def test_triton_is_right(triton_rows, kl, dtype, vocabulary):
    call = mapped(
        draw(batch=2, tokens=4, vocabulary=vocabulary, dtype=dtype, guided=True), lambda x: x.to(KERNEL_DEVICE)
    )
    options = {**WEIGHTS, "kl": kl}
    out, grads = value_and_gradients(af.token_policy_loss, call, **options)
    cpu = mapped(wide(call), Tensor.cpu)
    exact, truths = value_and_gradients(af.reference.token_policy_loss, cpu, **options)
    # A bfloat16 head on a GPU reads and gives back bfloat16.
    allowed = 1e-2 if KERNEL_DEVICE == "cuda" and dtype == torch.bfloat16 else 1e-6
    assert abs(out.loss.item() - exact.loss.item()) <= allowed
    for grad, truth in zip(grads, truths, strict=True):
        assert relative_error(grad.cpu(), truth) <= allowed + 1.1 * relative_error(truth.to(dtype), truth)
    assert triton_rows == [4] * (6 if kl == "k3" else 4)  # a sequence, forward and backward, and of k3 the reference


@given(
    vocabulary=st.integers(1, 70),
    rows=st.integers(1, 4),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
    with_reference=st.booleans(),
    with_entropy=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_triton_and_pytorch_agree(kernels_serve_here, vocabulary, rows, scale, with_reference, with_entropy, seed):
    from advflow_ext.kernels import softmax_rows, softmax_rows_triton

    random = torch.Generator().manual_seed(seed)
    z, q = (scale * torch.randn(2, rows, vocabulary, generator=random)).to(KERNEL_DEVICE)
    others = q if with_reference else None
    tokens = torch.randint(vocabulary, (rows,), generator=random).to(KERNEL_DEVICE)
    a, b, k = torch.randn(3, rows, generator=random).to(KERNEL_DEVICE)
    live = (torch.rand(rows, generator=random) < 0.8).to(KERNEL_DEVICE)
    found = []
    for module, dtype in (
        (softmax_rows_triton, torch.float32),
        (softmax_rows, torch.float32),
        (softmax_rows, torch.float64),
    ):

        def copy(tensor: Tensor | None, dtype: torch.dtype = dtype) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype, copy=True)

        log_prob, entropy, kl = torch.full((3, rows), torch.nan, dtype=dtype, device=KERNEL_DEVICE)
        state = torch.full((4 if with_reference else 2, rows), torch.nan, dtype=dtype, device=KERNEL_DEVICE)
        of_kl = kl if with_reference else None
        module.statistics(copy(z), copy(others), tokens, log_prob, entropy, of_kl, state)
        scales = copy(a), copy(b) if with_entropy else None, copy(k) if with_reference else None
        grad = module.gradient(copy(z), copy(others), tokens, entropy, of_kl, state, *scales, live, dtype)
        assert torch.equal(grad[~live], torch.zeros_like(grad[~live]))
        found.append((log_prob, entropy, *([kl] if with_reference else []), *state, grad))
    for ours, other, truth in zip(*found, strict=True):
        size = truth.abs().amax().clamp(min=scale)
        assert (ours - truth).abs().amax() <= 1e-6 * size + 2 * (other - truth).abs().amax()


def test_triton_does_not_look_at_the_batch(triton_rows):
    call = mapped(draw(batch=3, guided=True), lambda x: x.to(KERNEL_DEVICE))
    together, grads = value_and_gradients(af.token_policy_loss, call, **WEIGHTS, kl="exact", reduction="none")
    again, more = value_and_gradients(af.token_policy_loss, call, **WEIGHTS, kl="exact", reduction="none")
    assert torch.equal(together.loss, again.loss)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, more, strict=True))


def arguments(exact: bool) -> tuple[list[Tensor | None], list[Tensor]]:
    """Of both raw operators: what they share, and what else the gradient reads."""
    call = mapped(draw(batch=2, tokens=3), lambda x: x.detach().to(KERNEL_DEVICE))
    others = [call["hidden_ref"], call["weight_ref"]] if exact else [None, None]
    shared = [call["hidden"].detach(), call["weight"].detach(), call["tokens"], *others]
    return shared, raw.token_statistics(*shared)[1:]


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_opcheck(exact):
    shared, kept = arguments(exact)
    leaves = [tensor.clone().requires_grad_() for tensor in shared[:2]]
    torch.library.opcheck(raw.token_statistics.default, (*leaves, *shared[2:]))
    incoming = torch.randn(3, 2, 3, device=KERNEL_DEVICE)
    for asked in ((True, True), (False, True), (True, False)):
        upstream = (incoming[0], incoming[1], incoming[2] if exact else None)
        torch.library.opcheck(raw.token_gradients.default, (*shared, *kept, *upstream, *asked))


def test_nothing_is_computed_that_nobody_asked_for():
    shared, kept = arguments(False)
    d_hidden, d_weight = raw.token_gradients(
        *shared, *kept, torch.ones(2, 3, device=KERNEL_DEVICE), None, None, True, False
    )
    assert d_hidden.shape == shared[0].shape and d_weight.shape == (0,)


@pytest.mark.parametrize(("tokens", "sizes"), [(5, [5]), (6, [6]), (7, [4, 3]), (13, [5, 5, 3]), (1, [1])])
def test_a_sequence_is_cut_into_equal_parts(monkeypatch, tokens, sizes):
    monkeypatch.setattr(linear_softmax, "PART", 6 * 10 + 9)
    parts = list(linear_softmax.parts_of(torch.zeros(2, tokens, 1), torch.zeros(10, 1)))
    assert [sequence for sequence, _ in parts] == [0] * len(sizes) + [1] * len(sizes)
    rows = torch.arange(tokens)
    assert [len(rows[part]) for _, part in parts] == sizes * 2
