"""Pretrains the tiny Stable-Diffusion-3.5-shaped pipeline of the embedded world from nothing.

Real diffusers and transformers classes throughout, so that the code which trains this pipeline trains SD3.5 Medium:
an `AutoencoderKL`, two CLIP text encoders and a T5 encoder with word-level tokenizers, and an
`SD3Transformer2DModel` with QK-norm and dual attention in its first block.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from advflow.core.files import require_folder
from advflow.core.progress import show_progress
from advflow.world.captions import caption_words, training_captions
from advflow.world.scene import CATEGORIES, IMAGE_SIZE, Caption, Category, render, sample_scene
from advflow.world.settings import FlowStage, PretrainSettings

MAX_TOKENS = 12  # "a photo of a red circle and a blue square" between its start and end tokens
_LATENT_CHANNELS = 8
_TEXT_WIDTH = 32
_DEFAULT_T5_TOKENS = 256  # what StableDiffusion3Pipeline pads to unless told otherwise
_DEFAULT_LENGTH_EVERY = 20


def pretrain(out: Path, settings: PretrainSettings) -> StableDiffusion3Pipeline:
    """Trains every part and writes a folder that `StableDiffusion3Pipeline.from_pretrained` loads.

    Raises ValueError where `out` cannot be such a folder, before anything is trained.
    """
    require_folder(str(out))
    torch.manual_seed(settings.seed)
    images, prompts = render_scenes(settings.scenes, np.random.default_rng(settings.seed))
    started = time.monotonic()
    vae = train_vae(images, settings)
    latents = encode_latents(vae, images)
    vae_seconds = time.monotonic() - started
    torch.manual_seed(settings.seed)
    pipeline = build_pipeline(vae)
    for number, stage in enumerate(settings.flow_stages):
        torch.manual_seed(settings.seed + number)
        train_flow(pipeline, latents, prompts, stage, settings.batch)
    pipeline.save_pretrained(out, safe_serialization=True)
    for tensors in out.rglob("*.safetensors"):
        shutil.copymode(out / "model_index.json", tensors)  # safetensors leaves its files to their owner alone
    minutes = (time.monotonic() - started) / 60
    print(f"pretrained in {minutes:.1f} min (autoencoder {vae_seconds / 60:.1f} min); written to {out}")
    return pipeline


def render_scenes(
    count: int, rng: np.random.Generator, categories: Sequence[Category] = CATEGORIES
) -> tuple[torch.Tensor, list[Caption]]:
    """Scenes of `categories` in equal shares. Returns images [count, 3, 32, 32] in [-1, 1] and their prompts."""
    pool = {c: [p for p in training_captions() if p.category == c] for c in categories}
    prompts: list[Caption] = []
    images = np.empty((count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    for i in show_progress(range(count), desc="rendering scenes", unit="image"):
        choices = pool[categories[i % len(categories)]]
        prompts.append(choices[rng.integers(len(choices))])
        images[i] = render(sample_scene(prompts[-1], rng))
    return torch.from_numpy(images) * 2 - 1, prompts


def train_vae(images: torch.Tensor, settings: PretrainSettings) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.vae_lr, settings.vae_steps, pct_start=0.1)
    progress = show_progress(range(settings.vae_steps), desc="autoencoder", unit="step")
    for _ in progress:
        batch = images[torch.randint(len(images), (settings.batch,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        loss = reconstruction + 1e-4 * posterior.kl().mean() / _LATENT_CHANNELS
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(reconstruction=f"{reconstruction.item():.4f}")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encodes `images` and sets the autoencoder's shift and scale so that its latents have mean 0 and variance 1."""
    latents: torch.Tensor = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(500)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return latents.sub(latents.mean()).div(latents.std())


def build_clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose every token is one word of the world's captions.

    Its merges are written down here, each word growing from the left: a trained BPE breaks ties differently in every
    process, and so gives the words other numbers.
    """
    words = caption_words()
    tokens = dict.fromkeys(["<|startoftext|>", "<|endoftext|>", *sorted({letter for word in words for letter in word})])
    merges: dict[tuple[str, str], None] = {}
    # Longer words come first, or the start of a short one ("re-d") would tear them apart ("squa-re-s").
    for word in sorted(words, key=len, reverse=True):
        piece, *letters = [*word[:-1], word[-1] + "</w>"]
        for letter in letters:
            tokens |= dict.fromkeys([piece, letter, piece + letter])
            merges[piece, letter] = None
            piece += letter
        tokens[piece] = None
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=MAX_TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the tokenizer splits {word!r}; every word of the world should be one token")
    return tokenizer


def build_t5_tokenizer() -> T5TokenizerFast:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(f"\u2581{word}", -1.0) for word in caption_words()]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=_DEFAULT_T5_TOKENS)


def build_t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * _TEXT_WIDTH,
        d_kv=_TEXT_WIDTH,
        d_ff=2 * _TEXT_WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    # The default initialisation (std 0.02) whispers: the transformer would ignore the caption for long.
    with torch.no_grad():
        encoder.text_model.embeddings.token_embedding.weight.normal_(std=0.5)
        encoder.text_model.embeddings.position_embedding.weight.normal_(std=0.5)
        encoder.text_projection.weight.normal_(std=_TEXT_WIDTH**-0.5)
    return encoder


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_3 = build_clip_tokenizer(), build_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=1,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=build_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_clip_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=build_t5_encoder(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )


def train_flow(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, prompts: list[Caption], stage: FlowStage, batch: int
) -> None:
    """Flow matching with logit-normal timesteps; the text encoders learn along with the transformer."""
    transformer = pipeline.transformer
    modules = (transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    parameters = [p for module in modules for p in module.train().requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage.lr, stage.steps, pct_start=0.1)
    progress = show_progress(range(stage.steps), desc="flow matching", unit="step")
    average = float("nan")
    for step in progress:
        index = torch.randint(len(latents), (batch,))
        other = torch.randint(len(latents), (batch,))
        caption = torch.where(torch.rand(batch) < stage.caption_noise, other, index)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [prompts[i].text for i in caption.tolist()],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=_DEFAULT_T5_TOKENS if step % _DEFAULT_LENGTH_EVERY == 0 else MAX_TOKENS,
        )
        x0 = latents[index]
        noise = torch.randn_like(x0)
        t = torch.sigmoid(torch.randn(len(x0)))
        x_t = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
        velocity = transformer(x_t, embeds, pooled, t * 1000, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if average != average else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
    for module in modules:
        module.eval().requires_grad_(False)
