"""What of a block a function computes, for whoever accounts for operators by where they were issued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

Part = Literal["qk_norm", "attention", "adaln", "gate", "gelu", "lora", "streams"]
Function = TypeVar("Function", bound=Callable[..., object])


def part(name: Part) -> Callable[[Function], Function]:
    """Marks a function, whose operators are then of that part; those of its inner functions too."""

    def mark(function: Function) -> Function:
        function.part = name  # type: ignore[attr-defined]
        return function

    return mark


def parts_of(*homes: object) -> dict[str, Part]:
    """The marked functions of modules and classes, by their qualified names."""
    members = (member for home in homes for member in vars(home).values())
    return {member.__qualname__: member.part for member in members if hasattr(member, "part")}
