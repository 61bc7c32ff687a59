"""One call that makes diffusers' Stable Diffusion 3 transformer run on the ops of :mod:`advflow_ext.nn`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from advflow_ext.nn._identity import MARK, is_as_written
from advflow_ext.patches._diffusers import Exchanged, sd3_classes
from advflow_ext.patches._patch import (
    TransformerPatch,
    block_method,
    chosen_ops,
    is_patched,
    joins_lora,
    lora_method,
    note_missing_triton,
    patch_model,
)
from advflow_ext.patches._sd3_block import SD3Block
from advflow_ext.patches._verify import Verifier


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
) -> TransformerPatch:
    """Makes the transformer blocks of Stable Diffusion 3 and 3.5 run on fused forward and backward kernels.

    Works on ``SD3Transformer2DModel`` of diffusers 0.31 or newer, alone or inside PEFT, DDP or FSDP2 wrappers, before
    or after any of them; under autocast, gradient checkpointing and ``torch.compile`` (whole or block by block). Only
    PEFT's adapters have to be there first. Nothing waits for the device once ``verify`` has seen what it met, so a CUDA
    graph can be captured then, as :class:`advflow_ext.CudaGraphs` does.

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
        lora: PEFT's LoRA linear layers (:func:`advflow_ext.nn.lora.lora_forward`); with ``qk_norm``, and to train,
            queries, keys and values of one token stream as one function, where they are such layers or frozen.
        mode: "infer" runs LoRA layers, where no gradient is asked for, on weights their one active adapter is merged
            into, which are kept beside the base's and computed anew when it changes. Inside torch.compile they run
            unmerged: :class:`advflow_ext.PolicySet` merges there, too, and for several policies. Needs a model.
        verify: "first" compares each op with what the modules it replaces compute themselves, result and gradients, the
            first time it meets a combination of dtypes and shapes, and leaves it to them, with a warning, where it is
            worse. Inside what torch.compile compiles nothing is compared.

    The environment variable ADVFLOW_DISABLE, a comma-separated list of these five names, switches ops off.
    Where Triton cannot run, the stock blocks do, and the report says so; the LoRA layers need no Triton.

    Returns an :class:`TransformerPatch`, which says what was replaced and what was kept and why, and takes it all back.

    Raises ValueError for a model without SD3 blocks, for one that is patched already, and for unknown names, and
    ImportError without diffusers, or with one that is too old.
    """
    ops = chosen_ops({"qk_norm": qk_norm, "adaln": adaln, "gate": gate, "gelu": gelu, "lora": lora}, mode, verify)
    if mode == "infer" and model is None:
        raise ValueError("mode is 'infer' without a model; accepted for the classes is 'train'.")
    known, verifier = sd3_classes(), Verifier() if verify else None
    fused = SD3Block(ops - {"lora"}, known, verifier, joint_lora=joins_lora(ops, mode))
    if model is None:
        return _patch_classes(ops, fused)
    return patch_model(model, "an SD3 transformer", ops, mode, fused)


def _patch_classes(ops: frozenset[str], fused: SD3Block) -> TransformerPatch:
    patch = TransformerPatch()
    served = note_missing_triton(patch, None)
    targets: list[tuple[type[nn.Module], Callable[[Callable[..., Any]], Callable[..., Any]]]] = []
    if fused.ops:
        if issubclass(fused.cls, Exchanged):
            patch.kept["blocks"] = "somebody has exchanged the forward of JointTransformerBlock"
        else:
            targets.append((fused.cls, functools.partial(block_method, patch, fused)))
            patch.replaced |= {op: 1 for op in sorted(fused.ops) if served}
    if "lora" in ops:
        try:
            from peft.tuners.lora.layer import Linear
        except ImportError:
            patch.kept["LoRA layers"] = "PEFT is not installed"
        else:
            if is_as_written(Linear):
                targets.append((Linear, functools.partial(lora_method, patch)))
                patch.replaced["lora"] = 1
            else:
                patch.kept["LoRA layers"] = "somebody has exchanged the forward of PEFT's LoRA Linear"
    for cls, _ in targets:
        if is_patched(cls):
            patch.unapply()
            raise ValueError(f"{cls.__name__} is patched already; call unapply() of its patch first.")
    for cls, wrap in targets:
        stock = cls.forward
        setattr(cls, MARK, patch)
        cls.forward = wrap(stock)
        patch._undo.append(functools.partial(_restore_class, cls, stock))
    return patch


def _restore_class(cls: type[nn.Module], stock: Callable[..., Any]) -> None:
    delattr(cls, MARK)
    cls.forward = stock
