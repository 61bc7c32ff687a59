"""Several policies on one transformer: PEFT's own switching is the reference."""

from __future__ import annotations

import copy
import io
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import advflow_ext as af
from advflow_ext.nn import merged_weight

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from tests.nn.lora_models import fill, inputs, layer, transformer, with_adapters

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
    import advflow_ext.policies.merged_weights as module

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
            assert policies.merged and list(policies._weights._held) == [adapters[name] for name in held]
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


def test_a_deleted_adapter_is_said_and_nothing_runs_in_its_place() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    model.delete_adapters("two")
    sentence = r"policy 'rollout' is adapter 'two', which the model no longer has; it has \['one'\]\. Add it again"
    with pytest.raises(RuntimeError, match=sentence):
        policies.activate("rollout")
    with torch.no_grad(), pytest.raises(RuntimeError, match=sentence), policies.use("rollout"):
        pass
    assert policies.active == "learner"
    with policies.use("reference"):
        base = run(model)
    model.disable_adapters()
    assert torch.equal(base, run(model))
    model.enable_adapters()
    policies.activate("learner")
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["attn.to_q", "attn.to_k"]), "two")
    fill(model, "two", torch.float32, 0.3, 7)
    model.set_adapter("two")
    stock = run(model)
    with policies.use("rollout", merged=False):
        assert torch.equal(run(model), stock)
    with policies.use("rollout", merged=True):
        torch.testing.assert_close(run(model), stock, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'rollout' cannot follow 'learner'; accepted are two adapters of the same"):
        policies.follow("learner", "rollout", 0.5)


def test_adapters_put_elsewhere_later_are_not_in_the_reference() -> None:
    model = with_adapters("one")
    policies = af.PolicySet(model, {"learner": "one", "reference": None})
    stock = run(model)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["ff.net.2"]), "late")
    model.disable_adapters()
    base = run(model)
    model.enable_adapters()
    model.set_adapter("late")
    assert not torch.equal(run(model), base)
    with policies.use("reference"):
        assert torch.equal(run(model), base)
    with policies.use("learner"):
        assert torch.equal(run(model), stock)


def _switch_to_the_second(model: Any) -> None:
    model.set_adapter("two")


SWITCHES = {
    "disable_adapters": ("reference", lambda model: model.disable_adapters()),
    "set_adapter": ("rollout", _switch_to_the_second),
    "enable_adapters": ("learner", lambda model: model.enable_adapters()),
    "fuse_lora": ("learner", lambda model: model.fuse_lora(adapter_names=["one"])),
}


@pytest.mark.parametrize("call", SWITCHES)
def test_peft_s_own_calls_mean_what_they_mean_under_merged_weights(call: str) -> None:
    model = with_adapters("one", "two")
    stock = stock_outputs(model)
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    role, switch = SWITCHES[call]
    with torch.no_grad():
        policies.activate("learner")
        assert policies.merged
        switch(model)
        assert not policies.merged
        torch.testing.assert_close(run(model), stock[role], rtol=1e-4, atol=1e-5)
        if call == "fuse_lora":
            with pytest.raises(RuntimeError, match=r"PEFT has merged \['one'\] into the base weights"):
                policies.activate("rollout")
            model.unfuse_lora()
        for after in ROLES:
            with policies.use(after):
                torch.testing.assert_close(run(model), stock[after], rtol=1e-4, atol=1e-5)


def _of_a_copy(model: Any) -> dict[str, Tensor]:
    return dict(copy.deepcopy(model).named_parameters())


def _of_a_file(model: Any) -> dict[str, Tensor]:
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    return dict(torch.load(written, weights_only=False).named_parameters())


@pytest.mark.parametrize(
    "look",
    [
        lambda model: dict(model.named_parameters()),
        lambda model: dict(
            model.transformer_blocks[0].attn.to_q.named_parameters(prefix="transformer_blocks.0.attn.to_q")
        ),
        lambda model: dict(model.double().float().named_parameters()),
        _of_a_copy,
        _of_a_file,
    ],
)
def test_nothing_takes_merged_weights_for_the_base_s(look: Any) -> None:
    model = with_adapters("one", "two")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    stock = stock_outputs(model)
    with torch.no_grad(), policies.use("rollout"):
        assert policies.merged
        found = look(model)
        assert found and all(torch.equal(p, before[name]) for name, p in found.items())
        assert policies.active == "rollout" and not policies.merged
        assert torch.equal(run(model), stock["rollout"])


def test_a_copy_has_policies_of_its_own() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    stock = stock_outputs(model)
    with torch.no_grad(), policies.use("rollout"):
        twin, twins = copy.deepcopy((model, policies))
        with twins.use("learner"):
            assert twins.merged and not policies.merged
            torch.testing.assert_close(run(twin), stock["learner"], rtol=1e-4, atol=1e-5)
            assert torch.equal(run(model), stock["rollout"])


def test_two_sets_on_one_model_do_not_merge_twice() -> None:
    model = with_adapters("one", "two")
    stock = stock_outputs(model)
    first, second = (af.PolicySet(model, ROLES, merged_bytes=PLENTY) for _ in range(2))
    with torch.no_grad():
        first.activate("rollout")
        second.activate("learner")
        torch.testing.assert_close(run(model), stock["learner"], rtol=1e-4, atol=1e-5)
        second.activate("reference")
        assert torch.equal(run(model), stock["reference"])


