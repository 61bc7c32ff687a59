"""Several policies on one base model: adapters put in force by pointer swaps, merged weights where none is trained."""

from __future__ import annotations

import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from advflow_ext.contract.step_table import StepTable
from advflow_ext.nn.lora import PeftLayer, is_lora_layer, merge_obstacle, merged_weight
from advflow_ext.nn.modulation_cache import stamp
from advflow_ext.policies.parameters import Place, move_towards, places_of, require_in_place

# What would take merged weights for the base's, and PEFT's own switching: while weights are merged, each of them first
# puts the bases back. The walk is that of parameters(), of PEFT's calls on a whole model, and of many others.
_OF_LAYERS = ("named_modules", "set_adapter", "enable_adapters", "delete_adapter", "update_layer", "merge", "unmerge")
_OF_ALL = ("named_parameters", "apply", "_apply", "__deepcopy__", "__reduce_ex__")
_MERGED_BY = "_advflow_merged_by"


class Mismatch(NamedTuple):
    """How far one policy is from itself when it is run in two ways.

    ``velocity`` is the largest |v_rollout - v_training| of an element; ``log_ratio`` the largest |log-ratio|,
    mean-reduced over a sample's elements as in the losses, which a trust region would take for a change of the policy.
    """

    velocity: float
    log_ratio: float


