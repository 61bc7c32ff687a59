"""Loading a pipeline and encoding prompts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from advflow.samplers.sampling import PromptEmbeddings
from advflow.settings.model import ModelConfig

EMBEDDED = "embedded"


def pipeline_folder(name: str) -> str:
    """Where `StableDiffusion3Pipeline.from_pretrained` finds the pipeline called `name`."""
    return str(Path(str(resources.files("advflow.world"))) / "pipeline") if name == EMBEDDED else name


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu. Raises ValueError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f'device is {name!r}; accepted: "auto", "cpu", "cuda" or "cuda:N"')
    usable = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= usable:
        raise ValueError(f"device is {name!r}, and torch {torch.__version__} finds {usable} usable CUDA devices here")
    return device


def check_pipeline(config: ModelConfig) -> None:
    """Reads the small files of the pipeline, before gigabytes are loaded, and refuses what cannot be trained.

    Raises ValueError where `config.pipeline` is no StableDiffusion3Pipeline, or where nobody can be asked for it.
    """
    folder = pipeline_folder(config.pipeline)
    try:
        kind = StableDiffusion3Pipeline.load_config(folder).get("_class_name")
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        patch = SD3Transformer2DModel.load_config(folder, subfolder="transformer")["patch_size"]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f'model.pipeline is {config.pipeline!r}; accepted: "{EMBEDDED}", the folder of a StableDiffusion3Pipeline '
            f"or its name on a hub that can be reached ({reason})"
        ) from error
    if kind != "StableDiffusion3Pipeline":
        raise ValueError(f"model.pipeline is {config.pipeline!r}, a {kind}; accepted: a StableDiffusion3Pipeline")
    _require_multiple(config.resolution, 2 ** (len(vae["block_out_channels"]) - 1) * patch)


def _require_multiple(resolution: int, multiple: int) -> None:
    if resolution % multiple:
        raise ValueError(f"model.resolution is {resolution}; this pipeline needs a multiple of {multiple}")


def load_pipeline(config: ModelConfig, device: torch.device) -> StableDiffusion3Pipeline:
    """Loads every part of the pipeline onto `device`; the decoder stays in fp32, which SD3's needs.

    Raises ValueError where a part is missing.
    """
    dtypes = {"default": getattr(torch, config.dtype), "vae": torch.float32}
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder(config.pipeline), dtype=dtypes)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model.pipeline is {config.pipeline!r}, which cannot be loaded: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@dataclass(frozen=True)
class LatentShape:
    channels: int
    side: int

    @staticmethod
    def of(pipeline: StableDiffusion3Pipeline, resolution: int) -> LatentShape:
        _require_multiple(resolution, pipeline.vae_scale_factor * pipeline.patch_size)
        return LatentShape(pipeline.transformer.config.in_channels, resolution // pipeline.vae_scale_factor)

    def noise(self, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Standard normal fp32 [count, C, H, W], drawn on the CPU so that every device starts from the same."""
        return torch.randn(count, self.channels, self.side, self.side, generator=generator).to(device)


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], max_sequence_length: int, batch: int = 64
) -> PromptEmbeddings:
    """Encodes `prompts` with all text encoders of the pipeline."""
    tokens: list[torch.Tensor] = []
    pooled: list[torch.Tensor] = []
    for start in range(0, len(prompts), batch):
        chunk_tokens, _, chunk_pooled, _ = pipeline.encode_prompt(
            prompts[start : start + batch],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        tokens.append(chunk_tokens)
        pooled.append(chunk_pooled)
    return PromptEmbeddings(torch.cat(tokens), torch.cat(pooled))


class PromptEncoder:
    """Embeddings of a list of prompts by number: computed once where they fit, else each time they are asked for."""

    PRECOMPUTED_AT_MOST = 2048  # of SD3.5 Medium's embeddings this many take about 3.5 GB in bfloat16

    def __init__(self, pipeline: StableDiffusion3Pipeline, texts: list[str], max_sequence_length: int) -> None:
        self._texts, self._max_sequence_length = texts, max_sequence_length
        few = len(texts) <= self.PRECOMPUTED_AT_MOST
        self._stored = encode_prompts(pipeline, texts, max_sequence_length) if few else None
        # Holding on to the pipeline keeps its text encoders in memory; they are not needed where all is stored.
        self._pipeline = None if few else pipeline

    def __call__(self, numbers: list[int]) -> PromptEmbeddings:
        if self._stored is not None:
            return self._stored[torch.tensor(numbers, device=self._stored.tokens.device)]
        return encode_prompts(self._pipeline, [self._texts[i] for i in numbers], self._max_sequence_length)


@dataclass(frozen=True)
class Sampler:
    """The parts of a pipeline that stay after its text encoders have done their work."""

    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    latent: LatentShape
