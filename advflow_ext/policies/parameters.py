"""The parameters of a policy: where in the model they are, whether they still are, one set moved towards another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Place(NamedTuple):
    """A parameter or module, and the dictionary and key under which the model has it."""

    held: dict[str, Any]
    name: str
    thing: Any


def places_of(modules: Iterable[nn.Module]) -> list[Place]:
    """Where the parameters of `modules` and of what is in them are, each once, in their order.

    Not of those sharded already, in whose place FSDP2 puts whole ones for the time of a pass.
    """
    found: dict[nn.Parameter, Place] = {}
    for module in dict.fromkeys(inner for outer in modules for inner in outer.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_traceable_wrapper_subclass(parameter):
                found.setdefault(parameter, Place(module._parameters, name, parameter))
    return list(found.values())


def require_in_place(places: Sequence[Place], what: str) -> None:
    """Raises RuntimeError where the model has others than it had, which an optimiser was given."""
    if any(place.held.get(place.name) is not place.thing for place in places):
        raise RuntimeError(
            f"{what} are not in the model any more: fully_shard, load_state_dict(assign=True) or a change of adapters "
            "has put others there; do that first, then ask for the parameters and build the optimiser."
        )


@torch.no_grad()
def move_towards(followers: Sequence[nn.Parameter], leaders: Sequence[nn.Parameter], rho: float) -> None:
    """follower <- rho follower + (1 - rho) leader, for each pair. Raises ValueError for a rho outside [0, 1]."""
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho is {rho!r}; accepted is a number from 0 to 1.")
    torch._foreach_lerp_(tuple(followers), tuple(leaders), 1.0 - rho)
