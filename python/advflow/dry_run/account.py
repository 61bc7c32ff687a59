"""Parameters, FLOPs and memory of a model's passes, counted on tensors that have shapes and no data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from advflow.models.family import ModelFamily, Outline
from advflow.settings.model import ModelConfig

_LOOSE = 1.02  # how far above the highest peak a count with dead tensors in it may go before it is made anew


@dataclass(frozen=True)
class Account:
    """Numbers of parameters, FLOPs of one image, bytes.

    Args:
        parameters: of the transformer, without adapters.
        buffers: numbers in what it keeps beside them, such as a table of positions.
        trained: of them, or of an adapter.
        merged: of the layers that an adapter changes.
        decoder: parameters.
        encoders: parameters of what reads prompts.
        forward: FLOPs of a pass without gradients.
        learning: of one forward and backward.
        kept: the most bytes that a learner's pass over a micro-batch holds until its backward pass.
        decoding: the most bytes while images are decoded, beside the decoder.
        embedding: bytes of a prompt.
        latent: numbers of an image's latents.
    """

    parameters: int
    buffers: int
    trained: int
    merged: int
    decoder: int
    encoders: int
    forward: int
    learning: int
    kept: int
    decoding: int
    embedding: int
    latent: int


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made while it is open have held at one moment, within 2 %."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, op: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        known = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        result = op(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                replaced = self._alive.get(storage._cdata)
                self._held += storage.nbytes() - (replaced[1] if replaced else 0)
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._held > self.peak * _LOOSE:
            self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
            self._held = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._held)
        return result


def account(family: ModelFamily, outline: Outline, config: ModelConfig, micro_batch: int, decoded: int) -> Account:
    """Of the learner's pass over `micro_batch` images, and of `decoded` images decoded at a time.

    Counted on diffusers' own blocks and PEFT's own layers.
    """
    transformer = outline.transformer.requires_grad_(False)
    parameters, buffers = _numel(transformer.parameters()), _numel(transformer.buffers())
    merged = 0
    if config.trainable == "lora":
        targets = list(family.lora_targets) if config.lora_targets is None else config.lora_targets
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
        with torch.device("meta"):
            transformer.add_adapter(lora)
        layers = {name.partition(".lora_A.")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name}
        merged = sum(_numel(transformer.get_submodule(f"{layer}.base_layer").parameters()) for layer in layers)
    else:
        transformer.requires_grad_(True)
    trained = _numel(each for each in transformer.parameters() if each.requires_grad)
    blocks = list(family.blocks(transformer))
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast on a CPU, which stands for a GPU here
        _fill(transformer, getattr(torch, config.dtype))
        _fill(outline.decoder, getattr(torch, config.vae_dtype))
        forward, learning, kept = _passes(family, outline, micro_batch)
        if config.gradient_checkpointing:  # what one block keeps comes on top of what lies between them
            whole = kept
            transformer.enable_gradient_checkpointing()
            kept = _passes(family, outline, micro_batch)[2] + whole // len(blocks)
            learning += forward
        with torch.no_grad(), PeakBytes() as decoding:
            outline.decode(outline.decoder, torch.empty(decoded, *outline.latents))
        told = outline.tensors(outline.conditioning(1))
    return Account(
        parameters,
        buffers,
        trained,
        merged,
        _numel(outline.decoder.parameters()),
        sum(_numel(each.parameters()) for each in outline.encoders),
        forward,
        learning,
        kept,
        decoding.peak,
        sum(each.nbytes for each in told.values()),
        torch.Size(outline.latents).numel(),
    )


def _passes(family: ModelFamily, outline: Outline, count: int) -> tuple[int, int, int]:
    """FLOPs of a forward pass and of both passes, an image each, and the peak of the bytes held by the first."""
    x, t = torch.empty(count, *outline.latents), torch.empty(count)
    flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    with flops:
        with PeakBytes() as peak:
            v = family.velocity(outline.transformer, x, family.timesteps(t), outline.conditioning(count))
        forward = flops.get_total_flops()
        v.float().sum().backward()
    for parameter in outline.transformer.parameters():
        parameter.grad = None
    return forward // count, flops.get_total_flops() // count, peak.peak


def _forward_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward_attention(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# The attention of a CPU, which torch has no formula for; a GPU's has as many products.
_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_attention,
}


def _fill(module: nn.Module, frozen: torch.dtype) -> None:
    """Gives parameters and buffers on the meta device fake data: what is trained in fp32, the rest in `frozen`."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if parameter.requires_grad else frozen
                made = torch.empty(parameter.shape, dtype=dtype)
                each._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                dtype = frozen if buffer.is_floating_point() else buffer.dtype
                each._buffers[name] = torch.empty(buffer.shape, dtype=dtype)


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(each.numel() for each in tensors)


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
