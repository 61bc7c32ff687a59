"""The classes of diffusers whose computation the fused blocks know."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from advflow_ext.nn._identity import is_as_written

# The first versions whose blocks compute what ours do; `python -m bench.exactness.diffusers_versions` tries others.
OLDEST_SD3 = (0, 31)  # has SD3.5's second attention
OLDEST_FLUX = (0, 35)  # has FluxAttention, and single blocks that are given the text on its own
OLDEST_QWEN_IMAGE = (0, 39)  # has the mask of the text in attention, before in its arguments or nowhere

_FLUX_BLOCK = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs")
_QWEN_IMAGE_BLOCK = (*_FLUX_BLOCK[:2], "encoder_hidden_states_mask", *_FLUX_BLOCK[2:], "modulate_index")


class Exchanged:
    """No module is of this class."""


@dataclass(frozen=True)
class Stock:
    """diffusers' and torch's own classes, by what they are to a block.

    In place of one whose forward somebody has exchanged stands Exchanged, of which nothing is.
    """

    block: type[nn.Module]
    attention: type[nn.Module]
    processor: type
    layer_norm: type[nn.Module]
    rms_norms: tuple[type[nn.Module], ...]
    feed_forward: type[nn.Module]
    gelu: type[nn.Module]
    linear: type[nn.Module]


@dataclass(frozen=True)
class SD3Stock(Stock):
    norm1: type[nn.Module]
    norm1_dual: type[nn.Module]
    norm1_last_context: type[nn.Module]


@dataclass(frozen=True)
class RotaryStock(Stock):
    home: ModuleType  # where the blocks find their rotation and their attention


@dataclass(frozen=True)
class FluxStock(RotaryStock):
    norm1: type[nn.Module]
    single_block: type[nn.Module]
    single_norm: type[nn.Module]
    single_gelu: type[nn.Module]


def sd3_classes() -> SD3Stock:
    """Imports diffusers. Raises ImportError where there is none, or an older one than OLDEST_SD3."""
    _require("apply_to_sd3", OLDEST_SD3)
    from diffusers.models.attention import JointTransformerBlock
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
    from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX

    return SD3Stock(
        block=_own(JointTransformerBlock),
        attention=_own(Attention),
        processor=_own(JointAttnProcessor2_0),
        norm1=_own(AdaLayerNormZero),
        norm1_dual=_own(SD35AdaLayerNormZeroX),
        norm1_last_context=_own(AdaLayerNormContinuous),
        **_common(),
    )


def flux_classes() -> FluxStock:
    """Imports diffusers. Raises ImportError where there is none, an older one than OLDEST_FLUX, or an unknown one."""
    _require("apply_to_flux", OLDEST_FLUX)
    from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
    from diffusers.models.transformers import transformer_flux as home

    for block in (home.FluxTransformerBlock, home.FluxSingleTransformerBlock):
        _require_arguments("apply_to_flux", block, _FLUX_BLOCK)
    return FluxStock(
        block=_own(home.FluxTransformerBlock),
        attention=_own(home.FluxAttention),
        processor=_own(home.FluxAttnProcessor),
        home=home,
        norm1=_own(AdaLayerNormZero),
        single_block=_own(home.FluxSingleTransformerBlock),
        single_norm=_own(AdaLayerNormZeroSingle),
        single_gelu=_own(nn.GELU),
        **_common(),
    )


def qwen_image_classes() -> RotaryStock:
    """Imports diffusers. Raises ImportError as flux_classes does, for an older one than OLDEST_QWEN_IMAGE."""
    _require("apply_to_qwen_image", OLDEST_QWEN_IMAGE)
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers import transformer_qwenimage as home

    block = home.QwenImageTransformerBlock
    _require_arguments("apply_to_qwen_image", block, _QWEN_IMAGE_BLOCK)
    return RotaryStock(
        block=_own(block, "forward", "_modulate"),
        attention=_own(Attention),
        processor=_own(home.QwenDoubleStreamAttnProcessor2_0),
        home=home,
        **_common(),
    )


def _common() -> dict[str, Any]:
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward
    from diffusers.models.normalization import RMSNorm

    return {
        "layer_norm": _own(nn.LayerNorm),
        "rms_norms": (_own(RMSNorm), _own(nn.RMSNorm)),
        "feed_forward": _own(FeedForward),
        "gelu": _own(GELU),
        "linear": _own(nn.Linear),
    }


def _require(function: str, oldest: tuple[int, int]) -> None:
    accepted = f"{'.'.join(map(str, oldest))} or newer"
    try:
        from diffusers import __version__ as version
    except ImportError as error:
        raise ImportError(f"{function} needs diffusers {accepted}, and none is installed.") from error
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < oldest:
        raise ImportError(f"diffusers is {version}; accepted by {function} is {accepted}.")


def _require_arguments(function: str, block: type[nn.Module], known: tuple[str, ...]) -> None:
    found = (*inspect.signature(block.forward).parameters,)[1:]
    if is_as_written(block) and found != known:  # one that is not is kept, whatever it takes
        raise ImportError(
            f"{block.__name__} of this diffusers takes ({', '.join(found)}); accepted by {function} is one that takes "
            f"({', '.join(known)})."
        )


def _own(cls: type, *methods: str) -> Any:
    return cls if all(is_as_written(cls, name) for name in methods or ("",)) else Exchanged
