"""How the policy loss of tokens may be called: layouts, dtypes, batches, compilers, ranks; and what it refuses."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import advflow_ext as af
from advflow_ext.bench.harness.memory import peak_extra_bytes
from advflow_ext.contract.outputs import TOKEN_METRICS
from advflow_ext.kernels import linear_softmax
from advflow_ext.testing import relative_error
from tests.ops.token_draws import LEAVES, draw, mapped, naive, of_sequences, value_and_gradients, wide

WEIGHTS = {"kl_weight": 0.7, "entropy_weight": 0.05}
each_kl = pytest.mark.parametrize("kl", ["k3", "exact"])


@each_kl
def test_a_sequence_does_not_see_its_batch(kl):
    call = draw(batch=5, tokens=33, width=48, vocabulary=203, guided=True)
    options = {**WEIGHTS, "kl": kl, "reduction": "none"}
    out, grads = value_and_gradients(af.token_policy_loss, call, **options)
    again, more = value_and_gradients(af.token_policy_loss, call, **options)
    assert torch.equal(out.loss, again.loss) and torch.equal(out.metrics.values, again.metrics.values)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, more, strict=True))
    for rows in ([3], [4, 3, 0]):
        some, others = value_and_gradients(af.token_policy_loss, of_sequences(call, rows), **options)
        assert torch.equal(some.loss, out.loss[rows])
        assert torch.equal(others[0], grads[0][rows]) and torch.equal(others[2], grads[2][rows])


@each_kl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(kl, dtype):
    call = draw(batch=4, tokens=9, width=24, vocabulary=57, dtype=dtype, guided=True)
    out, grads = value_and_gradients(af.token_policy_loss, call, kl=kl, **WEIGHTS)
    exact, truths = value_and_gradients(af.reference.token_policy_loss, wide(call), kl=kl, **WEIGHTS)
    assert out.loss.dtype == torch.float32 and abs(out.loss.item() - exact.loss.item()) < 1e-6
    for grad, truth in zip(grads, truths, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, truth) <= 1e-6 + relative_error(truth.to(dtype), truth)


def test_dtypes_mix():
    call = draw()
    call["weight"] = call["weight"].detach().bfloat16().requires_grad_()
    call["hidden_ref"] = call["hidden_ref"].half()
    call["tokens"] = call["tokens"].int()
    out, grads = value_and_gradients(af.token_policy_loss, call, kl="exact", **WEIGHTS)
    exact, truths = value_and_gradients(af.reference.token_policy_loss, wide(call), kl="exact", **WEIGHTS)
    assert abs(out.loss.item() - exact.loss.item()) < 1e-6 and relative_error(grads[0], truths[0]) < 1e-6
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16]
    call["weight_ref"] = call["weight_ref"].double()
    assert af.token_policy_loss(**call, kl="exact").loss.dtype == torch.float64


def test_strides_do_not_matter():
    call = draw(guided=True)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.T.contiguous().T
        spread = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        spread[..., 1::2] = tensor
        return spread[..., 1::2]

    out, grads = value_and_gradients(af.token_policy_loss, call, **WEIGHTS)
    other, others = value_and_gradients(af.token_policy_loss, mapped(call, apart), **WEIGHTS)
    assert abs(other.loss.item() - out.loss.item()) < 1e-6
    assert all(relative_error(grad, each) < 1e-6 for grad, each in zip(others, grads, strict=True))


def test_no_sequences_are_no_error():
    call = of_sequences(draw(guided=True), slice(0, 0))
    for space in (af, af.reference):
        out, grads = value_and_gradients(space.token_policy_loss, call, kl="exact", **WEIGHTS)
        assert out.loss == 0 and out.metrics.as_dict()["ratio_max"] == 1
        assert [grad.shape for grad in grads] == [call[name].shape for name in LEAVES] and not grads[1].any()


def test_reductions_and_metrics():
    call = draw(batch=6)
    call["mask"] = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.8
    call["mask"][:, 0] = True
    each = naive(**wide(call), **WEIGHTS)
    losses = {name: af.token_policy_loss(**call, **WEIGHTS, reduction=name).loss for name in ("mean", "sum", "none")}
    assert relative_error(losses["none"], each) < 1e-6
    assert losses["mean"].item() == pytest.approx(losses["sum"].item() / 6) == pytest.approx(each.mean().item())

    found = af.token_policy_loss(**call, **WEIGHTS, level="token", clip=0.05).metrics.as_dict()
    assert tuple(found) == TOKEN_METRICS
    exact = wide(call)
    logits = exact["hidden"].detach() @ exact["weight"].detach().T
    log_ratio = logits.log_softmax(-1).gather(-1, call["tokens"][..., None])[..., 0] - exact["log_prob_old"]
    rows = [row[keep] for row, keep in zip(log_ratio, call["mask"], strict=True)]
    share = call["mask"] / call["mask"].sum(1, keepdim=True) / 6

    def mean(values: torch.Tensor) -> float:
        return float((share * values).sum())

    assert found["mean_log_ratio"] == pytest.approx(sum(float(row.mean()) for row in rows) / 6, abs=1e-6)
    assert found["approx_kl"] == pytest.approx(mean(log_ratio.square() / 2), rel=1e-5)
    assert found["ratio_mean"] == pytest.approx(mean(log_ratio.exp()), rel=1e-6)
    assert found["max_abs_log_ratio"] == pytest.approx(float(torch.cat(rows).abs().max()), rel=1e-5)
    above, below = log_ratio.exp() > 1.05, log_ratio.exp() < 0.95
    assert found["clipped_above"] == pytest.approx(mean(above.double())) and found["clipped_above"] > 0
    clipped = [(above & (A > 0)[:, None]) | (below & (A < 0)[:, None]) for A in call["advantages"]]
    assert found["clipped_fraction"] == pytest.approx(sum(mean(part.double()) for part in clipped) / 2)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert found["mean_entropy"] == pytest.approx(mean(entropy), rel=1e-6)
    assert found["mean_advantage"] == pytest.approx(float(sum(call["advantages"]).mean()), rel=1e-6)


def test_options_of_a_sequence():
    call = draw(reference=True)
    clips, weights, entropies = torch.tensor([0.2, 0.01, 0.05]), torch.tensor([0.1, 0.0, 2.0]), torch.rand(3)
    options = {"clip": (clips, 2 * clips), "kl_weight": weights, "entropy_weight": entropies}
    together = af.token_policy_loss(**call, **options, reduction="none").loss
    for b in range(3):
        clip = (clips[b].item(), 2 * clips[b].item())
        own = {"clip": clip, "kl_weight": weights[b].item(), "entropy_weight": entropies[b].item()}
        alone = af.token_policy_loss(**of_sequences(call, [b]), **own).loss
        torch.testing.assert_close(together[b], alone)


def test_autocast_changes_nothing():
    call = draw()
    out, grads = value_and_gradients(af.token_policy_loss, call, kl="exact", **WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        other, others = value_and_gradients(af.token_policy_loss, call, kl="exact", **WEIGHTS)
    assert torch.equal(out.loss, other.loss)
    assert all(torch.equal(grad, each) for grad, each in zip(grads, others, strict=True))


@pytest.mark.parametrize(("kl", "level"), [("exact", "token"), pytest.param("k3", "sequence", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(kl, level):
    torch.compiler.reset()
    call = draw(guided=True)
    leaves = [name for name in LEAVES if name in call]

    def loss(weight_of_entropy, *tensors):
        given = call | dict(zip(leaves, tensors, strict=True))
        out = af.token_policy_loss(**given, kl=kl, level=level, kl_weight=0.7, entropy_weight=weight_of_entropy)
        return out.loss, out.metrics.values

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = [call[name] for name in leaves]
    for weight in (0.05, 0.02):  # as a controller changes it
        found, expected = compiled(weight, *tensors), loss(weight, *tensors)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        pairs = (torch.autograd.grad(each[0], tensors) for each in (found, expected))
        torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-7)


def test_where_no_value_is_at_hand():
    call = draw()
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor)]

    def loss(*tensors):
        out = af.token_policy_loss(**call | dict(zip(names, tensors, strict=True)), kl="exact", **WEIGHTS)
        return out.loss, out.metrics.values

    tensors = [call[name].detach() for name in names]
    torch.testing.assert_close(make_fx(loss)(*tensors)(*tensors), loss(*tensors))
    mode = FakeTensorMode()
    fake = mapped(call, mode.from_tensor)
    with mode:
        out, grads = value_and_gradients(af.token_policy_loss, fake, kl="exact", **WEIGHTS)
    assert out.loss.shape == () and out.metrics.values.shape == (len(TOKEN_METRICS),)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(call[n].shape, torch.float32) for n in LEAVES[:2]]

    class Module(torch.nn.Module):
        def forward(self, *given):
            return loss(*given)

    program = torch.export.export(Module(), tuple(tensors))
    torch.testing.assert_close(program.module()(*tensors), loss(*tensors))


def test_transforms_of_torch_func_are_served():
    call = draw(several=False)
    hidden = call["hidden"].detach()

    def loss(x):
        return af.token_policy_loss(**call | {"hidden": x}, **WEIGHTS).loss

    _, (expected, _) = value_and_gradients(af.token_policy_loss, call, **WEIGHTS)
    torch.testing.assert_close(torch.func.grad(loss)(hidden), expected)
    _, slope = torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused():
    call = draw()
    loss = af.token_policy_loss(**call, **WEIGHTS).loss
    (grad,) = torch.autograd.grad(loss, call["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"have one derivative, and a second is asked for"):
        grad.sum().backward()


def test_it_is_a_module_too():
    call = draw()
    module = af.TokenPolicyLoss(**WEIGHTS, level="token")
    expected = af.token_policy_loss(**call, **WEIGHTS, level="token").loss
    assert torch.equal(module(**call).loss, expected) and not torch.equal(module(**call, clip=0.01).loss, expected)
    with pytest.raises(ValueError, match="mask is no option of TokenPolicyLoss; accepted are guidance, level"):
        af.TokenPolicyLoss(mask=None)


def test_tensors_of_inference_mode_are_taken():
    with torch.inference_mode():
        call = mapped(draw(), torch.clone)
    call["weight"] = call["weight"].detach().clone().requires_grad_()
    out = af.token_policy_loss(**call, kl="exact", **WEIGHTS)
    out.loss.backward()
    assert call["weight"].grad.any()
    with torch.inference_mode():
        torch.testing.assert_close(af.token_policy_loss(**call, kl="exact", **WEIGHTS).loss, out.loss.detach())


def test_tokens_outside_of_the_vocabulary_are_counted_where_they_cannot_be_read():
    call = draw()
    call["tokens"][1, 3] = 19
    compiled = torch.compile(lambda **given: af.token_policy_loss(**given, reduction="none"), backend="eager")
    out = compiled(**call)
    assert out.metrics.as_dict()["invalid_sequences"] == 1 and out.loss[1] == 0 and out.loss[0] != 0


def test_logits_of_a_few_tokens_exist_at_once(monkeypatch):
    monkeypatch.setattr(linear_softmax, "PART", 2**15)
    call = draw(batch=16, tokens=64, width=16, vocabulary=2048, several=False)
    logits = 4 * 16 * 64 * 2048

    def peak(loss: Any, **options: Any) -> int:
        def step() -> Any:
            return value_and_gradients(loss, call, **WEIGHTS, **options)[1]

        return peak_extra_bytes(step, torch.device("cpu"))

    assert peak(af.token_policy_loss, kl="exact") < logits / 8 < 4 * logits < peak(af.reference.token_policy_loss)


RANKS = """
import sys, torch
from torch import distributed, nn
import advflow_ext as af
from tests.ops.token_draws import draw, of_sequences
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 19, bias=False)
    def forward(self, states):
        return self.body(states), self.head.weight
