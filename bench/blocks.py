"""The ops of SD3.5's transformer blocks, at the shapes of SD3.5 Medium: ``batch x image tokens x width``.

Each is measured forward without gradients (``NAME_forward``), forward and backward with frozen modulation or norm
weights (``NAME``), and with trained ones (``NAME_trained``); the low-rank layer forward, and with trained adapters on a
frozen base. All activations ask for gradients, as in a block with adapters below it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import advflow_ext as af
from bench.losses import AUTOTUNE, generator
from bench.registry import (
    DTYPES,
    MAX_AUTOTUNE,
    OURS,
    Arguments,
    Case,
    Check,
    Implementation,
    Result,
    Shape,
)

HEAD_DIM = 64
EPS = 1e-6
RANK, LORA_SCALE = 32, 2.0  # as advflow trains SD3.5 Medium
LIGER = "liger"

FORWARD, FROZEN, TRAINED = "forward", "frozen", "trained"

# Of the error beside roundings to half precision: sums of up to 1536 terms in float32. How many roundings: ours rounds
# each result once, and starts its backward pass from a rounded input; stock modules round up to four times in a row.
ALLOWED = 1e-5
ROUNDINGS = {OURS: 1, "baseline": 4}

Tensors = Sequence[Tensor]
Function = Callable[[Tensors, Tensors], tuple[Tensor, ...]]  # of activations and parameters


def shape_obstacle(shape: Shape) -> str | None:
    """Why the ops of a block cannot have this shape, as a sentence."""
    if len(shape) == 3 and shape[2] % HEAD_DIM == 0:
        return None
    given = "x".join(map(str, shape))
    return f"shape {given}: accepted for the ops of a block is batch x tokens x width, the width a multiple of 64."


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


class Block:
    """One function of ``advflow_ext.nn`` in one mode."""

    shapes: list[Shape] = [(4, 1024, 1536)]
    refs: tuple[bool | None, ...] = (None,)

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        """Of the inputs, which always ask for gradients."""
        raise NotImplementedError

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        """What is frozen or trained; ``normal(*sizes, dtype=None)`` draws in the dtype of the case."""
        raise NotImplementedError

    def result_shapes(self, shape: Shape) -> list[Shape]:
        raise NotImplementedError

    def functions(self) -> dict[str, Function]:
        """Ours and the baselines that are not compiled."""
        raise NotImplementedError

    def bytes_moved(self, case: Case) -> int:
        raise NotImplementedError

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        random = generator(device, seed)

        def normal(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(sizes, generator=random, device=device).to(dtype or DTYPES[case.dtype])

        activations = [normal(*sizes) for sizes in self.activation_shapes(case.shape)]
        parameters = self.parameters(case.shape, normal)
        incoming: list[Tensor] = []
        if self.mode != FORWARD:
            incoming = [normal(*sizes) for sizes in self.result_shapes(case.shape)]
            for activation in activations:
                activation.requires_grad_()
        if self.mode == TRAINED:
            self.train(parameters)
        call = {f"activation {i}": tensor for i, tensor in enumerate(activations)}
        call |= {f"parameter {i}": tensor for i, tensor in enumerate(parameters)}
        return Arguments(call, incoming=tuple(incoming))

    def train(self, parameters: Tensors) -> None:
        for parameter in parameters:
            parameter.requires_grad_()

    def implementations(self, device: torch.device) -> dict[str, Implementation]:
        functions = self.functions()
        eager = functions["eager"]
        functions["compile"] = torch.compile(eager, dynamic=False)
        if device.type == "cuda":
            functions[MAX_AUTOTUNE] = torch.compile(eager, dynamic=False, mode=AUTOTUNE)
        if not has_liger():
            functions.pop(LIGER, None)
        return {
            name: Implementation(functools.partial(self.run, function), OURS if name == OURS else "baseline")
            for name, function in functions.items()
        }

    def run(self, function: Function, arguments: Arguments) -> Result:
        """Results, then gradients of what asks for one: of activations, then of parameters."""
        activations, parameters = operands(arguments.call)
        if self.mode == FORWARD:
            with torch.no_grad():
                return function(activations, parameters)
        results = function(activations, parameters)
        wanted = [tensor for tensor in (*activations, *parameters) if tensor.requires_grad]
        return *(result.detach() for result in results), *torch.autograd.grad(results, wanted, arguments.incoming)

    def truth(self, arguments: Arguments) -> Result:
        call = {
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            for name, tensor in arguments.call.items()
        }
        wide = Arguments(call, incoming=tuple(grad.double() for grad in arguments.incoming))
        return self.run(self.functions()["eager"], wide)

    def check(self, case: Case, arguments: Arguments, truth: Result, result: Result, standard: str) -> Check:
        """``numbers`` are the gradients of parameters, ``latents`` everything else; the worst tensor counts."""
        errors = [
            float((mine.detach().double() - exact).norm() / exact.norm().clamp(min=1e-300))
            for mine, exact in zip(result, truth, strict=True)
        ]
        of_parameters = sum(tensor.requires_grad for tensor in operands(arguments.call)[1])
        latents, numbers = errors[: len(errors) - of_parameters], errors[len(errors) - of_parameters :]
        dtype = DTYPES[case.dtype]
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        limit = ALLOWED + ROUNDINGS[standard] * rounding
        return Check(worst(numbers), worst(latents), limit, limit)


def worst(errors: list[float]) -> float:
    """The largest, NaN above all."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=0.0)


