"""What a run goes on from: parts with a name each, whose state a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from advflow.core.sharding import own_rows
from advflow.policies import Policies

State = Mapping[str, Any]
"""Tensors, and what JSON holds, by name. Of what was sharded `load_state_dict` is given `shards.Rows`."""


class Part(Protocol):
    """A part of a run that the next iteration depends on."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None:
        """Goes on from what `state_dict` returned, bit for bit. Raises ValueError where that is another's state."""


def numbered(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """By their places, as names that sort."""
    return {f"{index:04d}": tensor for index, tensor in enumerate(tensors)}


class Weights:
    """The parameters of one policy, by their number."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def state_dict(self) -> State:
        return numbered(self._parameters)

    def load_state_dict(self, state: State) -> None:
        copy_tensors(state, self.state_dict())


class OptimizerState:
    """The moments of AdamW's every parameter, by the parameter's number; none for one that was never stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
        self._optimizer, self._parameters = optimizer, parameters

    def state_dict(self) -> State:
        return {
            f"{index:04d}.{key}": value
            for index, parameter in enumerate(self._parameters)
            for key, value in self._optimizer.state[parameter].items()
        }

    def load_state_dict(self, state: State) -> None:
        self._materialise()
        stepped = {name.split(".")[0] for name in state}
        for index, parameter in enumerate(self._parameters):
            if f"{index:04d}" not in stepped:  # every step so far was skipped
                del self._optimizer.state[parameter]
        copy_tensors(state, self.state_dict())

    def _materialise(self) -> None:
        """Makes AdamW create its state, which it does lazily: a step of size zero on zero gradients moves nothing."""
        optimizer = self._optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def weights_of(policies: Policies) -> dict[str, Part]:
    """What is learnt, by the policies' names."""
    return {"learner": Weights(policies.learner), "rollout": Weights(policies.rollout)}


@torch.no_grad()
def copy_tensors(state: State, into: State) -> None:
    """Writes the tensors of `state` over those of the same names. Raises ValueError, before any, where one differs."""
    if missing := sorted(into.keys() - state.keys()):
        raise ValueError(f"it has no {missing[0]!r} ({len(missing)} missing)")
    if unknown := sorted(state.keys() - into.keys()):
        raise ValueError(f"it has {unknown[0]!r}, which is not there ({len(unknown)} unknown)")
    for name, tensor in into.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"its {name} is {tuple(state[name].shape)}, the model's {tuple(tensor.shape)}")
    for name, tensor in into.items():
        held, rows = own_rows(tensor)
        held.copy_(state[name][rows] if tensor.dim() else state[name])
