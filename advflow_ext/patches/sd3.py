"""One call that makes diffusers' Stable Diffusion 3 transformer run on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

import copy
import copyreg
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from advflow_ext.contract.checks import require_choice, require_flag
from advflow_ext.kernels import triton_ops
from advflow_ext.nn._identity import MARK, STOCK, is_as_written, is_exactly, is_peft_linear, peft_linear
from advflow_ext.nn._stamp import stamp
from advflow_ext.nn.lora import is_lora_layer, lora_forward, lora_obstacle, merge_obstacle, merge_stamp, merged_weight
from advflow_ext.patches._diffusers import Exchanged, Stock, stock_classes
from advflow_ext.patches._sd3_block import (
    CHECKED_WEIGHTS,
    WITHOUT_ZEROS,
    FusedBlock,
    class_of,
    reason_to_keep,
    reason_to_keep_attention,
    reason_to_keep_feed_forward,
)
from advflow_ext.patches._verify import Verifier

OPS = ("qk_norm", "adaln", "gate", "gelu", "lora")
DISABLE = "ADVFLOW_DISABLE"


@dataclass
class SD3Patch:
    """What :func:`apply_to_sd3` did: print it, :meth:`unapply` it, or use it in a ``with`` statement.

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
        return vars(SD3Patch(dict(self.replaced), dict(self.kept), active=False))

    def __enter__(self) -> SD3Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.unapply()

    def __str__(self) -> str:
        lines = [f"{op}: {count} modules" for op, count in self.replaced.items()]
        return "\n".join([*lines, *(f"kept {name}: {reason}" for name, reason in self.kept.items())])


def apply_to_sd3(
    model: nn.Module | None = None,
    *,
    qk_norm: bool = True,
    adaln: bool = True,
    gate: bool = True,
    gelu: bool = True,
    lora: bool = True,
    mode: Literal["train", "infer"] = "train",
    verify: Literal["first", False] = "first",
) -> SD3Patch:
    """Makes the transformer blocks of Stable Diffusion 3 and 3.5 run on fused forward and backward kernels.

    Works on ``SD3Transformer2DModel`` of diffusers 0.31 or newer, alone or inside PEFT, DDP or FSDP2 wrappers, before
    or after any of them; under autocast, gradient checkpointing and ``torch.compile`` (whole or block by block). Only
    PEFT's adapters have to be there first. Nothing waits for the device once ``verify`` has seen what it met, so a CUDA
    graph can be captured then; no GPU has confirmed that yet.

    A part of a block keeps its own forward where it has hooks, where somebody else has wrapped or replaced it, or where
    its class is not diffusers', PEFT's or torch's own, whatever it is called: a class derived from one of those, or one
    whose forward has been exchanged, is somebody else's.

    Parameters, state dicts and saved adapters are untouched: only forward passes are replaced. A copy of a patched
    model is patched, too; one that was pickled (``torch.save(model)``, a spawned process) comes back as diffusers' own,
    to be patched there.

    Arguments:
        model: the module to patch. None: the classes of diffusers and PEFT, for every model made before or after.
        qk_norm: RMS norm of queries and keys, written into the buffers of joint attention
            (:func:`advflow_ext.nn.joint_qk_norm`). In a ``model`` whose norm weights are frozen and without zeros the
            backward pass starts from what attention keeps, which saves the memory of q and k: load weights first.
        adaln: layer norm and modulation (:func:`advflow_ext.nn.layer_norm_modulate`).
        gate: gated residuals, with ``adaln`` fused with the layer norm that follows
            (:func:`advflow_ext.nn.gate_residual_layer_norm_modulate`).
        gelu: the activation overwrites its input where nothing will be differentiated.
        lora: PEFT's LoRA linear layers (:func:`advflow_ext.nn.lora.lora_forward`).
        mode: "infer" runs LoRA layers, where no gradient is asked for, on weights their one active adapter is merged
            into, which are kept beside the base's and computed anew when it changes. Inside torch.compile they run
            unmerged: :class:`advflow_ext.PolicySet` merges there, too, and for several policies. Needs a model.
        verify: "first" compares each op with what the modules it replaces compute themselves, result and gradients, the
            first time it meets a combination of dtypes and shapes, and leaves it to them, with a warning, where it is
            worse. Inside what torch.compile compiles nothing is compared.

    The environment variable ADVFLOW_DISABLE, a comma-separated list of these five names, switches ops off.
    Where Triton cannot run, the stock blocks do, and the report says so; the LoRA layers need no Triton.

    Returns an :class:`SD3Patch`, which says what was replaced and what was kept and why, and takes it all back.

    Raises ValueError for a model without SD3 blocks, for one that is patched already, and for unknown names, and
    ImportError without diffusers, or with one that is too old.
    """
    flags = {"qk_norm": qk_norm, "adaln": adaln, "gate": gate, "gelu": gelu, "lora": lora}
    for name, value in flags.items():
        require_flag(name, value)
    require_choice("mode", mode, ("train", "infer"))
    if mode == "infer" and model is None:
        raise ValueError("mode is 'infer' without a model; accepted for the classes is 'train'.")
    if verify not in ("first", False):
        raise ValueError(f"verify is {verify!r}; accepted are 'first' and False.")
    ops = frozenset(name for name, value in flags.items() if value) - _disabled()
    known = stock_classes()
    fused = FusedBlock(ops - {"lora"}, known, Verifier() if verify else None)
    return _patch_classes(ops, known, fused) if model is None else _patch_model(model, ops, known, fused, mode)