def operands(call: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Activations and parameters."""
    activations = [tensor for name, tensor in call.items() if name.startswith("activation")]
    return activations, list(call.values())[len(activations) :]


# ---------------------------------------------------------------------------------------------------------------------
# Queries, keys and values

Norm = Callable[[Tensor, Tensor], Tensor]


def diffusers_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm, operator by operator."""
    variance = x.to(torch.promote_types(x.dtype, torch.float32)).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    if weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(weight.dtype)
    return x * weight


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (HEAD_DIM,), weight, EPS)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm as norm

    out: Tensor = norm(x, weight, EPS, 0.0, "llama", False)
    return out


def diffusers_joint(activations: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
    """JointAttnProcessor2_0 up to attention: heads before tokens, then norms, then a concatenation."""
    split = [x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for x in activations]
    q, k = diffusers_rms_norm(split[0], weights[0]), diffusers_rms_norm(split[1], weights[1])
    if len(split) == 2:
        return q, k
    text = diffusers_rms_norm(split[3], weights[2]), diffusers_rms_norm(split[4], weights[3]), split[5]
    return tuple(torch.cat(pair, 2) for pair in zip((q, k, split[2]), text, strict=True))


def joint_by(norm: Norm) -> Function:
    """With a library's norm, whose input stays contiguous: heads come first when everything is done."""

    def joint(activations: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
        split = [x.unflatten(-1, (-1, HEAD_DIM)) for x in activations]
        parts = [norm(split[0], weights[0]), norm(split[1], weights[1])]
        if len(split) > 2:
            text = [norm(split[3], weights[2]), norm(split[4], weights[3]), split[5]]
            parts = [torch.cat(pair, 1) for pair in zip([*parts, split[2]], text, strict=True)]
        return tuple(part.transpose(1, 2) for part in parts)

    return joint


def our_joint(activations: Tensors, weights: Tensors) -> tuple[Tensor, ...]:
    heads = activations[0].shape[2] // HEAD_DIM
    keep: Literal["inputs", "outputs"] = "inputs" if weights[0].requires_grad else "outputs"  # as apply_to_sd3 chooses
    if len(activations) == 2:
        q, k = activations
        joint = af.nn.joint_qk_norm(q, k, k, *weights, heads=heads, keep=keep)[:2]  # v is looked at and handed back
    else:
        q, k, v, *text = activations
        given: Any = {"heads": heads, "text": tuple(text), "text_weights": weights[2:], "keep": keep}
        joint = af.nn.joint_qk_norm(q, k, v, *weights[:2], **given)
    return tuple(part.transpose(1, 2) for part in joint)


class JointQKNorm(Block):
    """Attention's q, k and v of image and text, or q and k of the image alone, as attention takes them."""

    def __init__(self, text: bool, mode: str) -> None:
        super().__init__(mode)
        self.text = text

    def text_tokens(self, shape: Shape) -> int:
        """SD3.5's 205 (77 of CLIP, 128 of T5); never more than image tokens, for small shapes."""
        return min(205, shape[1]) if self.text else 0

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        batch, _, width = shape
        return [shape] * 3 + [(batch, self.text_tokens(shape), width)] * 3 if self.text else [shape] * 2

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        return [1 + 0.1 * normal(HEAD_DIM) for _ in range(4 if self.text else 2)]

    def result_shapes(self, shape: Shape) -> list[Shape]:
        batch, tokens, width = shape
        return [(batch, tokens + self.text_tokens(shape), width // HEAD_DIM, HEAD_DIM)] * (3 if self.text else 2)

    def arguments(self, case: Case, device: torch.device, seed: int) -> Arguments:
        """Gradients lie as attention's backward pass leaves them where q, k and v were ours: tokens before heads."""
        given = super().arguments(case, device, seed)
        return Arguments(given.call, incoming=tuple(grad.transpose(1, 2) for grad in given.incoming))

    def functions(self) -> dict[str, Function]:
        return {
            OURS: our_joint,
            "eager": diffusers_joint,
            "library": joint_by(torch_rms_norm),
            LIGER: joint_by(liger_rms_norm),
        }

    def bytes_moved(self, case: Case) -> int:
        """Forward each is read and written; backward their gradients, and q and k are read again."""
        streams = 3 if self.text else 2
        passes = 2 * streams + (0 if self.mode == FORWARD else 2 * streams + 2)
        batch, tokens, width = case.shape
        return passes * batch * (tokens + self.text_tokens(case.shape)) * width * DTYPES[case.dtype].itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Gates, layer norm, modulation


def pairs(tensors: Tensors) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def liger_layer_norm(x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm as norm

    out: Tensor = norm(x, *ones_and_zeros(x.shape[-1], x.dtype, x.device), EPS)
    return out


@functools.cache
def ones_and_zeros(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)


def torch_layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class AdaLN(Block):
    """Gated ``branches`` joined to a residual, then layer norm with ``modulations``; any of the two may be none."""

    def __init__(self, branches: int, modulations: int, mode: str) -> None:
        super().__init__(mode)
        self.branches, self.modulations = branches, modulations

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        return [shape] * (1 + self.branches)

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        """Gates, then scale and shift of each modulation: pieces of one projection, as a block's are."""
        count = self.branches + 2 * self.modulations
        return list(normal(shape[0], count * shape[2]).chunk(count, 1))

    def result_shapes(self, shape: Shape) -> list[Shape]:
        return [shape] * ((self.branches > 0) + self.modulations)

    def functions(self) -> dict[str, Function]:
        found: dict[str, Function] = {
            OURS: self.ours,
            "eager": self.diffusers,
            "library": functools.partial(self.by_addcmul, torch_layer_norm),
        }
        if self.modulations:
            found[LIGER] = functools.partial(self.by_addcmul, liger_layer_norm)
        return found

    def ours(self, activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
        residual, *branches = activations
        gated = list(zip(branches, parameters[: self.branches], strict=True))
        modulations = pairs(parameters[self.branches :])
        if not gated:
            return af.nn.layer_norm_modulate(residual, *modulations, eps=EPS)
        if not modulations:
            return (af.nn.gate_residual(residual, *gated),)
        return af.nn.gate_residual_layer_norm_modulate(residual, gated, modulations[0], eps=EPS)

    def diffusers(self, activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
        """As JointTransformerBlock and its norms write it."""
        h, *branches = activations
        for x, gate in zip(branches, parameters, strict=False):
            h = h + gate.unsqueeze(1) * x
        results = [h] if branches else []
        if self.modulations:
            normed = torch_layer_norm(h)
            for scale, shift in pairs(parameters[self.branches :]):
                results.append(normed * (1 + scale[:, None]) + shift[:, None])
        return tuple(results)

    def by_addcmul(
        self, norm: Callable[[Tensor], Tensor], activations: Tensors, parameters: Tensors
    ) -> tuple[Tensor, ...]:
        """With the fewest launches that PyTorch's own functions allow."""
        h, *branches = activations
        for x, gate in zip(branches, parameters, strict=False):
            h = torch.addcmul(h, gate.unsqueeze(1), x)
        results = [h] if branches else []
        if self.modulations:
            normed = norm(h)
            for scale, shift in pairs(parameters[self.branches :]):
                results.append(torch.addcmul(shift[:, None], normed, 1 + scale[:, None]))
        return tuple(results)

    def bytes_moved(self, case: Case) -> int:
        """Each activation, result and gradient once, and what is normalised again for its gradient."""
        gates, norms = self.branches, self.modulations
        passes = 1 + gates + (gates > 0) + norms
        if self.mode != FORWARD:
            passes += (gates > 0) + norms + 2 * (norms > 0) + gates
        if self.mode == TRAINED:
            passes += gates
        return passes * math.prod(case.shape) * DTYPES[case.dtype].itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers with an adapter


class LoraLinear(Block):
    """A projection of attention on a frozen base; ``adapter_dtype`` None: that of the case."""

    def __init__(self, adapter_dtype: torch.dtype | None, mode: str) -> None:
        super().__init__(mode)
        self.adapter_dtype = adapter_dtype

    def activation_shapes(self, shape: Shape) -> list[Shape]:
        return [shape]

    def parameters(self, shape: Shape, normal: Callable[..., Tensor]) -> list[Tensor]:
        """Weight, bias, and the adapter's two matrices."""
        width = shape[2]
        adapters = [normal(RANK, width, dtype=self.adapter_dtype), normal(width, RANK, dtype=self.adapter_dtype)]
        return [normal(width, width) / width**0.5, normal(width), adapters[0] / width**0.5, adapters[1] / RANK**0.5]

    def train(self, parameters: Tensors) -> None:
        super().train(parameters[2:])

    def result_shapes(self, shape: Shape) -> list[Shape]:
        return [shape]

    def functions(self) -> dict[str, Function]:
        def ours(activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
            return (af.nn.lora_linear(activations[0], *parameters, LORA_SCALE),)

        def peft(activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
            return (af.reference.lora_linear(activations[0], *parameters, LORA_SCALE),)

        def library(activations: Tensors, parameters: Tensors) -> tuple[Tensor, ...]:
            """The adapters are cast, not the activations; scale and sum are one launch."""
            (x,), (weight, bias, a, b) = activations, parameters
            low_rank = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            return (torch.add(F.linear(x, weight, bias), low_rank, alpha=LORA_SCALE),)

        return {OURS: ours, "eager": peft, "library": library}

    def bytes_moved(self, case: Case) -> int:
        """Three matrix products forward, four backward: their roof is FLOPs where there are many tokens."""
        size, width = DTYPES[case.dtype].itemsize, case.shape[2]
        adapters = 2 * RANK * width * (self.adapter_dtype or DTYPES[case.dtype]).itemsize
        activation, weight = math.prod(case.shape) * size, width * width * size
        if self.mode == FORWARD:
            return 2 * activation + weight + adapters
        return 5 * activation + 2 * weight + 3 * adapters


def in_modes(name: str, block: Callable[[str], Block]) -> dict[str, Block]:
    return {name: block(FROZEN), f"{name}_forward": block(FORWARD), f"{name}_trained": block(TRAINED)}


BLOCKS: dict[str, Block] = {
    **in_modes("joint_qk_norm", functools.partial(JointQKNorm, True)),
    **in_modes("joint_qk_norm_image", functools.partial(JointQKNorm, False)),
    **in_modes("layer_norm_modulate", functools.partial(AdaLN, 0, 1)),
    **in_modes("layer_norm_modulate_2", functools.partial(AdaLN, 0, 2)),
    **in_modes("gate_residual", functools.partial(AdaLN, 1, 0)),
    **in_modes("gate_residual_layer_norm_modulate", functools.partial(AdaLN, 1, 1)),
    **in_modes("gate_residual_layer_norm_modulate_2", functools.partial(AdaLN, 2, 1)),
    "lora_linear": LoraLinear(None, TRAINED),
    "lora_linear_forward": LoraLinear(None, FORWARD),
    "lora_linear_fp32": LoraLinear(torch.float32, TRAINED),
    "lora_linear_fp32_forward": LoraLinear(torch.float32, FORWARD),
}
