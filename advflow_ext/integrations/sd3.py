"""One call that makes diffusers' Stable Diffusion 3 transformer run on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

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

from advflow_ext.integrations._sd3_block import (
    CHECKED_WEIGHTS,
    WITHOUT_ZEROS,
    FusedBlock,
    is_a,
    reason_to_keep,
    reason_to_keep_attention,
)
from advflow_ext.integrations._verify import Verifier
from advflow_ext.nn import _backend
from advflow_ext.nn.lora import is_lora_layer, lora_forward, lora_obstacle, merge_obstacle, merged_weight
from advflow_ext.nn.modulation_cache import stamp
from advflow_ext.ops._checks import require_choice, require_flag

OPS = ("qk_norm", "adaln", "gate", "gelu", "lora")
DISABLE = "ADVFLOW_DISABLE"
_MARK = "_advflow_sd3_patch"


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

    Works on diffusers' ``SD3Transformer2DModel``, alone or inside PEFT, DDP or FSDP2 wrappers, before or after any of
    them; under autocast, gradient checkpointing and ``torch.compile`` (whole or block by block). Only PEFT's adapters
    have to be there first. A part of a block that has hooks, or that somebody else has wrapped or replaced, keeps its
    own forward. Nothing waits for the
    device once ``verify`` has seen what it met, so a CUDA graph can be captured then; no GPU has confirmed that yet.
    Parameters, state dicts and saved adapters are untouched: only forward passes are replaced.

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
        verify: "first" compares each op with the formula it replaces, result and gradients, the first time it meets a
            combination of dtypes and shapes, and leaves it to the stock formula, with a warning, where it is worse.
            Inside what torch.compile compiles nothing is compared.

    The environment variable ADVFLOW_DISABLE, a comma-separated list of these five names, switches ops off.
    Where Triton cannot run, the stock blocks do, and the report says so; the LoRA layers need no Triton.

    Returns an :class:`SD3Patch`, which says what was replaced and what was kept and why, and takes it all back.

    Raises ValueError for a model without SD3 blocks, for one that is patched already, and for unknown names.
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
    fused = FusedBlock(ops - {"lora"}, Verifier() if verify else None)
    return _patch_classes(ops, fused) if model is None else _patch_model(model, ops, fused, mode)


def _disabled() -> frozenset[str]:
    names = frozenset(name.strip() for name in os.environ.get(DISABLE, "").split(",") if name.strip())
    for name in sorted(names):
        require_choice(f"a name in {DISABLE}", name, OPS)
    return names


def _patch_model(model: nn.Module, ops: frozenset[str], fused: FusedBlock, mode: str) -> SD3Patch:
    blocks = {name: module for name, module in model.named_modules() if is_a(module, "JointTransformerBlock")}
    if not blocks:
        raise ValueError(
            f"model is a {type(model).__name__} without JointTransformerBlocks; accepted is an SD3 transformer."
        )
    if any(_is_patched(block) for block in blocks.values()):
        raise ValueError("model is patched already; accepted is one that is not: call unapply() of its patch first.")
    patch = SD3Patch()
    served = _note_missing_triton(patch, next(model.parameters()))
    for name, block in blocks.items():
        if served:
            _report_block(patch, name, block, fused.ops)
        if fused.ops and not _has_own_forward(block):
            _swap_class(patch, block, functools.partial(_block_method, patch, fused))
    layers = {name: module for name, module in model.named_modules() if is_lora_layer(module)}
    if "lora" in ops:
        method = _merged_method if mode == "infer" else _lora_method
        for name, layer in layers.items():
            if obstacle := _has_own_forward(layer) or lora_obstacle(layer):
                patch.kept[name] = obstacle
            else:
                patch.replaced["lora"] = patch.replaced.get("lora", 0) + 1
            # Patched either way: an obstacle, such as training mode with dropout, may go away.
            _swap_class(patch, layer, functools.partial(method, patch))
    return patch


def _patch_classes(ops: frozenset[str], fused: FusedBlock) -> SD3Patch:
    from diffusers.models.attention import JointTransformerBlock

    patch = SD3Patch()
    served = _note_missing_triton(patch, None)
    targets: list[tuple[type[nn.Module], Callable[[Callable[..., Any]], Callable[..., Any]]]] = []
    if fused.ops:
        targets.append((JointTransformerBlock, functools.partial(_block_method, patch, fused)))
        patch.replaced |= {op: 1 for op in sorted(fused.ops) if served}
    if "lora" in ops:
        try:
            from peft.tuners.lora.layer import Linear
        except ImportError:
            patch.kept["LoRA layers"] = "PEFT is not installed"
        else:
            targets.append((Linear, functools.partial(_lora_method, patch)))
            patch.replaced["lora"] = 1
    for cls, _ in targets:
        if _is_patched(cls):
            patch.unapply()
            raise ValueError(f"{cls.__name__} is patched already; call unapply() of its patch first.")
    for cls, wrap in targets:
        stock = cls.forward
        setattr(cls, _MARK, patch)
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
    """The merged weight of `layer`, kept in its patch as long as nothing it is made of changes."""
    tensors = layer.base_layer.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    made_of = (name, layer.scaling[name], *map(stamp, tensors))
    if layer not in patch._merged or patch._merged[layer][0] != made_of:
        patch._merged[layer] = made_of, merged_weight(layer, name)
    return patch._merged[layer][1]


def _has_own_forward(module: nn.Module) -> str | None:
    """Somebody else has replaced the forward of this one module, which hides that of its class."""
    return "its forward has been replaced already" if "forward" in module.__dict__ else None


def _is_patched(module: object) -> bool:
    patch = getattr(module, _MARK, None)
    return patch is not None and patch.active


def _swap_class(patch: SD3Patch, module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Makes `module` one of a class derived from its own, which all modules of that class share.

    Were each given a forward of its own instead, torch.compile would compile each of them anew.
    """
    cls = type(module)
    derived = patch._derived.get(cls)
    if derived is None:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        derived = type(cls.__name__, (cls,), {**names, "forward": wrap(cls.forward), _MARK: patch})
        patch._derived[cls] = derived
    module.__class__ = derived
    patch._undo.append(functools.partial(_restore_class_of, module, derived, cls))


