"""The pipeline that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advflow.models.sd3 import SD3, decode, encode_prompts, load_pipeline, pipeline_folder
from advflow.run.trainer import Trainer
from advflow.settings.config import TrainConfig
from advflow.settings.model import ModelConfig
from advflow.world.captions import caption_words
from advflow.world.pretrain import MAX_TOKENS, build_clip_tokenizer, pretrain
from advflow.world.reward import score
from advflow.world.scene import CATEGORIES, all_captions, render, sample_scene
from advflow.world.settings import FlowStage, PretrainSettings
from diffusers import StableDiffusion3Pipeline

FOLDER = Path(pipeline_folder("embedded"))


def test_it_is_small_and_holds_no_pickle() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_it_is_a_stable_diffusion_3_pipeline_with_the_parts_of_sd35() -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    config = pipeline.transformer.config
    assert config.qk_norm == "rms_norm"
    assert tuple(config.dual_attention_layers) == (0,)
    assert pipeline.text_encoder_3 is not None
    image = pipeline("a red circle", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)


def test_every_caption_fits_the_tokenizers() -> None:
    tokenizer = build_clip_tokenizer()
    for word in caption_words():
        assert len(tokenizer(word).input_ids) == 3
    assert max(len(tokenizer(prompt.text).input_ids) for prompt in all_captions()) <= MAX_TOKENS


def test_different_prompts_have_different_embeddings() -> None:
    config = TrainConfig()
    pipeline = load_pipeline(config.model, torch.device("cpu"))
    texts = [prompt.text for prompt in all_captions()]
    embeddings = encode_prompts(pipeline, texts, config.model.max_sequence_length)
    distances = torch.cdist(embeddings.tokens.flatten(1), embeddings.tokens.flatten(1))
    distances.fill_diagonal_(torch.inf)
    assert distances.min() > 1e-2


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_autoencoder_keeps_what_the_reward_looks_at(category: str) -> None:
    vae = load_pipeline(TrainConfig().model, torch.device("cpu")).vae
    rng = np.random.default_rng(3)
    prompts = [prompt for prompt in all_captions() if prompt.category == category]
    chosen = [prompts[rng.integers(len(prompts))] for _ in range(100)]
    images = torch.from_numpy(np.stack([render(sample_scene(prompt, rng)) for prompt in chosen]))
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mode()
    decoded = decode(vae, (latents - vae.config.shift_factor) * vae.config.scaling_factor)
    assert np.mean([score(image, p).correct for image, p in zip(decoded.numpy(), chosen, strict=True)]) >= 0.9


def test_the_decoder_s_precision_and_batch_change_little() -> None:
    """A few images at a time is rounding; bfloat16 is within 2 % of the range, on the mean within 1/255."""
    latents = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def decoded(**settings: Any) -> torch.Tensor:
        return SD3().load(ModelConfig(**settings), torch.device("cpu")).latents.decode(latents)

    right, few, half = decoded(), decoded(vae_batch=2), decoded(vae_dtype="bfloat16")
    torch.testing.assert_close(few, right, rtol=0, atol=1e-5)
    assert half.dtype == torch.float32 and not torch.equal(half, right)
    assert (half - right).abs().max() < 0.02 and (half - right).abs().mean() < 1 / 255
    with pytest.raises(ValueError, match=r"model.vae_batch is 0; accepted: 1 or more, or null"):
        ModelConfig(vae_batch=0)


def test_the_base_is_honestly_imperfect() -> None:
    result = Trainer(TrainConfig()).evaluate()
    assert len(result.images) >= 384
    assert 0.20 <= result.overall <= 0.50
    assert set(result.categories) == set(CATEGORIES)


def test_pretraining_makes_a_pipeline_from_nothing(tmp_path: Path) -> None:
    settings = PretrainSettings(
        scenes=24, vae_steps=12, flow_stages=(FlowStage(21, 1e-3, 0.0), FlowStage(3, 1e-3, 0.5)), batch=4
    )
    pretrain(tmp_path / "pipeline", settings)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    image = pipeline("a red circle", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert image.shape == (1, 3, 32, 32) and torch.isfinite(image).all()