def _disabled() -> frozenset[str]:
    names = frozenset(name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip())
    for name in sorted(names):
        require_choice(f"a name in {DISABLE}", name, OPS)
    return names


def _patch_model(model: nn.Module, ops: frozenset[str], known: Stock, fused: FusedBlock, mode: str) -> SD3Patch:
    # By their name, so that those which only have that are reported as kept.
    blocks = {name: module for name, module in model.named_modules() if _is_called_a_block(module)}
    if not blocks:
        raise ValueError(
            f"model is a {type(model).__name__} without JointTransformerBlocks; accepted is an SD3 transformer."
        )
    if any(_is_patched(block) for block in blocks.values()):
        raise ValueError("model is patched already; accepted is one that is not: call unapply() of its patch first.")
    patch = SD3Patch()
    served = _note_missing_triton(patch, next(model.parameters()))
    for name, block in blocks.items():
        obstacle = _has_own_forward(block) or _is_somebody_else_s(block, known)
        if served:
            _report_block(patch, name, block, fused.ops, known, obstacle)
        if fused.ops and not obstacle:
            _swap_class(patch, block, functools.partial(_block_method, patch, fused))
    layers = {name: module for name, module in model.named_modules() if is_lora_layer(module)}
    if "lora" in ops:
        method = _merged_method if mode == "infer" else _lora_method
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
    return patch


def _patch_classes(ops: frozenset[str], known: Stock, fused: FusedBlock) -> SD3Patch:
    patch = SD3Patch()
    served = _note_missing_triton(patch, None)
    targets: list[tuple[type[nn.Module], Callable[[Callable[..., Any]], Callable[..., Any]]]] = []
    if fused.ops:
        if issubclass(known.block, Exchanged):
            patch.kept["blocks"] = "somebody has exchanged the forward of JointTransformerBlock"
        else:
            targets.append((known.block, functools.partial(_block_method, patch, fused)))
            patch.replaced |= {op: 1 for op in sorted(fused.ops) if served}
    if "lora" in ops:
        try:
            from peft.tuners.lora.layer import Linear
        except ImportError:
            patch.kept["LoRA layers"] = "PEFT is not installed"
        else:
            if is_as_written(Linear):
                targets.append((Linear, functools.partial(_lora_method, patch)))
                patch.replaced["lora"] = 1
            else:
                patch.kept["LoRA layers"] = "somebody has exchanged the forward of PEFT's LoRA Linear"
    for cls, _ in targets:
        if _is_patched(cls):
            patch.unapply()
            raise ValueError(f"{cls.__name__} is patched already; call unapply() of its patch first.")
    for cls, wrap in targets:
        stock = cls.forward
        setattr(cls, MARK, patch)
        cls.forward = wrap(stock)
        patch._undo.append(functools.partial(_restore_class, cls, stock))
    return patch


