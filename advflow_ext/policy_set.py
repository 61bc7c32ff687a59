"""Several policies on one base model: adapters put in force by pointer swaps, merged weights where none is trained."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from advflow_ext.nn.lora import PeftLayer, is_lora_layer, merge_obstacle, merged_weight
from advflow_ext.nn.modulation_cache import stamp
from advflow_ext.ops.step_table import StepTable


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

    ``state_dict()`` and ``load_state_dict()`` of the model first put the base weights back; the policy stays in force,
    unmerged. Move or cast the model with an unmerged policy in force.

    Arguments:
        model: with PEFT's adapters injected, wrapped by PEFT or not.
        adapters: name of a policy to name of its adapter; None is the base without adapters.
        merged_bytes: memory for merged weights; 0 never merges.

    Attributes: ``active``, the policy in force (the first, at first); ``merged``, whether by its merged weights.

    Raises ValueError for a model without LoRA layers, an unknown adapter or policy, and a negative ``merged_bytes``.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, str | None], *, merged_bytes: int = 0) -> None:
        self._layers: list[PeftLayer] = [module for module in model.modules() if is_lora_layer(module)]
        if not self._layers:
            raise ValueError(f"model is a {type(model).__name__} without LoRA layers; accepted is one with adapters.")
        if not adapters:
            raise ValueError("adapters is empty; accepted is at least one policy.")
        if merged_bytes < 0:
            raise ValueError(f"merged_bytes is {merged_bytes}; accepted is 0 or more.")
        known = sorted({name for layer in self._layers for name in layer.lora_A})
        for policy, adapter in adapters.items():
            if adapter is not None and adapter not in known:
                raise ValueError(f"adapters has {adapter!r} for {policy!r}; the model's adapters are {known}.")
        self._adapters = dict(adapters)
        self._merged_bytes = merged_bytes
        self._cache: OrderedDict[str, _Merged] = OrderedDict()
        self._bases: list[nn.Parameter] | None = None  # what merged weights stand in for at the moment
        _count_optimizer_steps()
        model.register_state_dict_pre_hook(self._before_state_dict)
        model.register_load_state_dict_pre_hook(self._before_state_dict)
        self.activate(next(iter(adapters)), merged=False)

    @property
    def merged(self) -> bool:
        return self._bases is not None

    def activate(self, policy: str, *, merged: bool | None = None) -> None:
        """Puts ``policy`` in force until the next call.

        ``merged`` says whether by merged weights, if :meth:`obstacle` has nothing against it: None, where gradients are
        off now; True, where no forward pass until the next call will need one; False, never.
        """
        adapter = self._adapter(policy)
        self._put_bases_back()
        self._switch_to(adapter, disabled=adapter is None)
        self.active = policy  # unmerged, should there be no memory for more
        if adapter is not None and (not torch.is_grad_enabled() if merged is None else merged):
            weights = self._merged_weights(policy, adapter)
            if weights is not None:
                self._switch_to(adapter, disabled=True)
                self._bases = [layer.base_layer.weight for layer in self._layers]
                self._point_at(weights)

    @contextmanager
    def use(self, policy: str, *, merged: bool | None = None) -> Iterator[None]:
        """``with policies.use("rollout"):`` puts ``policy`` in force, and afterwards again the one before.

        With gradient checkpointing the backward pass computes forward passes again: it belongs inside, too.
        """
        before, was_merged = self.active, self.merged
        self.activate(policy, merged=merged)
        try:
            yield
        finally:
            self.activate(before, merged=was_merged)

    def parameters(self, policy: str) -> list[nn.Parameter]:
        """The parameters of a policy's adapter, layer by layer in the model's order; none for the base."""
        adapter, found = self._adapter(policy), list[nn.Parameter]()
        for layer in self._layers:
            for adapters in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter in adapters:
                    held = adapters[adapter]  # a module, or a parameter for embeddings
                    found += [held] if isinstance(held, nn.Parameter) else held.parameters()
        return found

    def obstacle(self, policy: str) -> str | None:
        """Why ``policy`` never runs on merged weights, as a sentence; None where it may."""
        adapter = self._adapter(policy)
        if adapter is None:
            return "It is the base, which has nothing to merge."
        if not self._merged_bytes:
            return "merged_bytes is 0."
        if reason := next(filter(None, (merge_obstacle(layer, adapter) for layer in self._layers)), None):
            return reason
        size = self._size(adapter)
        if size > self._merged_bytes:
            return f"Its merged weights take {size} bytes, and merged_bytes is {self._merged_bytes}."
        return None

    @torch.no_grad()
    def follow(self, source: str, target: str, rho: float) -> None:
        """Moves ``target`` towards ``source``: theta_target <- rho theta_target + (1 - rho) theta_source."""
        followers, leaders = self.parameters(target), self.parameters(source)
        if [p.shape for p in followers] != [p.shape for p in leaders] or not followers:
            raise ValueError(f"{target!r} cannot follow {source!r}; accepted are two adapters of the same shapes.")
        torch._foreach_lerp_(tuple(followers), tuple(leaders), 1.0 - rho)

    def forget(self) -> None:
        """Drops all merged weights, after a change that no version counter has seen."""
        if self.merged:
            self.activate(self.active, merged=False)
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

    def _size(self, adapter: str) -> int:
        return sum(layer.base_layer.weight.nbytes for layer in self._layers if adapter in layer.lora_A)

    def _merged_weights(self, policy: str, adapter: str) -> list[nn.Parameter] | None:
        """The policy's merged weights, of every layer; None where it runs unmerged."""
        held = self._cache.pop(adapter, None)
        if held is None and self.obstacle(policy) is not None:
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

    def _point_at(self, weights: list[nn.Parameter]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.base_layer._parameters["weight"] = weight

    def _put_bases_back(self) -> None:
        if self._bases is not None:
            self._point_at(self._bases)
            self._bases = None

    def _before_state_dict(self, *_: object) -> None:
        if self.merged:
            self.activate(self.active, merged=False)


@cache
def _count_optimizer_steps() -> None:
    """Counts, from now on, every step of an optimiser as a version of its parameters: fused ones do not themselves."""

    def count(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)
