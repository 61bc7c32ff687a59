"""What the loop asks of a model family. Each is one file here, made by its name in the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import ModelMixin

import advflow_ext as af
from advflow.autoregressive.features import Extractor
from advflow.data.prompt import Prompt
from advflow.samplers.sampling import Conditioning
from advflow.settings.model import ModelConfig
from advflow.settings.registry import FAMILIES


class FusedKernels(Protocol):
    """How many modules of the transformer run on each fused op, and by name why others were kept as they are."""

    @property
    def replaced(self) -> Mapping[str, int]: ...

    @property
    def kept(self) -> Mapping[str, str]: ...


class Images(Protocol):
    """What an image is before it is decoded, and the random numbers that it is drawn from."""

    def noise(self, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """The random numbers [count, ...] of images, drawn on the CPU so that every device starts from the same."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32. A sample that is not finite decodes to mid grey."""


class Latents(Images, Protocol):
    """Those of a flow: its noise is standard normal fp32, and it has a schedule by which images are drawn."""

    def sigmas(self, steps: int) -> list[float]:
        """The `steps + 1` noise levels of a sampler, from 1 (noise) down to 0 (image)."""


Comparison = Callable[[torch.Tensor, Sequence[Prompt]], dict[str, float]]
"""Numbers of a set of images [N, 3, H, W] in [0, 1], each for the prompt at its place, by their names."""


@dataclass(frozen=True)
class RealImages:
    """What drawn images are held against as a set: moments of features by an extractor, and what evaluation reports."""

    extractor: Extractor
    reference: af.FeatureMoments
    compare: Comparison


TEXTS_AT_A_TIME = 64  # that text encoders are given


@dataclass(frozen=True)
class StoredForm:
    """What `encode` returns as what a file can hold, so that the text encoders are needed once.

    `identity`, a checksum, differs where anything does that decides what `encode` says of a text: weights, tokenizers,
    precision, length. `tensors` have a row for each text; `conditioning` makes what `encode` returns of them.
    """

    identity: Callable[[], str]
    tensors: Callable[[Any], dict[str, torch.Tensor]]
    conditioning: Callable[[dict[str, torch.Tensor]], Conditioning]


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline's parts. `encode`, which holds on to its text encoders, makes of texts what the policies are told.

    Without a `stored` form many prompts are encoded whenever they are asked for. `real` is there where it is known what
    the images should look like as a set.
    """

    transformer: ModelMixin
    latents: Images
    encode: Callable[[Sequence[str]], Conditioning]
    stored: StoredForm | None = None
    real: RealImages | None = None


class AnyFamily(Protocol):
    """What is asked of models of tokens too, whose `Choice` among the families is a `TokenFamily`."""

    def check(self, config: ModelConfig) -> None:
        """Refuses, from small files alone, a pipeline that cannot be trained: ValueError."""

    def load(self, config: ModelConfig, device: torch.device) -> LoadedModel:
        """Loads every part onto `device`. Raises ValueError where one is missing."""

    def fuse(self, transformer: ModelMixin) -> FusedKernels | None:
        """Puts the transformer on fused kernels; None where the family has none."""

    def save(self, transformer: ModelMixin, adapter: str | None, folder: Path) -> None:
        """Writes an adapter into a folder, or, where that is None, all weights, as others load them."""

    def blocks(self, transformer: ModelMixin) -> Iterable[torch.nn.Module]:
        """The blocks that are worth compiling one by one."""


class ModelFamily(AnyFamily, Protocol):
    """A family of flows, whose `load` returns `Latents`."""

    lora_targets: Sequence[str]
    """Names of the modules that get an adapter where the settings name none."""

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """What the transformer calls the times `t` in (0, 1], 1 being noise."""

    def velocity(
        self, transformer: ModelMixin, x_t: torch.Tensor, timestep: torch.Tensor, conditioning: Any
    ) -> torch.Tensor:
        """The velocity at latents `x_t` [B, ...] and the `timesteps` [B] of t, told what `encode` said of the prompts.

        Policies that share their modulation have to be given the same tensor of timesteps.
        """

    def modulation_cache(self, transformer: ModelMixin) -> AbstractContextManager[object]:
        """While it is open, policies on one transformer share what they make of the same timesteps and conditioning."""


@dataclass(frozen=True)
class Outline:
    """A pipeline without its weights, for estimates: its modules on the meta device, and what they are given.

    Args:
        transformer: what is trained.
        decoder: what makes images of latents.
        encoders: what reads prompts.
        latents: shape of an image's.
        conditioning: of a number of prompts, empty tensors in the shapes of what `encode` returns.
        decode: images of latents, by a decoder.
        sigmas: those of `Latents`.
        tensors: what of a conditioning is kept in memory.
    """

    transformer: ModelMixin
    decoder: torch.nn.Module
    encoders: Sequence[torch.nn.Module]
    latents: Sequence[int]
    conditioning: Callable[[int], Any]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]
    sigmas: Callable[[int], list[float]]
    tensors: Callable[[Any], dict[str, torch.Tensor]]


@runtime_checkable
class Outlined(ModelFamily, Protocol):
    """What `--dry_run` asks of a family beside that; of one that has none of it nothing is estimated."""

    def outline(self, config: ModelConfig) -> Outline:
        """From small files alone. Raises ValueError where they are not there."""

    def missing(self, config: ModelConfig) -> list[str]:
        """What `load` would not find on this machine and how to get it, a sentence each."""


def make_family(name: str, settings: object = None) -> AnyFamily:
    """The family called `name`, with its own section of the settings where it has one."""
    family: AnyFamily = FAMILIES.make(name, settings)
    return family
