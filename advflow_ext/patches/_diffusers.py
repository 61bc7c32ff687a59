"""The classes of diffusers whose computation the fused blocks know."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn

from advflow_ext.nn._identity import is_as_written

OLDEST = (0, 31)  # the first with SD3.5's second attention; `python -m bench.exactness.diffusers_versions` tries others


class Exchanged:
    """No module is of this class."""


class Stock(NamedTuple):
    """diffusers' and torch's own classes, by what they are to a block.

    In place of one whose forward somebody has exchanged stands Exchanged, of which nothing is.
    """

    block: type[nn.Module]
    norm1: type[nn.Module]
    norm1_dual: type[nn.Module]
    norm1_last_context: type[nn.Module]
    layer_norm: type[nn.Module]
    rms_norms: tuple[type[nn.Module], ...]
    attention: type[nn.Module]
    processor: type
    feed_forward: type[nn.Module]
    gelu: type[nn.Module]


def stock_classes() -> Stock:
    """Imports diffusers. Raises ImportError where there is none, or an older one than OLDEST."""
    try:
        from diffusers import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"apply_to_sd3 needs diffusers {_written(OLDEST)} or newer, and none is installed."
        ) from error
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        raise ImportError(f"diffusers is {version}; accepted by apply_to_sd3 is {_written(OLDEST)} or newer.")
    from diffusers.models.activations import GELU
    from diffusers.models.attention import FeedForward, JointTransformerBlock
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
    from diffusers.models.normalization import (
        AdaLayerNormContinuous,
        AdaLayerNormZero,
        RMSNorm,
        SD35AdaLayerNormZeroX,
    )

    return Stock(
        block=_own(JointTransformerBlock),
        norm1=_own(AdaLayerNormZero),
        norm1_dual=_own(SD35AdaLayerNormZeroX),
        norm1_last_context=_own(AdaLayerNormContinuous),
        layer_norm=_own(nn.LayerNorm),
        rms_norms=(_own(RMSNorm), _own(nn.RMSNorm)),
        attention=_own(Attention),
        processor=_own(JointAttnProcessor2_0),
        feed_forward=_own(FeedForward),
        gelu=_own(GELU),
    )


def _own(cls: type) -> Any:
    return cls if is_as_written(cls) else Exchanged


def _written(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