def _block_method(patch: SD3Patch, fused: FusedBlock, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.active:
            return stock(block, *args, **kwargs)
        return fused.forward(stock, block, *args, **kwargs)

    return forward


def _lora_method(patch: SD3Patch, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(stock)
    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not patch.active:
            return stock(layer, x, *args, **kwargs)
        return lora_forward(layer, x, *args, stock=stock, **kwargs)

    return forward


def _merged_method(patch: SD3Patch, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    unmerged = _lora_method(patch, stock)

    @functools.wraps(stock)
    def forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        mergeable = patch.active and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or args or kwargs)
        if not mergeable or layer.disable_adapters or len(names) != 1 or merge_obstacle(layer, names[0]):
            return unmerged(layer, x, *args, **kwargs)
        return F.linear(x, _merged(patch, layer, names[0]), layer.base_layer.bias)

    return forward


def _merged(patch: SD3Patch, layer: Any, name: str) -> Tensor:
    """The merged weight of `layer`, kept in its patch as long as nothing it is made of changes.

    Not as PolicySet keeps them, an adapter's of all layers at once, made when the policy is put in force: here PEFT's
    own calls change the adapter of any layer at any time, and its forward pass is the first to learn of it.
    """
    made_of = name, merge_stamp(layer, name)
    if layer not in patch._merged or patch._merged[layer][0] != made_of:
        patch._merged[layer] = made_of, merged_weight(layer, name)
    return patch._merged[layer][1]


def _is_called_a_block(module: nn.Module) -> bool:
    return any(cls.__name__ == "JointTransformerBlock" for cls in type(module).__mro__)


def _is_somebody_else_s(block: nn.Module, known: Stock) -> str | None:
    return None if is_exactly(block, known.block) else f"it is a {class_of(block)}"


def _has_own_forward(module: nn.Module) -> str | None:
    """Somebody else has replaced the forward of this one module, which hides that of its class."""
    return "its forward has been replaced already" if "forward" in module.__dict__ else None


def _is_patched(module: object) -> bool:
    patch = getattr(module, MARK, None)
    return patch is not None and patch.active


def _swap_class(patch: SD3Patch, module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
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


def _restore_class(cls: type[nn.Module], stock: Callable[..., Any]) -> None:
    delattr(cls, MARK)
    cls.forward = stock


def _report_block(
    patch: SD3Patch, name: str, block: Any, ops: frozenset[str], known: Stock, obstacle: str | None
) -> None:
    if reason := obstacle or reason_to_keep(block, known):
        patch.kept[name] = reason
        return
    for op in sorted(ops & {"adaln", "gate"}):
        patch.replaced[op] = patch.replaced.get(op, 0) + 1
    if "gelu" in ops:
        reasons = {
            part: reason_to_keep_feed_forward(getattr(block, part), known)
            for part in ("ff", "ff_context")
            if getattr(block, part, None) is not None
        }
        patch.kept |= {f"{name}.{part}": reason for part, reason in reasons.items() if reason}
        if not any(reasons.values()):
            patch.replaced["gelu"] = patch.replaced.get("gelu", 0) + 1
    if "qk_norm" in ops:
        for part in ("attn", "attn2"):
            attn = getattr(block, part, None)
            if attn is None:
                continue
            if reason := reason_to_keep_attention(attn, known):
                patch.kept[f"{name}.{part}"] = reason
            else:
                patch.replaced["qk_norm"] = patch.replaced.get("qk_norm", 0) + 1
                _note_norms_without_zeros(patch, attn)


def _note_norms_without_zeros(patch: SD3Patch, attn: Any) -> None:
    """Lets the norms' backward pass start from their outputs, which divides by their weights."""
    norms = [getattr(attn, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    weights = [norm.weight for norm in norms if norm is not None]
    for name in (WITHOUT_ZEROS, CHECKED_WEIGHTS):
        attn.__dict__.pop(name, None)  # of a model that this one is a copy of
    if any(weight.is_meta for weight in weights):
        return
    # Shapes without numbers, as in a trace, stand for weights as they are.
    if any(map(is_fake, weights)) or bool(torch.cat(weights).all()):
        attn.__dict__ |= {WITHOUT_ZEROS: True, CHECKED_WEIGHTS: tuple(map(stamp, weights))}
        for name in (WITHOUT_ZEROS, CHECKED_WEIGHTS):
            patch._undo.append(functools.partial(attn.__dict__.pop, name, None))


def _note_missing_triton(patch: SD3Patch, like: Tensor | None) -> bool:
    """Whether the kernels run on tensors like `like`; notes it where they do not."""
    if like is None:
        like = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    served = triton_ops.serves(torch.empty(0, device=like.device, dtype=like.dtype))
    if not served:
        patch.kept["blocks"] = f"Triton does not run on {like.dtype} on {like.device.type} here; the stock blocks do"
    return served
