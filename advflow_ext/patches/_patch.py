"""Making one model's blocks and LoRA layers run on our ops, and taking it back: what all families share."""

from __future__ import annotations

import copy
import copyreg
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from advflow_ext.contract.checks import require_choice, require_flag
from advflow_ext.kernels import triton_ops
from advflow_ext.nn._identity import MARK, STOCK, is_as_written, is_exactly, is_peft_linear, peft_linear
from advflow_ext.nn._stamp import stamp
from advflow_ext.nn.lora import is_lora_layer, lora_forward, lora_obstacle, merge_obstacle, merge_stamp, merged_weight
from advflow_ext.patches._fused import CHECKED_WEIGHTS, WITHOUT_ZEROS, FusedBlock
from advflow_ext.patches._reasons import class_of

OPS = ("qk_norm", "adaln", "gate", "gelu", "lora")
DISABLE = "ADVFLOW_DISABLE"


@dataclass
class TransformerPatch:
    """What :func:`apply_to_sd3`, or a sibling, did: print it, :meth:`unapply` it, or use it in a ``with`` statement.

    Attributes:
        replaced: op -> how many modules run on it now.
        kept: module -> why it stays as it was.
        active: until :meth:`unapply`.
    """

    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    active: bool = True
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _derived: dict[type[nn.Module], type[nn.Module]] = field(default_factory=dict, repr=False)
    _merged: dict[nn.Module, tuple[object, Tensor]] = field(default_factory=dict, repr=False)

    def unapply(self) -> None:
        """Puts everything back; nothing happens the second time."""
        self.active = False
        self._merged.clear()
        while self._undo:
            self._undo.pop()()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is the report alone: what it takes back is a matter of this process and of these modules."""
        return vars(TransformerPatch(dict(self.replaced), dict(self.kept), active=False))

    def __enter__(self) -> TransformerPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.unapply()

    def __str__(self) -> str:
        lines = [f"{op}: {count} modules" for op, count in self.replaced.items()]
        return "\n".join([*lines, *(f"kept {name}: {reason}" for name, reason in self.kept.items())])


def chosen_ops(flags: dict[str, bool], mode: str, verify: object) -> frozenset[str]:
    """Names of the ops that are on. Raises ValueError for what none of the functions takes."""
    for name, value in flags.items():
        require_flag(name, value)
    require_choice("mode", mode, ("train", "infer"))
    if verify not in ("first", False):
        raise ValueError(f"verify is {verify!r}; accepted are 'first' and False.")
    disabled = frozenset(name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip())
    for name in sorted(disabled):
        require_choice(f"a name in {DISABLE}", name, OPS)
    return frozenset(name for name, value in flags.items() if value) - disabled


def joins_lora(ops: frozenset[str], mode: str) -> bool:
    """Whether layers of one input are one function; merged, as they are to "infer", each is a product of its own."""
    return "lora" in ops and mode == "train"


def patch_model(
    model: nn.Module, accepted: str, ops: frozenset[str], mode: str, *families: FusedBlock[Any]
) -> TransformerPatch:
    """Patches the blocks of all `families` in `model`, which is to be `accepted`, as a sentence says it."""
    # By their name, so that those which only have that are reported as kept.
    kinds = {fused.name: fused for fused in families}
    named = [(name, module, _called(module, kinds)) for name, module in model.named_modules()]
    blocks = [(name, module, kinds[kind]) for name, module, kind in named if kind is not None]
    if not blocks:
        raise ValueError(
            f"model is a {type(model).__name__} without {' or '.join(f'{kind}s' for kind in kinds)}; "
            f"accepted is {accepted}."
        )
    if any(is_patched(block) for _, block, _ in blocks):
        raise ValueError("model is patched already; accepted is one that is not: call unapply() of its patch first.")
    patch = TransformerPatch()
    served = note_missing_triton(patch, next(model.parameters()))
    for name, block, fused in blocks:
        obstacle = _has_own_forward(block) or _is_somebody_else_s(block, fused)
        if served:
            _report_block(patch, name, block, fused, obstacle)
        if fused.ops and not obstacle:
            _swap_class(patch, block, functools.partial(block_method, patch, fused))
    if "lora" in ops:
        _patch_lora(patch, model, mode)
    return patch


def _patch_lora(patch: TransformerPatch, model: nn.Module, mode: str) -> None:
    layers = {name: module for name, module in model.named_modules() if is_lora_layer(module)}
    method = _merged_method if mode == "infer" else lora_method
    linear = peft_linear()
    exchanged = linear is not None and not is_as_written(linear)
    for name, layer in layers.items():
        if obstacle := _has_own_forward(layer) or lora_obstacle(layer):
            patch.kept[name] = obstacle
        elif exchanged:
            patch.kept[name] = "somebody has exchanged the forward of PEFT's LoRA Linear"
        else:
            patch.replaced["lora"] = patch.replaced.get("lora", 0) + 1
        # With an obstacle, too, which may go away, such as training mode with dropout.
        if is_peft_linear(layer) and not exchanged:
            _swap_class(patch, layer, functools.partial(method, patch))


def block_method(patch: TransformerPatch, fused: FusedBlock[Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.active:
            return stock(block, *args, **kwargs)
        return fused.forward(stock, block, *args, **kwargs)

    return forward


def lora_method(patch: TransformerPatch, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not patch.active:
            return stock(layer, x, *args, **kwargs)
        return lora_forward(layer, x, *args, stock=stock, **kwargs)

    return forward


def _merged_method(patch: TransformerPatch, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    unmerged = lora_method(patch, stock)

    @functools.wraps(stock)
    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        mergeable = patch.active and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or args or kwargs)
        if not mergeable or layer.disable_adapters or len(names) != 1 or merge_obstacle(layer, names[0]):
            return unmerged(layer, x, *args, **kwargs)
        return F.linear(x, _merged(patch, layer, names[0]), layer.base_layer.bias)

    return forward


def _merged(patch: TransformerPatch, layer: Any, name: str) -> Tensor:
    """The merged weight of `layer`, kept in its patch as long as nothing it is made of changes.

    Not as PolicySet keeps them, an adapter's of all layers at once, made when the policy is put in force: here PEFT's
    own calls change the adapter of any layer at any time, and its forward pass is the first to learn of it.
    """
    made_of = name, merge_stamp(layer, name)
    if layer not in patch._merged or patch._merged[layer][0] != made_of:
        patch._merged[layer] = made_of, merged_weight(layer, name)
    return patch._merged[layer][1]


def _called(module: nn.Module, names: dict[str, Any]) -> str | None:
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in names), None)


def _is_somebody_else_s(block: nn.Module, fused: FusedBlock[Any]) -> str | None:
    return None if is_exactly(block, fused.cls) else f"it is a {class_of(block)}"


def _has_own_forward(module: nn.Module) -> str | None:
    """Somebody else has replaced the forward of this one module, which hides that of its class."""
    return "its forward has been replaced already" if "forward" in module.__dict__ else None


def is_patched(module: object) -> bool:
    patch = getattr(module, MARK, None)
    return patch is not None and patch.active


def _swap_class(
    patch: TransformerPatch, module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Makes `module` one of a class derived from its own, which all modules of that class share.

    Were each given a forward of its own instead, torch.compile would compile each of them anew.
    """
    cls = type(module)
    derived = patch._derived.get(cls)
    if derived is None:
        members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        members |= {"forward": wrap(cls.forward), MARK: patch, STOCK: getattr(cls, STOCK, cls)}
        if not hasattr(cls, "__deepcopy__"):  # FSDP2 refuses by it
            members |= {"__reduce_ex__": _reduce, "__copy__": _shallow_copy, "__deepcopy__": _deep_copy}
        derived = type(cls.__name__, (cls,), members)
        patch._derived[cls] = derived
    module.__class__ = derived
    patch._undo.append(functools.partial(_restore_class_of, module, derived, cls))


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickles a module as one of the stock class, which any process can import; this one no other could."""
    cls = type(module)
    if MARK not in vars(cls):
        return object.__reduce_ex__(module, protocol)  # type: ignore[return-value]
    # Not by copyreg.__newobj__, for which pickle insists on the module's own class.
    return copyreg._reconstructor, (getattr(cls, STOCK), object, None), module.__getstate__()  # type: ignore[attr-defined]


def _shallow_copy(module: Any) -> Any:
    twin = object.__new__(type(module))
    twin.__setstate__(dict(module.__getstate__()))
    return twin


def _deep_copy(module: Any, memo: dict[int, Any]) -> Any:
    """A copy that is patched as well, as pickle's, by which Python copies otherwise, is not."""
    twin = memo[id(module)] = object.__new__(type(module))
    twin.__setstate__(copy.deepcopy(module.__getstate__(), memo))
    return twin


