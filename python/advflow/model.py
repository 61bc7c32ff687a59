"""Loading a pipeline and encoding prompts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from advflow.config import ModelConfig
from advflow.sampling import PromptEmbeddings

EMBEDDED = "embedded"


def pipeline_folder(name: str) -> str:
    """Where `StableDiffusion3Pipeline.from_pretrained` finds the pipeline called `name`."""
    return str(Path(str(resources.files("advflow.world"))) / "pipeline") if name == EMBEDDED else name


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where there is one, else cpu."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f'device is {name!r}; accepted: "auto", "cpu", "cuda" or "cuda:N"') from error


def load_pipeline(config: ModelConfig, device: torch.device) -> StableDiffusion3Pipeline:
    """Loads every part of the pipeline onto `device`; the decoder stays in fp32, which SD3's needs."""
    dtypes = {"default": getattr(torch, config.dtype), "vae": torch.float32}
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder(config.pipeline), dtype=dtypes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


@dataclass(frozen=True)
class LatentShape:
    channels: int
    side: int

    @staticmethod
    def of(pipeline: StableDiffusion3Pipeline, resolution: int) -> LatentShape:
        multiple = pipeline.vae_scale_factor * pipeline.patch_size
        if resolution % multiple:
            raise ValueError(f"model.resolution is {resolution}; this pipeline needs a multiple of {multiple}")
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
