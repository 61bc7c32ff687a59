"""Replacing a trainer's functions by name, wherever they were imported to, and putting them back."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Function = Callable[..., Any]


class Replacement(NamedTuple):
    """A function of a module, or a method that a class itself defines, and what takes its place."""

    owner: ModuleType | type
    name: str
    function: Function


class _Kept(NamedTuple):
    owner: ModuleType | type
    name: str
    original: object  # as the owner holds it: a static method is not the function that a call finds
    replacement: object


def find_module(trainer: str, name: str) -> ModuleType:
    """The trainer's module, imported if it is not yet. Raises ImportError in a sentence."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{trainer} is not to be patched: {name} cannot be imported ({error}); accepted is a Python that finds it, "
            f"such as one started in {trainer}'s checkout."
        ) from error


def imported_modules() -> list[ModuleType]:
    return [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]


def signature_of(function: Function) -> str:
    """``(self, x, level=0.7)``: names, kinds and defaults; annotations, which change nothing, are left out."""
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(plain))


def require_signature(owner: ModuleType | type, name: str, accepted: Mapping[str, str]) -> str:
    """The signature of what is to be replaced, one of ``accepted``, which says in which commits each is found.

    Raises RuntimeError, naming what was found and what is accepted.
    """
    where = f"{name_of(owner)}.{name}"
    held = vars(owner).get(name)
    if held is None:
        raise RuntimeError(f"{where} does not exist; accepted is that of {', '.join(accepted.values())}.")
    function = getattr(owner, name)
    found = signature_of(function) if callable(function) else repr(held)
    if found not in accepted:
        known = "; ".join(f"{signature} of {commits}" for signature, commits in accepted.items())
        raise RuntimeError(f"{where} is {found}; accepted is {known}.")
    return found


