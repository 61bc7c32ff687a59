"""Several policies on one base model: adapters put in force by pointer swaps, merged weights where none is trained."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from advflow_ext.contract.step_table import StepTable
from advflow_ext.nn.lora import PeftLayer, is_lora_layer, merge_obstacle
from advflow_ext.policies.merged_weights import MERGED_BY, Bases, MergedWeights, count_optimizer_steps, merged_size
from advflow_ext.policies.mismatch import Mismatch, measured
from advflow_ext.policies.parameters import Place, move_towards, places_of, require_in_place


class PolicySet:
    """The policies of a run as adapters that PEFT has put on one ``model``::

        policies = PolicySet(model, {"learner": "default", "rollout": "old", "reference": None}, merged_bytes=2**31)
        with torch.no_grad(), policies.use("rollout"):
            v_old = model(...)
        policies.activate("learner")  # stays in force until the next call
        policies.follow("learner", "rollout", rho=0.9)

    Putting a policy in force sets two attributes of each adapted layer: nothing is copied and no ``requires_grad`` is
    touched, which stays as whoever trains has set it. Adapters, names and state dicts remain PEFT's.

    **Merged weights.** Where gradients are off when a policy is put in force, its layers run on W' = W + scale B A, so
    that the adapter costs nothing. W' is computed in float32, rounded once to the dtype of W, kept, and computed again
    only when W, A, B or the scale has changed: seen by the tensors' identity, memory and version and by the steps of
    torch's optimisers, so that only a change through ``.data`` has to be told, by :meth:`forget`. At most
    ``merged_bytes`` are kept, the policy least recently used is dropped first, one that does not fit runs unmerged.

    On a bf16 base the rounding is not small: what of ``scale B A`` is below half a unit in the last place of W is lost.
    An adapter 4 % of the size of W arrives with an error of 4 % of itself, one of 0.4 % (about one step of Adam at 3e-4
    from nothing, at the width of SD3.5 Medium) with 38 %, one of 0.04 % with 90 %. Images may be drawn so. Velocities
    of a merged and of an unmerged policy should not meet in one loss, whose subject is their difference.

    Whatever would take merged weights for the base's, or switch adapters under them, first puts the base weights back;
    the policy stays in force, unmerged, until the next call here: ``state_dict()``, ``parameters()``, ``to()``, copies,
    ``torch.save(model)``, ``fully_shard``, PEFT's ``set_adapter``, ``disable_adapters``, ``merge`` and so on, which do
    what they do without this class. Only the attribute ``base_layer.weight`` of a layer shows what is in force.

    One thread at a time: ``use`` and ``activate`` of another are refused while one is inside ``use``.

    Arguments:
        model: with PEFT's adapters injected, wrapped by PEFT or not.
        adapters: name of a policy to name of its adapter; None is the base without adapters.
        merged_bytes: memory for merged weights; 0 never merges.

    Attributes: ``active``, the policy in force (the first, at first); ``merged``, whether by its merged weights.

    Raises ValueError for a model without LoRA layers, an unknown adapter or policy, and a negative ``merged_bytes``.
    Putting a policy in force raises RuntimeError where that cannot be done any more, and says what to do: its adapter
    was deleted, PEFT has merged an adapter into the base, another thread is at it, or :meth:`parameters` gave tensors
    that ``fully_shard`` or the like has replaced by others since.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, str | None], *, merged_bytes: int = 0) -> None:
        if not isinstance(adapters, Mapping) or not adapters:
            given = "empty" if isinstance(adapters, Mapping) else f"a {type(adapters).__name__}"
            raise ValueError(f"adapters is {given}; accepted is at least one policy.")
        if (
            isinstance(merged_bytes, bool)
            or not isinstance(merged_bytes, int | float)
            or not 0 <= merged_bytes < math.inf
        ):
            raise ValueError(f"merged_bytes is {merged_bytes!r}; accepted is 0 or more.")
        self._model = model
        self._adapters = dict(adapters)
        self._merged_bytes = merged_bytes
        self._weights = MergedWeights(merged_bytes)
        self._given: dict[str, list[Place]] = {}  # what parameters() has given out, by policy
        self._turn = threading.RLock()
        self._find_layers()
        if not self._layers:
            raise ValueError(f"model is a {type(model).__name__} without LoRA layers; accepted is one with adapters.")
        known = self._known()
        for policy, adapter in adapters.items():
            if adapter is not None and adapter not in known:
                raise ValueError(f"adapters has {adapter!r} for {policy!r}; the model's adapters are {known}.")
        count_optimizer_steps()
        model.register_state_dict_pre_hook(self._put_bases_back_first)
        model.register_load_state_dict_pre_hook(self._put_bases_back_first)
        self.activate(next(iter(adapters)), merged=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model that is copied with it has its bases in place and makes merged weights of its own."""
        self._put_bases_back_first()
        weights, bases = MergedWeights(self._merged_bytes), Bases(self._layers)
        return self.__dict__ | {"_weights": weights, "_bases": bases, "_given": {}, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_turn": threading.RLock()}

    @property
    def merged(self) -> bool:
        return self._bases.replaced

    def activate(self, policy: str, *, merged: bool | None = None) -> None:
        """Puts ``policy`` in force until the next call.

        ``merged`` says whether by merged weights, if :meth:`obstacle` has nothing against it: None, where gradients are
        off now; True, where no forward pass until the next call will need one; False, never.
        """
        with self._my_turn():
            adapter = self._adapter(policy)
            self._check(policy, adapter)
            self._bases.put_back()
            self._switch_to(adapter, disabled=adapter is None)
            self.active = policy  # unmerged, should there be no memory for more
            if adapter is not None and (not torch.is_grad_enabled() if merged is None else merged):
                if self.obstacle(policy) is not None:
                    self._weights.drop(adapter)
                    return
                weights = self._weights.of(self._layers, adapter)
                self._switch_to(adapter, disabled=True)
                self._bases.replace(weights, self._put_bases_back_first)

    @contextmanager
    def use(self, policy: str, *, merged: bool | None = None) -> Iterator[None]:
        """``with policies.use("rollout"):`` puts ``policy`` in force, and afterwards again the one before.

        With gradient checkpointing the backward pass computes forward passes again: it belongs inside, too.
        """
        with self._my_turn():
            self._check(policy, self._adapter(policy))
            before, was_merged = self.active, self.merged
            try:
                self.activate(policy, merged=merged)
                yield
            finally:
                self.activate(before, merged=was_merged)

    def parameters(self, policy: str) -> list[nn.Parameter]:
        """The parameters of a policy's adapter, layer by layer in the model's order; none for the base.

        They are the model's at this moment: ask for them, and build the optimiser, after ``fully_shard``.
        """
        adapter = self._adapter(policy)
        parts = self._parts_of(adapter)
        self._given[policy] = [*parts, *places_of(place.thing for place in parts if isinstance(place.thing, nn.Module))]
        return _parameters(parts)

    def check(self) -> None:
        """Raises RuntimeError where what :meth:`parameters` gave is not in the model any more."""
        for policy, places in self._given.items():
            require_in_place(places, f"the parameters of {policy!r}")

    def obstacle(self, policy: str) -> str | None:
        """Why ``policy`` never runs on merged weights, as a sentence; None where it may."""
        adapter = self._adapter(policy)
        if adapter is None:
            return "It is the base, which has nothing to merge."
        if not self._merged_bytes:
            return "merged_bytes is 0."
        if reason := next(filter(None, (merge_obstacle(layer, adapter) for layer in self._layers)), None):
            return reason
        for layer in self._layers:
            dropout = layer.lora_dropout[adapter] if adapter in layer.lora_dropout else None
            if isinstance(dropout, nn.Dropout) and dropout.training:
                return f"Adapter {adapter!r} has a dropout, and the model is in training mode."
        size = merged_size(self._layers, adapter)
        if size > self._merged_bytes:
            return f"Its merged weights take {size} bytes, and merged_bytes is {self._merged_bytes}."
        return None

    @torch.no_grad()
    def follow(self, source: str, target: str, rho: float) -> None:
        """Moves ``target`` towards ``source``: theta_target <- rho theta_target + (1 - rho) theta_source.

        Raises ValueError for a rho outside [0, 1], and for adapters that differ in more than their numbers.
        """
        self.check()
        names = self._adapter(source), self._adapter(target)
        (leaders, in_layers, scales), (followers, *of_target) = (self._shape_of(name) for name in names)
        if [in_layers, scales] != of_target or not followers:
            raise ValueError(
                f"{target!r} cannot follow {source!r}; accepted are two adapters of the same shapes, dtypes and scales "
                "in the same layers."
            )
        move_towards(followers, leaders, rho)

    def forget(self) -> None:
        """Drops all merged weights, after a change that no version counter has seen."""
        self._put_bases_back_first()
        self._weights.clear()

    def mismatch(
        self,
        policy: str,
        velocity: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        rollout_batch: int,
        train_batch: int,
        table: StepTable,
        index: Tensor,
        eps: Tensor | None = None,
        merged: bool = False,
    ) -> Mismatch:
        """The ratio == 1 self-check: the same policy on the same inputs, as the rollout runs it and as training does.

        Without rounding both numbers are 0. A trust region, clip or KL threshold below ``log_ratio`` acts on rounding.

        Arguments:
            velocity: ``velocity(*rows)`` runs the model on some rows of ``inputs`` and returns ``[n, ...]``.
            inputs: tensors with N rows.
            rollout_batch, train_batch: rows of one forward pass, of the rollout without and of training with gradients.
            table, index: the sampler steps, int64 ``[N]``, whose log-ratios are meant; stochastic ones.
            eps: the steps' noise, of the velocities' shape; None draws standard normal noise.
            merged: whether the rollout runs on merged weights.
        """
        return measured(
            self.use(policy, merged=merged), self.use(policy, merged=False), velocity, inputs,
            rollout_batch=rollout_batch, train_batch=train_batch, table=table, index=index, eps=eps,
        )  # fmt: skip

    def _adapter(self, policy: str) -> str | None:
        if policy not in self._adapters:
            raise ValueError(f"policy is {policy!r}; accepted are {sorted(self._adapters)}.")
        return self._adapters[policy]

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("policies are in use in another thread; accepted is one thread at a time.")
        try:
            yield
        finally:
            self._turn.release()

    def _find_layers(self) -> None:
        """Notes the model's LoRA layers, where they are, which adapters each has, and what PEFT knew then."""
        self._places = [
            Place(parent._modules, name, child)
            for parent in self._model.modules()
            for name, child in parent.named_children()
            if is_lora_layer(child)
        ]
        self._layers: list[PeftLayer] = [module for module in self._model.modules() if is_lora_layer(module)]
        adapters = {adapter for adapter in self._adapters.values() if adapter is not None}
        self._layers_of = {name: [layer for layer in self._layers if name in layer.lora_A] for name in adapters}
        self._settings = next((m for m in self._model.modules() if "peft_config" in m.__dict__), self._model)
        self._configs = self._current_configs()
        self._bases = Bases(self._layers)
        self._weights.clear()

    def _known(self) -> list[str]:
        return sorted({name for layer in self._layers for name in layer.lora_A})

    def _current_configs(self) -> list[object]:
        """PEFT's settings of the model's adapters, another object for each that is added."""
        return list(self._settings.__dict__.get("peft_config", {}).values())

    def _check(self, policy: str, adapter: str | None) -> None:
        """Raises RuntimeError where `policy` cannot be put in force as what it was."""
        configs = self._current_configs()
        as_noted = list(map(id, configs)) == list(map(id, self._configs))
        if not as_noted or any(place.held.get(place.name) is not place.thing for place in self._places):
            self._put_bases_back_first()
            self._find_layers()
        missing = adapter is not None and not self._layers_of[adapter]
        merged: set[str] = set()
        for layer in self._layers:  # past nn.Module.__getattr__, as this is asked at every switch
            notes = layer.__dict__
            if notes.get("merged_adapters"):
                merged.update(notes["merged_adapters"])
            if (give_way := notes.get(MERGED_BY)) is not None and give_way != self._put_bases_back_first:
                give_way()  # another PolicySet's
        for layer in () if adapter is None else self._layers_of[adapter]:
            missing = missing or adapter not in layer._modules["lora_A"]._modules
        if missing:
            raise RuntimeError(
                f"policy {policy!r} is adapter {adapter!r}, which the model no longer has; it has {self._known()}. Add "
                "it again, or make a PolicySet of those that are there."
            )
        if merged:
            self._weights.clear()
            raise RuntimeError(
                f"PEFT has merged {sorted(merged)} into the base weights, so that no policy is what it was; take that "
                "back first, by unfuse_lora() or unmerge_adapter()."
            )
        self.check()

    def _parts_of(self, adapter: str | None) -> list[Place]:
        """The modules of an adapter (for embeddings, parameters), layer by layer in the model's order."""
        parts = []
        for layer in self._layers:
            for held in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter in held:
                    in_modules = isinstance(held[adapter], nn.Module)
                    parts.append(Place(held._modules if in_modules else held._parameters, str(adapter), held[adapter]))
        return parts

    def _shape_of(self, adapter: str | None) -> tuple[list[nn.Parameter], list[object], list[object]]:
        """An adapter's parameters; the layers they are in, their shapes and dtypes; its scales."""
        layers = [layer for layer in self._layers if adapter in layer.lora_A]
        parameters = _parameters(self._parts_of(adapter))
        shapes = [(p.shape, p.dtype) for p in parameters]
        return parameters, [*map(id, layers), *shapes], [layer.scaling.get(adapter) for layer in layers]

    def _switch_to(self, adapter: str | None, disabled: bool) -> None:
        names = [adapter]
        for layer in self._layers:
            # Past nn.Module.__setattr__, which looks for parameters and modules first.
            layer.__dict__["_disable_adapters"] = disabled
            if adapter is not None:
                layer.__dict__["_active_adapter"] = names

    def _put_bases_back_first(self, *_: object) -> None:
        """The policy stays in force, unmerged."""
        if self.merged:
            self._bases.put_back()
            self._switch_to(self._adapters[self.active], disabled=False)


def _parameters(parts: list[Place]) -> list[nn.Parameter]:
    return [
        p for part in parts for p in ([part.thing] if isinstance(part.thing, nn.Parameter) else part.thing.parameters())
    ]
