"""The losses as modules: one for each, its options those of the function, its call the function's."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advflow_ext as af
from advflow_ext.losses import LOSSES
from advflow_ext.ops.modules import LossModule

CLASSES = [value for name in af.__all__ if isinstance(value := getattr(af, name), type)]
MODULES: dict[str, Any] = {each.loss.__name__: each for each in CLASSES if issubclass(each, LossModule)}
OPTIONS = {"reduction": "sum", "kl_weight": 0.5}
every_loss = pytest.mark.parametrize("name", LOSSES)


def tensors(name: str) -> dict[str, Any]:
    """What the loss is called with besides options, v first."""
    generator = torch.Generator().manual_seed(5)
    given: dict[str, Any] = {key: torch.randn(4, 6, generator=generator) for key in LOSSES[name].latents}
    if LOSSES[name].family == "forward":
        given["t"] = torch.tensor([0.3, 0.5, 0.7, 1.0])
    else:
        given |= {"table": af.StepTable([1.0, 0.8, 0.5, 0.2, 0.0]), "index": torch.tensor([1, 1, 2, 2])}
    given["rewards" if name == "reward_weighted_loss" else "advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    return given


def with_gradient(loss: Any, given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    v = given["v"].clone().requires_grad_()
    value = loss(**given | {"v": v}, **options).loss
    return value.detach(), torch.autograd.grad(value.sum(), v)[0]


def options_of(name: str) -> dict[str, Any]:
    """Some that are not its defaults."""
    return {"reduction": "sum", "lam": 0.5} if name == "advantage_flow_loss" else OPTIONS


def test_every_loss_has_its_module() -> None:
    public = {name for name in af.__all__ if name.endswith("_loss")}
    assert set(MODULES) == public and set(LOSSES) < public
    for name, module in MODULES.items():
        assert module.__name__.lower() == name.replace("_", "")
        assert f"advflow_ext.{name}`" in module.__doc__


@every_loss
def test_options_and_tensors_are_all_that_its_function_takes(name: str) -> None:
    options = inspect.signature(MODULES[name]).parameters
    of_function = inspect.signature(getattr(af, name)).parameters
    assert {option: of_function[option] for option in options} == dict(options)
    taken = {*options, *tensors(name)} | ({"log_prob_old"} if name == "awm_loss" else set())
    assert taken == set(of_function) and not set(options) & set(tensors(name))


@every_loss
def test_it_has_the_bits_of_its_function(name: str) -> None:
    options, given = options_of(name), tensors(name)
    module = MODULES[name](**options)
    expected = with_gradient(getattr(af, name), given, **options)
    torch.testing.assert_close(with_gradient(module, given), expected, rtol=0, atol=0)
    assert not torch.equal(expected[0], with_gradient(MODULES[name](), given)[0])
    positional = list(given.values())
    if LOSSES[name].family == "forward" and name != "reward_weighted_loss":
        positional = [given[key] for key in ("v", "x0", "noise", "t", "advantages")]
        rest = {key: value for key, value in given.items() if key.startswith("v_")}
        assert torch.equal(module(*positional, **rest).loss, expected[0])


@every_loss
def test_an_option_given_to_the_call_wins_there(name: str) -> None:
    given = tensors(name)
    module = MODULES[name](**options_of(name))
    assert module(**given, reduction="none").loss.shape == (4,) and module(**given).loss.shape == ()


@every_loss
def test_it_refuses_what_is_no_option(name: str) -> None:
    for wrong in ("clipp", LOSSES[name].latents[-1]):
        with pytest.raises(
            ValueError, match=rf"^{wrong} is no option of {MODULES[name].__name__}; accepted are .*reduct"
        ):
            MODULES[name](**{wrong: 1.0})


def test_it_is_a_module_like_others() -> None:
    module = af.FlowGRPOLoss(clip=0.2, kl_weight=0.04)
    assert repr(module) == "FlowGRPOLoss(clip=0.2, kl_weight=0.04)"
    assert not list(module.parameters()) and not module.state_dict()
    for another in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), nn.ModuleList([module])[0]):
        assert isinstance(another, af.FlowGRPOLoss) and another.options == {"clip": 0.2, "kl_weight": 0.04}


def test_a_step_of_all_transitions_is_a_number() -> None:
    given = tensors("flow_grpo_loss")
    one, each = (af.FlowGRPOLoss()(**given | {"index": index}) for index in (2, torch.full((4,), 2)))
    assert torch.equal(one.loss, each.loss)