def _restore_class_of(module: nn.Module, derived: type[nn.Module], cls: type[nn.Module]) -> None:
    if type(module) is derived:  # or FSDP2 has derived from it in turn; then the forward passes on to the stock one
        module.__class__ = cls


def _restore_class(cls: type[nn.Module], stock: Callable[..., Any]) -> None:
    delattr(cls, _MARK)
    cls.forward = stock


def _report_block(patch: SD3Patch, name: str, block: Any, ops: frozenset[str]) -> None:
    if reason := _has_own_forward(block) or reason_to_keep(block):
        patch.kept[name] = reason
        return
    for op in sorted(ops - {"qk_norm"}):
        patch.replaced[op] = patch.replaced.get(op, 0) + 1
    if "qk_norm" in ops:
        for part in ("attn", "attn2"):
            attn = getattr(block, part, None)
            if attn is None:
                continue
            if reason := reason_to_keep_attention(attn):
                patch.kept[f"{name}.{part}"] = reason
            else:
                patch.replaced["qk_norm"] = patch.replaced.get("qk_norm", 0) + 1
                _note_norms_without_zeros(patch, attn)


def _note_norms_without_zeros(patch: SD3Patch, attn: Any) -> None:
    """Lets the norms' backward pass start from their outputs, which divides by their weights."""
    norms = [getattr(attn, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    weights = [norm.weight for norm in norms if norm is not None]
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
    served = _backend.serves(torch.empty(0, device=like.device, dtype=like.dtype))
    if not served:
        patch.kept["blocks"] = f"Triton does not run on {like.dtype} on {like.device.type} here; the stock blocks do"
    return served
