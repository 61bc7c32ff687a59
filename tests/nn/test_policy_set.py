"""Several policies on one transformer: PEFT's own switching is the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import advflow_ext as af
from advflow_ext.nn import merged_weight

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from lora_models import inputs, layer, transformer, with_adapters  # noqa: E402
from peft import (  # noqa: E402
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

ROLES = {"learner": "one", "rollout": "two", "reference": None}
PLENTY = 2**30


def run(model: Any, arguments: tuple[Tensor, ...] | None = None) -> Tensor:
    out: Tensor = model(*(arguments or inputs()), return_dict=False)[0]
    return out.detach()


def stock_outputs(model: Any) -> dict[str, Tensor]:
    found = {}
    for role, adapter in ROLES.items():
        if adapter is None:
            model.disable_adapters()
        else:
            model.enable_adapters()
            model.set_adapter(adapter)
        found[role] = run(model)
    model.enable_adapters()
    return found


def base_weights(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def test_use_is_peft_s_switching_without_its_walk() -> None:
    model = with_adapters("one", "two")
    stock = stock_outputs(model)
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    policies = af.PolicySet(model, ROLES)
    for role in ("learner", "rollout", "reference", "rollout", "learner"):
        with policies.use(role):
            assert policies.active == role
            assert torch.equal(run(model), stock[role])
        assert policies.active == "learner"
    assert torch.equal(run(model), stock["learner"])
    policies.activate("reference")
    assert torch.equal(run(model), stock["reference"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants
    # And PEFT's own calls go on working.
    assert all(torch.equal(stock_outputs(model)[role], out) for role, out in stock.items())


def test_a_model_wrapped_by_peft() -> None:
    model = get_peft_model(transformer(), LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False))
    policies = af.PolicySet(model, {"learner": "default", "reference": None})
    with policies.use("reference"):
        out = run(model)
    with model.disable_adapter():
        assert torch.equal(out, run(model))
    assert not torch.equal(out, run(model))


def test_gradients_reach_the_policy_in_force_alone() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    for role in ("learner", "rollout"):
        for parameter in policies.parameters(role):
            parameter.requires_grad_(True)
    with torch.no_grad(), policies.use("rollout"):
        run(model)
    model(*inputs(), return_dict=False)[0].square().mean().backward()
    assert all(p.grad is not None for p in policies.parameters("learner"))
    assert all(p.grad is None for p in policies.parameters("rollout"))


def test_parameters_are_peft_s_in_the_model_s_order() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES)
    for role, adapter in ROLES.items():
        expected = [p for name, p in model.named_parameters() if f".{adapter}." in name]
        assert list(map(id, policies.parameters(role))) == list(map(id, expected))
    assert len(policies.parameters("learner")) == 22 and not policies.parameters("reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = with_adapters("one", dtype=dtype)
    layer = model.transformer_blocks[0].attn.to_q
    a, b = (layer.lora_A["one"].weight.double(), layer.lora_B["one"].weight.double())
    exact = layer.base_layer.weight.double() + layer.scaling["one"] * b @ a
    found = merged_weight(layer, "one")
    assert found.dtype == dtype and not found.requires_grad
    tolerance = torch.finfo(dtype).eps / 2 * exact.abs() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ((found.double() - exact).abs() <= tolerance).all()


def test_rounding_to_bfloat16_loses_what_the_docstring_says() -> None:
    torch.manual_seed(0)
    base = layer(features=512)
    weight = base.base_layer.weight
    found = {}
    with torch.no_grad():
        base.to(torch.bfloat16)
        for share in (4e-4, 4e-3, 4e-2):
            a, b = torch.randn(8, 512), torch.randn(512, 8)
            delta = b @ a
            factor = (share * weight.float().std() / delta.std()).item()
            base.lora_A["default"].weight.data, base.lora_B["default"].weight.data = a, b
            base.scaling["default"] = factor
            arrived = merged_weight(base, "default").float() - base.base_layer.weight.float()
            found[share] = ((arrived - factor * delta).norm() / (factor * delta).norm()).item()
    assert found == pytest.approx({4e-4: 0.9, 4e-3: 0.38, 4e-2: 0.04}, rel=0.2)


def test_without_gradients_a_policy_runs_on_merged_weights() -> None:
    model = with_adapters("one", "two")
    stock, bases = stock_outputs(model), base_weights(model)
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    with torch.no_grad():
        for role in ("learner", "rollout"):
            with policies.use(role):
                assert policies.merged
                out = run(model)
                assert not torch.equal(out, stock[role])
                torch.testing.assert_close(out, stock[role], rtol=1e-4, atol=1e-5)
            with policies.use(role, merged=False):
                assert not policies.merged and torch.equal(run(model), stock[role])
        with policies.use("reference"):
            assert not policies.merged and torch.equal(run(model), stock["reference"])
    with policies.use("rollout"):
        assert not policies.merged and torch.equal(run(model), stock["rollout"])
    with policies.use("rollout", merged=True):
        assert policies.merged
        with policies.use("reference"):
            assert torch.equal(run(model), stock["reference"])
        assert policies.merged
    assert {name: id(p) for name, p in base_weights(model).items()} == {name: id(p) for name, p in bases.items()}
    assert torch.equal(run(model), stock["learner"])


def test_merged_weights_are_made_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import advflow_ext.policy_set as module

    made: list[str] = []
    real = module.merged_weight
    monkeypatch.setattr(module, "merged_weight", lambda layer, name: (made.append(name), real(layer, name))[1])
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)

    def merges(role: str) -> int:
        made.clear()
        with torch.no_grad(), policies.use(role):
            merged = run(model)
        torch.testing.assert_close(merged, with_policy(role), rtol=1e-4, atol=1e-5)
        return len(made)

    def with_policy(role: str) -> Tensor:
        with policies.use(role, merged=False):
            return run(model)

    assert [merges(role) for role in ("learner", "rollout", "learner", "rollout")] == [11, 11, 0, 0]
    learner = policies.parameters("learner")
    for parameter in learner:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learner, lr=0.1)
    with policies.use("learner"):
        model(*inputs(), return_dict=False)[0].square().mean().backward()
    assert merges("learner") == 0
    optimizer.step()
    assert [merges("learner"), merges("rollout")] == [11, 0]
    fused = torch.optim.AdamW(learner, lr=0.1, fused=True)  # which leaves the versions as they were
    fused.step()
    assert [merges("learner"), merges("rollout")] == [11, 0]
    policies.follow("learner", "rollout", 0.5)
    assert [merges("learner"), merges("rollout")] == [0, 11]
    layer = model.transformer_blocks[0].attn.to_q
    layer.scaling["one"] = 9.0
    assert merges("learner") == 11
    with torch.no_grad():
        layer.base_layer.weight.mul_(1.5)
    assert [merges("learner"), merges("rollout")] == [11, 11]
    layer.lora_B["two"].weight.data = layer.lora_B["two"].weight.data.clone()
    assert merges("rollout") == 11
    layer.lora_B["two"].weight.data.mul_(2.0)  # what no version counter sees
    made.clear()
    policies.forget()
    assert [merges("learner"), merges("rollout")] == [11, 11]


def test_refreshed_weights_stay_where_they_were() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    addresses = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), policies.use("rollout"):
            addresses.append([layer.data_ptr() for layer in base_weights(model).values()])
        policies.follow("learner", "rollout", 0.5)
    assert addresses[0] == addresses[1]


def test_the_policy_not_used_for_longest_makes_room() -> None:
    adapters = {"a": "one", "b": "two", "c": "three"}
    model = with_adapters(*adapters.values())
    size = 11 * 32 * 32 * 4
    policies = af.PolicySet(model, adapters, merged_bytes=2 * size)
    with torch.no_grad():
        for role, held in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("b", "cb")):
            policies.activate(role)
            assert policies.merged and list(policies._cache) == [adapters[name] for name in held]
        small = af.PolicySet(model, adapters, merged_bytes=size - 1)
        small.activate("a")
        assert not small.merged
    assert small.obstacle("a") == f"Its merged weights take {size} bytes, and merged_bytes is {size - 1}."
    assert policies.obstacle("a") is None


def test_what_cannot_be_merged_runs_unmerged() -> None:
    model = with_adapters("one", use_dora=True)
    policies = af.PolicySet(model, {"learner": "one", "reference": None}, merged_bytes=PLENTY)
    assert policies.obstacle("learner") == "Adapter 'one' is DoRA."
    assert policies.obstacle("reference") == "It is the base, which has nothing to merge."
    stock = run(model)
    with torch.no_grad(), policies.use("learner"):
        assert not policies.merged and torch.equal(run(model), stock)


def test_state_dicts_hold_the_base_whatever_is_in_force() -> None:
    model = with_adapters("one", "two")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    for use in (model.state_dict, lambda: model.load_state_dict(before)):
        with torch.no_grad(), policies.use("rollout"):
            assert policies.merged
            use()
            assert not policies.merged and policies.active == "rollout"
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_saved_adapters_are_interchangeable_with_peft_s() -> None:
    model = with_adapters("one", "two")
    stock = get_peft_model_state_dict(model, adapter_name="two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    with torch.no_grad(), policies.use("rollout"):
        saved = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, adapter_name="two").items()}
        assert saved.keys() == stock.keys()
        other = with_adapters("a", "b", "c")
        set_peft_model_state_dict(other, saved, adapter_name="b")
        with af.PolicySet(other, {"base": None, "loaded": "b"}).use("loaded", merged=False):
            with policies.use("rollout", merged=False):
                assert torch.equal(run(model), run(other))
        # And the other way round: what is loaded is what merged weights are made of the next time.
        set_peft_model_state_dict(model, get_peft_model_state_dict(other, adapter_name="c"), adapter_name="two")
    other.enable_adapters()
    other.set_adapter("c")
    with torch.no_grad(), policies.use("rollout"):
        assert policies.merged
        torch.testing.assert_close(run(model), run(other), rtol=1e-4, atol=1e-5)


def test_following_is_the_moving_average() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES)
    old, new = ([p.detach().clone() for p in policies.parameters(role)] for role in ("rollout", "learner"))
    policies.follow("learner", "rollout", 0.75)
    for parameter, before, target in zip(policies.parameters("rollout"), old, new, strict=True):
        torch.testing.assert_close(parameter.detach(), 0.75 * before + 0.25 * target)
    policies.follow("learner", "rollout", 0.0)
    assert all(torch.equal(p, target) for p, target in zip(policies.parameters("rollout"), new, strict=True))
    with pytest.raises(ValueError, match="'reference' cannot follow 'learner'; accepted are two adapters of the same"):
        policies.follow("learner", "reference", 0.5)


def test_a_policy_differs_from_itself_only_by_how_it_is_run() -> None:
    model = with_adapters("one", "two", dtype=torch.bfloat16, adapter_dtype=torch.bfloat16, size=0.1)
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    table = af.StepTable([1.0, 0.7, 0.3, 0.0], stochastic_steps=[0, 1])
    x, tokens, pooled, t = inputs(torch.bfloat16, batch=6)
    grads: list[bool] = []

    def velocity(*rows: Tensor) -> Tensor:
        grads.append(torch.is_grad_enabled())
        out: Tensor = model(*rows, return_dict=False)[0]
        return out

    def check(**changes: Any) -> af.Mismatch:
        settings = {"rollout_batch": 6, "train_batch": 6, "table": table, "index": torch.tensor([0, 1] * 3)} | changes
        return policies.mismatch("rollout", velocity, (x, tokens, pooled, t), **settings)

    assert check() == (0.0, 0.0)
    assert grads == [False, True]
    merged = check(merged=True, train_batch=4)
    assert merged.velocity > 0 and merged.log_ratio > 0 and not policies.merged
    # By hand: the log-ratio of one sample, from two densities.
    with policies.use("rollout", merged=True):
        v_old = run(model, (x, tokens, pooled, t)).double()
    with policies.use("rollout", merged=False):
        v = run(model, (x, tokens, pooled, t)).double()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    found = check(merged=True, eps=eps)
    rows = table.rows(torch.tensor([0, 1] * 3), torch.float64)
    kappa_delta = rows.kappa.view(-1, 1, 1, 1) * (v - v_old)
    by_hand = torch.distributions.Normal(0.0, 1.0)
    log_ratio = (by_hand.log_prob(eps - kappa_delta) - by_hand.log_prob(eps)).flatten(1).mean(1)
    assert found.log_ratio == pytest.approx(log_ratio.abs().max().item(), rel=1e-4)
    assert found.velocity == pytest.approx((v - v_old).abs().max().item())
    with pytest.raises(ValueError, match=r"index has shape \[1\] and the steps \[2\]; accepted are 6 of the"):
        check(index=torch.tensor([2]))


@pytest.mark.parametrize(
    ("adapters", "merged_bytes", "sentence"),
    [
        ({"learner": "three"}, 0, r"adapters has 'three' for 'learner'; the model's adapters are \['one', 'two'\]"),
        ({}, 0, "adapters is empty; accepted is at least one policy"),
        (ROLES, -1, "merged_bytes is -1; accepted is 0 or more"),
    ],
)
def test_wrong_arguments_are_said(adapters: dict[str, str], merged_bytes: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        af.PolicySet(with_adapters("one", "two"), adapters, merged_bytes=merged_bytes)


def test_wrong_names_and_models_are_said() -> None:
    with pytest.raises(ValueError, match="model is a SD3Transformer2DModel without LoRA layers"):
        af.PolicySet(transformer(), ROLES)
    policies = af.PolicySet(with_adapters("one", "two"), ROLES)
    with pytest.raises(ValueError, match=r"policy is 'old'; accepted are \['learner', 'reference', 'rollout'\]"):
        policies.activate("old")


def test_merged_policies_and_the_reference_share_what_was_compiled() -> None:
    torch._dynamo.reset()
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    counter = CompileCounterWithBackend("aot_eager")
    block, (x, tokens, temb) = model.transformer_blocks[0], (torch.randn(2, n, 32) for n in (16, 5, 1))
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        for role in ("reference", "learner", "rollout"):
            with policies.use(role):
                ours, plain = compiled(x, tokens, temb[:, 0]), block(x, tokens, temb[:, 0])
            torch.testing.assert_close(ours, plain)
    assert counter.frame_count == 1