class _Merged(NamedTuple):
    weights: list[nn.Parameter]
    stamps: list[object]
    size: int


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
        self._cache: OrderedDict[str, _Merged] = OrderedDict()
        self._bases: list[nn.Parameter] | None = None  # what merged weights stand in for at the moment
        self._given: dict[str, list[Place]] = {}  # what parameters() has given out, by policy
        self._turn = threading.RLock()
        self._bases_first: list[tuple[dict[str, Any], dict[str, Any]]] = []  # of each layer and its base, once needed
        self._find_layers()
        if not self._layers:
            raise ValueError(f"model is a {type(model).__name__} without LoRA layers; accepted is one with adapters.")
        known = self._known()
        for policy, adapter in adapters.items():
            if adapter is not None and adapter not in known:
                raise ValueError(f"adapters has {adapter!r} for {policy!r}; the model's adapters are {known}.")
        _count_optimizer_steps()
        model.register_state_dict_pre_hook(self._put_bases_back_first)
        model.register_load_state_dict_pre_hook(self._put_bases_back_first)
        self.activate(next(iter(adapters)), merged=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model that is copied with it has its bases in place and makes merged weights of its own."""
        self._put_bases_back_first()
        return self.__dict__ | {"_cache": OrderedDict(), "_given": {}, "_turn": None, "_bases_first": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_turn": threading.RLock()}

    @property
    def merged(self) -> bool:
        return self._bases is not None

    def activate(self, policy: str, *, merged: bool | None = None) -> None:
        """Puts ``policy`` in force until the next call.

        ``merged`` says whether by merged weights, if :meth:`obstacle` has nothing against it: None, where gradients are
        off now; True, where no forward pass until the next call will need one; False, never.
        """
        with self._my_turn():
            adapter = self._adapter(policy)
            self._check(policy, adapter)
            self._put_bases_back()
            self._switch_to(adapter, disabled=adapter is None)
            self.active = policy  # unmerged, should there be no memory for more
            if adapter is not None and (not torch.is_grad_enabled() if merged is None else merged):
                weights = self._merged_weights(policy, adapter)
                if weights is not None:
                    self._switch_to(adapter, disabled=True)
                    self._put_in_force(weights)

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
        size = self._size(adapter)
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
        self._cache.clear()

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
        for name, value in {"rollout_batch": rollout_batch, "train_batch": train_batch}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; accepted is a positive integer.")
        if not inputs or any(tensor.shape[:1] != inputs[0].shape[:1] for tensor in inputs):
            shapes = [list(tensor.shape) for tensor in inputs]
            raise ValueError(f"inputs have the shapes {shapes}; accepted are tensors with one number of rows.")
        wrong = sorted(set(index.tolist()) - set(table.stochastic_steps))
        if wrong or index.shape != inputs[0].shape[:1]:
            raise ValueError(
                f"index has shape {list(index.shape)} and the steps {wrong or 'accepted'}; accepted are "
                f"{len(inputs[0])} of the stochastic steps {list(table.stochastic_steps)}."
            )

        def run(batch: int) -> Tensor:
            parts = zip(*(tensor.split(batch) for tensor in inputs), strict=True)
            return torch.cat([velocity(*part).detach().float() for part in parts])

        with torch.no_grad(), self.use(policy, merged=merged):
            rolled_out = run(rollout_batch)
        with torch.enable_grad(), self.use(policy, merged=False):
            trained = run(train_batch)
        delta = (trained - rolled_out).flatten(1)
        if eps is None:
            eps = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)).to(delta)
        kappa = table.rows(index).kappa[:, None]
        log_ratio = (kappa * delta * (eps.flatten(1).float() - kappa * delta / 2)).mean(1)
        return Mismatch(delta.abs().max().item(), log_ratio.abs().max().item())

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
        self._bases_first = []
        self._cache.clear()

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
            if (other := notes.get(_MERGED_BY)) is not None and other is not self:
                other._put_bases_back_first()
        for layer in () if adapter is None else self._layers_of[adapter]:
            missing = missing or adapter not in layer._modules["lora_A"]._modules
        if missing:
            raise RuntimeError(
                f"policy {policy!r} is adapter {adapter!r}, which the model no longer has; it has {self._known()}. Add "
                "it again, or make a PolicySet of those that are there."
            )
        if merged:
            self._cache.clear()
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

    def _size(self, adapter: str) -> int:
        return sum(layer.base_layer.weight.nbytes for layer in self._layers if adapter in layer.lora_A)

    def _merged_weights(self, policy: str, adapter: str) -> list[nn.Parameter] | None:
        """The policy's merged weights, of every layer; None where it runs unmerged."""
        held = self._cache.pop(adapter, None)
        if self.obstacle(policy) is not None:
            return None
        stamps = self._stamps(adapter)
        if held is None or held.stamps != stamps:
            size = self._size(adapter)
            while self._cache and sum(other.size for other in self._cache.values()) + size > self._merged_bytes:
                self._cache.popitem(last=False)
            held = _Merged(self._merge(adapter, held), stamps, size)
        self._cache[adapter] = held  # as the last, the most recently used
        return held.weights

    # Tensors made under inference mode could not be written again outside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, adapter: str, held: _Merged | None) -> list[nn.Parameter]:
        """Merges into the memory of ``held``, so that what has recorded its addresses goes on with the new weights."""
        weights = []
        for i, layer in enumerate(self._layers):
            base = layer.base_layer.weight
            old = None if held is None else held.weights[i]
            if adapter not in layer.lora_A:
                weights.append(base)
            elif old is not None and old is not base and (old.dtype, old.device) == (base.dtype, base.device):
                weights.append(old.copy_(merged_weight(layer, adapter)))
            else:
                weights.append(nn.Parameter(merged_weight(layer, adapter), requires_grad=False))
        return weights

    def _stamps(self, adapter: str) -> list[object]:
        """Differ as soon as the merged weights would. Past nn.Module.__getattr__, as this is asked at every switch."""
        stamps: list[object] = []
        for layer in self._layers:
            modules = layer._modules
            stamps.append(stamp(modules["base_layer"]._parameters["weight"]))
            for kind in ("lora_A", "lora_B"):
                if held := modules[kind]._modules.get(adapter):
                    stamps.append(stamp(held._parameters["weight"]))
            stamps.append(layer.scaling.get(adapter))
        return stamps

    def _switch_to(self, adapter: str | None, disabled: bool) -> None:
        names = [adapter]
        for layer in self._layers:
            # Past nn.Module.__setattr__, which looks for parameters and modules first.
            layer.__dict__["_disable_adapters"] = disabled
            if adapter is not None:
                layer.__dict__["_active_adapter"] = names

    def _put_in_force(self, weights: list[nn.Parameter]) -> None:
        if not self._bases_first:
            self._bases_first = [
                (
                    {name: _BasesFirst(self, layer, name) for name in (*_OF_LAYERS, *_OF_ALL)} | {_MERGED_BY: self},
                    {name: _BasesFirst(self, layer.base_layer, name) for name in _OF_ALL},
                )
                for layer in self._layers
            ]
        self._bases = [layer.base_layer.weight for layer in self._layers]
        for layer, weight, (of_layer, of_base) in zip(self._layers, weights, self._bases_first, strict=True):
            base = layer.base_layer
            base._parameters["weight"] = weight
            layer.__dict__.update(of_layer)
            base.__dict__.update(of_base)

    def _put_bases_back(self) -> None:
        if self._bases is None:
            return
        for layer, weight, ours in zip(self._layers, self._bases, self._bases_first, strict=True):
            layer.base_layer._parameters["weight"] = weight
            for module, names in zip((layer, layer.base_layer), ours, strict=True):
                for name in names:
                    del module.__dict__[name]
        self._bases = None

    def _put_bases_back_first(self, *_: object) -> None:
        """The policy stays in force, unmerged."""
        if self.merged:
            self._put_bases_back()
            self._switch_to(self._adapters[self.active], disabled=False)


class _BasesFirst:
    """Stands for a method of `module` while merged weights are in force there."""

    def __init__(self, policies: PolicySet, module: nn.Module, name: str) -> None:
        self._policies, self._module, self._name = policies, module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._policies._put_bases_back_first()
        if self._name == "__deepcopy__":  # which modules have not, but Python asks for
            return copy.deepcopy(self._module, *args)
        return getattr(self._module, self._name)(*args, **kwargs)


def _parameters(parts: list[Place]) -> list[nn.Parameter]:
    return [
        p for part in parts for p in ([part.thing] if isinstance(part.thing, nn.Parameter) else part.thing.parameters())
    ]


@cache
def _count_optimizer_steps() -> None:
    """Counts, from now on, every step of an optimiser as a version of its parameters: fused ones do not themselves."""

    def count(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)