def _restore_class_of(module: nn.Module, derived: type[nn.Module], cls: type[nn.Module]) -> None:
    if type(module) is derived:  # or FSDP2 has derived from it in turn; then the forward passes on to the stock one
        module.__class__ = cls


def _report_block(patch: TransformerPatch, name: str, block: Any, fused: FusedBlock[Any], obstacle: str | None) -> None:
    if reason := obstacle or fused.reason_to_keep(block):
        patch.kept[name] = reason
        return
    for op in sorted(fused.ops & {"adaln", "gate"}):
        patch.replaced[op] = patch.replaced.get(op, 0) + 1
    if "gelu" in fused.ops:
        there = {part: getattr(block, part, None) for part in fused.activations}
        reasons = {
            part: fused.reason_to_keep_activation(module) for part, module in there.items() if module is not None
        }
        patch.kept |= {f"{name}.{part}": reason for part, reason in reasons.items() if reason}
        if not any(reasons.values()):
            patch.replaced["gelu"] = patch.replaced.get("gelu", 0) + 1
    if "qk_norm" in fused.ops:
        for part in fused.attentions:
            attn = getattr(block, part, None)
            if attn is None:
                continue
            if reason := fused.reason_to_keep_attention(attn):
                patch.kept[f"{name}.{part}"] = reason
            else:
                patch.replaced["qk_norm"] = patch.replaced.get("qk_norm", 0) + 1
                _note_norms_without_zeros(patch, attn)


