"""The modulation cache changes no number, and computes the modulation of a batch once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advflow_ext as af
from advflow_ext.nn import ModulationCache, modulation

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")

from tests.nn.lora_models import inputs, transformer, with_adapters


def count_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of `F.linear` by the modules that a modulation is made in; hooks would count calls of the cache."""
    calls: Counter[str] = Counter()
    names = {id(p): name for name, p in model.named_parameters()}
    real = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        name = names.get(id(weight), "")
        if "norm" in name or "time_text_embed" in name:
            calls[name] += 1
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    return calls


@pytest.mark.parametrize("autocast", [False, True])
def test_policies_of_one_batch_share_their_modulation(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters("one", "two")
    policies = af.PolicySet(model, {"learner": "one", "rollout": "two", "reference": None})
    arguments = inputs()

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            frozen = []
            for role in ("rollout", "reference"):
                with torch.no_grad(), policies.use(role):
                    frozen.append(model(*arguments, return_dict=False)[0])
            v = model(*arguments, return_dict=False)[0]
        v.float().square().mean().backward()
        return [*frozen, v.detach(), *(p.grad for p in policies.parameters("learner") if p.grad is not None)]

    calls = count_calls(model, monkeypatch)
    stock = step()
    linears = set(calls)
    assert len(linears) == 4 + 2 * 2 + 1 and set(calls.values()) == {3}
    calls.clear()
    with ModulationCache(model):
        shared = step()
    assert set(calls) == linears and set(calls.values()) == {1}
    assert all(torch.equal(a, b) for a, b in zip(stock, shared, strict=True)) and len(stock) > 20
    assert not any("forward" in module.__dict__ for module in model.modules())
    calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(stock, step(), strict=True))
    assert set(calls.values()) == {3}


def test_it_looks_at_identity_version_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer()
    calls = count_calls(model, monkeypatch)
    x, tokens, pooled, t = inputs()
    with torch.no_grad(), ModulationCache(model, size=2):

        def computed(pooled: Tensor, t: Tensor) -> int:
            calls.clear()
            model(x, tokens, pooled, t)
            return calls["transformer_blocks.0.norm1.linear.weight"]

        assert [computed(pooled, t), computed(pooled, t)] == [1, 0]
        others = [t.clone(), t.clone()]
        assert [computed(pooled, other) for other in (others[0], t, others[1], t, others[0])] == [1, 0, 1, 0, 1]
        pooled.add_(1.0)
        assert [computed(pooled, t), computed(pooled, t)] == [1, 0]
        model.transformer_blocks[0].norm1.linear.weight.mul_(1.5)
        assert [computed(pooled, t), computed(pooled, t)] == [1, 0]


def test_inference_mode_has_results_of_its_own() -> None:
    model = with_adapters("one")
    arguments = inputs()
    with ModulationCache(model):
        with torch.inference_mode():
            model(*arguments)
        model(*arguments, return_dict=False)[0].sum().backward()


def test_what_trains_is_computed_every_time() -> None:
    model = transformer()
    linear = model.transformer_blocks[0].norm1.linear
    linear.requires_grad_(True)
    arguments = inputs()
    with ModulationCache(model):
        for _ in range(2):
            linear.zero_grad()
            model(*arguments, return_dict=False)[0].sum().backward()
            assert linear.weight.grad is not None


def test_adapters_on_the_modulation_keep_it_stock() -> None:
    model = with_adapters("one", "two", target_modules=["norm1.linear", "linear_1"])
    policies = af.PolicySet(model, {"learner": "one", "rollout": "two"})
    arguments = inputs()

    def both() -> list[Tensor]:
        found = []
        for role in ("learner", "rollout"):
            with torch.no_grad(), policies.use(role):
                found.append(model(*arguments, return_dict=False)[0])
        return found

    stock = both()
    with ModulationCache(model):
        assert all(torch.equal(a, b) for a, b in zip(stock, both(), strict=True))
    assert not torch.equal(*stock)


def test_modulation_is_silu_and_linear_with_and_without_a_cache() -> None:
    model = transformer()
    linear, emb = model.transformer_blocks[0].norm1.linear, torch.randn(3, 32)
    expected = linear(F.silu(emb))
    assert torch.equal(modulation(linear, emb), expected)
    with ModulationCache(model):
        first = modulation(linear, emb)
        assert torch.equal(first, expected) and modulation(linear, emb) is first
        assert modulation(linear, emb.clone()) is not first
        foreign = nn.Linear(32, 4)
        assert torch.equal(modulation(foreign, emb), foreign(F.silu(emb)))
        compiled = torch.compile(modulation, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(linear, emb), expected)


def test_compiled_blocks_are_left_alone() -> None:
    torch._dynamo.reset()
    model, arguments = transformer(), inputs()
    expected = model(*arguments, return_dict=False)[0]
    for block in model.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with ModulationCache(model):
        assert "forward" in model.time_text_embed.__dict__ and "forward" in model.norm_out.linear.__dict__
        assert "forward" not in model.transformer_blocks[0].norm1.linear.__dict__
        for _ in range(2):
            torch.testing.assert_close(model(*arguments, return_dict=False)[0], expected)


def test_misuse_is_said() -> None:
    with pytest.raises(ValueError, match="model is a Linear; accepted is one with a module time_text_embed"):
        ModulationCache(nn.Linear(2, 2))
    model = transformer()
    with ModulationCache(model), pytest.raises(RuntimeError, match="a ModulationCache is on already"):
        with ModulationCache(model):
            pass
