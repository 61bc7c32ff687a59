"""Several policies on one transformer: PEFT's own switching is the reference."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import advflow_ext as af

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from tests.nn.lora_models import fill, inputs, transformer, with_adapters
from tests.policies.roles import PLENTY, ROLES, run, stock_outputs


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