def _note_norms_without_zeros(patch: TransformerPatch, attn: Any) -> None:
    """Lets the norms' backward pass start from their outputs, which divides by their weights."""
    norms = [getattr(attn, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    weights = [norm.weight for norm in norms if norm is not None]
    for name in (WITHOUT_ZEROS, CHECKED_WEIGHTS):
        attn.__dict__.pop(name, None)  # of a model that this one is a copy of
    if any(weight.is_meta for weight in weights):
        return
    # Shapes without numbers, as in a trace, stand for weights as they are.
    if any(map(is_fake, weights)) or bool(torch.cat(weights).all()):
        attn.__dict__ |= {WITHOUT_ZEROS: True, CHECKED_WEIGHTS: set(map(stamp, weights))}
        for name in (WITHOUT_ZEROS, CHECKED_WEIGHTS):
            patch._undo.append(functools.partial(attn.__dict__.pop, name, None))


def note_missing_triton(patch: TransformerPatch, like: Tensor | None) -> bool:
    """Whether the kernels run on tensors like `like`; notes it where they do not."""
    if like is None:
        like = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    served = triton_ops.serves(torch.empty(0, device=like.device, dtype=like.dtype))
    if not served:
        patch.kept["blocks"] = f"Triton does not run on {like.dtype} on {like.device.type} here; the stock blocks do"
    return served