def gradients(policy, call):
    hidden, head = policy(call.pop("hidden").detach())
    del call["weight"]
    af.token_policy_loss(hidden, head, **call, kl_weight=0.7, entropy_weight=0.05).loss.backward()
    return [parameter.grad for parameter in policy.parameters()]
call = draw(batch=6)
whole = gradients(Policy(), dict(call))
ours = gradients(nn.parallel.DistributedDataParallel(Policy()), of_sequences(call, slice(3 * rank, 3 * rank + 3)))
theirs = [torch.empty_like(grad) for grad in ours]
for mine, other in zip(ours, theirs):
    both = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(both, mine)
    assert torch.equal(*both)
for mine, alone in zip(ours, whole):
    torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-7)
print("alike", sum(float(grad.abs().sum()) for grad in ours) > 0)
"""


def test_ranks_have_one_gradient_that_of_the_whole_batch(tmp_path):
    """Trap 1 of the released trainer: there each rank went its own way."""
    command = [sys.executable, "-c", RANKS]
    jobs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    assert [job.communicate(timeout=120)[0] for job in jobs] == ["alike True\n"] * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": torch.zeros(3, 8)}, r"hidden has shape \[3, 8\]; accepted is \[B, T, H\]"),
        ({"hidden": torch.zeros(3, 0, 8)}, r"hidden has shape \[3, 0, 8\]; .* at least one token"),
        ({"hidden": torch.zeros(3, 5, 8, dtype=torch.int32)}, "hidden has dtype torch.int32; accepted are float32"),
        ({"weight": torch.zeros(19, 7)}, r"weight has shape \[19, 7\]; accepted is \[V, 8\], .* width of hidden"),
        (
            {"tokens": torch.zeros(3, 4, dtype=torch.int64)},
            r"tokens has shape \[3, 4\]; .* one value a token, \[3, 5\]",
        ),
        ({"tokens": torch.zeros(3, 5)}, "tokens has dtype torch.float32; accepted are int64 and int32"),
        ({"tokens": torch.full((3, 5), 19)}, r"tokens\[0, 0\] is 19; accepted is 0 <= token < 19, the rows of weight"),
        ({"log_prob_old": torch.zeros(3)}, r"log_prob_old has shape \[3\]; accepted is one value a token, \[3, 5\]"),
        ({"log_prob_old": torch.zeros(3, 5).bfloat16()}, "log_prob_old has dtype torch.bfloat16; .* rounds a"),
        ({"advantages": torch.zeros(3, 1)}, r"advantages has shape \[3, 1\]; accepted is one value a sequence, \[3\]"),
        ({"advantages": (torch.zeros(3), torch.zeros(2))}, r"advantages\[1\] has shape \[2\]; .* \[3\]"),
        ({"advantages": ()}, r"advantages is empty; accepted are a tensor \[B\] and several"),
        ({"hidden_uncond": torch.zeros(3, 5, 7)}, r"hidden_uncond has shape \[3, 5, 7\]; .* the shape of hidden"),
        ({"guidance": 1.5}, "guidance is given without hidden_uncond; accepted are 1, or hidden_uncond beside it"),
        ({"hidden_ref": torch.zeros(3, 4, 8)}, r"hidden_ref has shape \[3, 4, 8\]; accepted is \[3, 5, width\]"),
        ({"weight_ref": torch.zeros(18, 8)}, "weight_ref has 18 rows; accepted is the vocabulary of weight, 19"),
        ({"weight_ref": torch.zeros(19, 9)}, r"weight_ref has shape \[19, 9\]; accepted is \[V, 8\], .* hidden_ref"),
        ({"weight_ref": None}, "weight_ref is None while weight is trained; accepted is the reference's own head"),
        ({"hidden_ref": None}, "weight_ref is given without hidden_ref; accepted is one beside it"),
        ({"log_prob_ref": torch.zeros(3, 5)}, "hidden_ref and log_prob_ref are both given; accepted is one of them"),
        (
            {"hidden_ref": None, "weight_ref": None, "kl_weight": 3.0},
            "kl_weight is 3.0 without hidden_ref or log_prob_ref; accepted are 0, or hidden_ref or log_prob_ref beside",
        ),
        (
            {"hidden_ref": None, "weight_ref": None, "log_prob_ref": torch.zeros(3, 5), "kl": "exact"},
            "kl is 'exact' without hidden_ref; accepted are 'k3', or hidden_ref beside it",
        ),
        ({"mask": torch.ones(3, 5)}, "mask has dtype torch.float32; accepted is bool, true where a token counts"),
        ({"level": "image"}, "level is 'image'; accepted are 'sequence', 'token'"),
        ({"surrogate": "min"}, "surrogate is 'min'; accepted are 'ppo', 'released'"),
        ({"kl": "k1"}, "kl is 'k1'; accepted are 'k3', 'exact'"),
        ({"reduction": "max"}, "reduction is 'max'; accepted are 'mean', 'sum', 'none'"),
        ({"clip": 1.0}, r"clip is 1.0; accepted is a number of at least 0 and below 1"),
        ({"kl_weight": -1.0}, r"kl_weight is -1.0; accepted is a finite number of at least 0"),
        ({"entropy_weight": torch.ones(2)}, r"entropy_weight has shape \[2\]; .* shape \[\] or \[3\]"),
    ],
)
def test_bad_input_gets_a_sentence(change, sentence):
    for space in (af, af.reference):
        with pytest.raises(ValueError, match=sentence):
            space.token_policy_loss(**draw() | change)


def test_tokens_that_the_mask_leaves_out_may_be_any():
    call = draw()
    call["tokens"][0, 0] = -1
    with pytest.raises(ValueError, match=r"tokens\[0, 0\] is -1; .* or a mask that leaves it out"):
        af.token_policy_loss(**call)
    af.token_policy_loss(**call, mask=call["tokens"] >= 0)