def require_agreement(where: str, commits: str, results: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    """Refuses a function that computes something else than ours under a signature we know.

    ``results``: theirs and ours of one small call, by name. ``tolerance`` is relative to the largest of theirs.

    Raises RuntimeError, naming the first that differs, by how much, and the commits that are known.
    """
    for name, (theirs, ours) in results.items():
        wanted, found = theirs.detach().double().cpu(), ours.detach().double().cpu()
        if wanted.shape != found.shape:
            raise RuntimeError(
                f"{where} returns {name} {list(wanted.shape)}, ours {list(found.shape)}; accepted is that of {commits}."
            )
        off = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
        if not off <= tolerance:
            raise RuntimeError(
                f"{where} computes another {name} than that of {commits}, by {off:.2g} of its largest element; "
                "accepted is the function of those commits."
            )


def announce(trainer: str, sentence: str) -> None:
    """Says what an install changed, in the first of a launcher's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"advflow_ext in {trainer}: {sentence}", flush=True)


class Patch:
    """What of one trainer is replaced.

    A function is replaced in its owner and in every imported module that took it by value, under whatever name. What
    else holds it (a partial, a closure, a default, a container, a bound method, a decorator's result) is found through
    the garbage collector, and then nothing is replaced, since half a replacement would sample by one function and score
    by another. Out of sight are a local variable of a function that runs, TorchScript, what ``gc.freeze()`` set aside,
    and other processes: install first.
    """

    def __init__(self, trainer: str) -> None:
        self.trainer = trainer
        self._kept: list[_Kept] = []

    @property
    def installed(self) -> bool:
        return bool(self._kept)

    def replaces(self, owner: ModuleType | type, name: str) -> bool:
        """Whether what ``owner`` has under this name is ours already."""
        held = vars(owner).get(name)
        return any(kept.replacement is held for kept in self._kept)

    def original(self, owner: ModuleType | type, name: str) -> Function:
        """The trainer's own of what is replaced, for what a replacement leaves to it."""
        held = next(kept.original for kept in self._kept if kept.owner is owner and kept.name == name)
        function: Function = held.__func__ if isinstance(held, staticmethod) else held  # type: ignore[assignment]
        return function

    def replace(self, replacements: Sequence[Replacement]) -> None:
        """Replaces all or none; what is replaced already stays as it is.

        Raises RuntimeError where something holds a function out of reach.
        """
        fresh = self._in_reach(replacements)
        for owner, name, function in fresh:
            held = vars(owner)[name]
            copy = _copy(function)
            replacement = staticmethod(copy) if isinstance(held, staticmethod) else copy
            self._kept.append(_Kept(owner, name, held, replacement))
            _exchange(owner, name, held, replacement)

    def replace_anew(self, replacements: Sequence[Replacement]) -> None:
        """Replaces all of these instead of what was replaced before, or raises as :meth:`replace` and leaves that."""
        self._in_reach(replacements)
        self.restore()
        self.replace(replacements)

    def _in_reach(self, replacements: Sequence[Replacement]) -> list[Replacement]:
        """Those of what is not replaced yet."""
        fresh = [each for each in replacements if not self.replaces(each.owner, each.name)]
        for owner, name, _ in fresh:
            if late := _holders_out_of_reach(owner, vars(owner)[name]):
                raise RuntimeError(
                    f"{name_of(owner)}.{name} is held by {', '.join(late)}, out of reach, and nothing was replaced; "
                    f"accepted is an install() for {self.trainer} that runs first, before that is made."
                )
        return fresh

    def restore(self) -> None:
        """Puts every original back, also into modules that took a replacement by value; harmless when there is none.

        Warns of what else holds a replacement, which goes on working.
        """
        while self._kept:
            owner, name, original, replacement = self._kept.pop()
            _exchange(owner, name, replacement, original)
            if late := _holders_out_of_reach(owner, replacement):
                warnings.warn(
                    f"{name_of(owner)}.{name} is {self.trainer}'s own again, but {', '.join(late)}, made in between, "
                    "keeps the replacement.",
                    RuntimeWarning,
                    stacklevel=3,
                )


def _copy(function: Function) -> Function:
    """Held by nobody yet, so that a replacement found anywhere was put there."""
    written = cast(FunctionType, function)
    copy = FunctionType(
        written.__code__, written.__globals__, written.__name__, written.__defaults__, written.__closure__
    )
    copy.__kwdefaults__ = written.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy


def _exchange(owner: ModuleType | type, name: str, old: object, new: object) -> None:
    setattr(owner, name, new)
    for before, after in zip(_forms(old), _forms(new), strict=True):
        for namespace in _namespaces(before):
            for key in [key for key, value in namespace.items() if value is before]:
                namespace[key] = after


def _forms(held: object) -> list[object]:
    """What a module that imported it by value may hold: of a static method, the function."""
    return [held, held.__func__] if isinstance(held, staticmethod) else [held]


def _namespaces(held: object) -> list[dict[str, Any]]:
    """Globals of all modules that have ``held`` under some name, and of scripts that are no module."""
    imported = [vars(module) for module in imported_modules()]
    scripts = [holder for holder in gc.get_referrers(held) if isinstance(holder, dict) and "__builtins__" in holder]
    found = {id(namespace): namespace for namespace in imported + scripts}
    return [namespace for namespace in found.values() if any(value is held for value in list(namespace.values()))]


def _holders_out_of_reach(owner: ModuleType | type, held: object) -> list[str]:
    """What refers to ``held`` besides its owner and the globals of modules, in words."""
    # The dict behind a class, which hides it.
    own = vars(owner) if isinstance(owner, ModuleType) else gc.get_referents(vars(owner))[0]
    late = []
    forms = _forms(held)
    reached = {id(each) for form in forms for each in _namespaces(form)} | {id(own), id(forms), id(held)}
    for place in range(len(forms)):
        for holder in gc.get_referrers(forms[place]):
            # A frame in sight has ended: an exception keeps it.
            if id(holder) not in reached and not isinstance(holder, FrameType):
                late.append(_described(holder))
    return sorted(set(late))


def _described(holder: object) -> str:
    """With the function or class that it belongs to, where there is one."""
    closures = gc.get_referrers(holder) if isinstance(holder, CellType) else [holder]
    for inside in closures:
        for each in gc.get_referrers(inside) if isinstance(inside, tuple | dict) else []:
            if isinstance(each, FunctionType):
                part = "the closure" if isinstance(holder, CellType) else "a default or attribute"
                return f"{part} of {each.__qualname__}"
            if isinstance(each, type):
                return f"the class {each.__qualname__}"
    return f"a {type(holder).__name__}"


def name_of(owner: ModuleType | type) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
