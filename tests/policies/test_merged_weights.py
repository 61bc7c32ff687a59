"""Merged weights: right, made only when they must be, and never taken for the base's."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import advflow_ext as af
from advflow_ext.nn import merged_weight

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")


from tests.nn.lora_models import inputs, layer, with_adapters
from tests.policies.roles import PLENTY, ROLES, run, stock_outputs


def base_weights(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


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