def test_an_error_inside_leaves_the_policy_before() -> None:
    model = with_adapters("one", "two")
    stock = stock_outputs(model)
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    with pytest.raises(KeyError), torch.no_grad(), policies.use("rollout"), policies.use("reference"):
        raise KeyError
    assert policies.active == "learner" and torch.equal(run(model), stock["learner"])


def test_a_policy_that_cannot_be_put_in_force_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("one", "two")
    stock = stock_outputs(model)
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)

    def full(*_: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("advflow_ext.policies.merged_weights.merged_weight", full)
    with torch.no_grad(), pytest.raises(MemoryError), policies.use("rollout"):
        pass
    assert policies.active == "learner" and torch.equal(run(model), stock["learner"])


def test_a_second_thread_is_refused_while_one_is_inside() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES)
    said: list[BaseException] = []

    def elsewhere() -> None:
        try:
            policies.activate("rollout")
        except RuntimeError as error:
            said.append(error)

    with policies.use("reference"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert policies.active == "reference"
    assert str(said[0]) == "policies are in use in another thread; accepted is one thread at a time."
    policies.activate("rollout")


@pytest.mark.parametrize("rho", [float("nan"), float("inf"), 2, -1, 1.0001, True, "0.5", None])
def test_a_decay_outside_0_to_1_is_refused_and_nothing_moves(rho: Any) -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES)
    before = [p.detach().clone() for p in policies.parameters("rollout")]
    with pytest.raises(ValueError, match=re.escape(f"rho is {rho!r}; accepted is a number from 0 to 1.")):
        policies.follow("learner", "rollout", rho)
    assert all(torch.equal(p, old) for p, old in zip(policies.parameters("rollout"), before, strict=True))


def test_an_adapter_of_another_scale_or_in_other_layers_does_not_follow() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES)
    model.transformer_blocks[0].attn.to_q.scaling["two"] = 3.0
    with pytest.raises(ValueError, match="'rollout' cannot follow 'learner'"):
        policies.follow("learner", "rollout", 0.5)
    other = transformer()
    for name, target in (("one", "attn.to_q"), ("two", "attn.to_k")):
        other.add_adapter(LoraConfig(r=2, target_modules=[target]), name)
    with pytest.raises(ValueError, match="'rollout' cannot follow 'learner'"):
        af.PolicySet(other, ROLES).follow("learner", "rollout", 0.5)


def test_dropout_in_training_mode_is_not_merged_away() -> None:
    model = with_adapters("one", lora_dropout=0.5).train()
    policies = af.PolicySet(model, {"learner": "one"}, merged_bytes=PLENTY)
    assert policies.obstacle("learner") == "Adapter 'one' has a dropout, and the model is in training mode."
    with torch.no_grad():
        policies.activate("learner")
        assert not policies.merged
        model.eval()
        policies.activate("learner")
        assert policies.merged
        model.train()
        policies.activate("learner")
        assert not policies.merged


def test_parameters_that_have_been_replaced_are_said() -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, ROLES)
    policies.parameters("learner")
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    sentence = "the parameters of 'learner' are not in the model any more: fully_shard, load_state_dict"
    for use in (lambda: policies.activate("rollout"), lambda: policies.follow("learner", "rollout", 0.5)):
        with pytest.raises(RuntimeError, match=sentence):
            use()
    policies.parameters("learner")
    policies.activate("rollout")


@pytest.mark.parametrize("order", ["before", "after"])
def test_sharding_before_works_and_after_is_said(order: str, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = with_adapters("one", "two")
    stock = stock_outputs(model)
    learner, rollout = ([p.detach() for n, p in model.named_parameters() if f".{a}." in n] for a in ("one", "two"))
    expected = [0.75 * theirs + 0.25 * ours for theirs, ours in zip(rollout, learner, strict=True)]
    policies = af.PolicySet(model, ROLES, merged_bytes=PLENTY)
    if order == "after":
        policies.parameters("learner")
    with torch.no_grad():
        policies.activate("rollout")
    assert policies.merged
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))  # where there is a GPU the default is a mesh of it
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if order == "after":
            with pytest.raises(RuntimeError, match="the parameters of 'learner' are not in the model any more"):
                policies.activate("learner")
            return
        given = policies.parameters("learner")
        assert {id(p) for p in given} <= {id(p) for p in model.parameters()}
        with torch.no_grad():
            for role, out in stock.items():
                with policies.use(role):
                    assert not policies.merged
                    torch.testing.assert_close(run(model), out, rtol=1e-5, atol=1e-6)
        policies.follow("learner", "rollout", 0.75)
        found = [p.full_tensor() for p in policies.parameters("rollout")]  # type: ignore[attr-defined]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"merged_bytes": float("nan")}, "merged_bytes is nan; accepted is 0 or more"),
        ({"merged_bytes": True}, "merged_bytes is True; accepted is 0 or more"),
        ({"merged_bytes": float("inf")}, "merged_bytes is inf; accepted is 0 or more"),
        ({"adapters": ["one"]}, "adapters is a list; accepted is at least one policy"),
    ],
)
def test_more_wrong_arguments_are_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        af.PolicySet(with_adapters("one"), **({"adapters": {"learner": "one"}} | changes))
