"""The autoregressive models and tokenizers are the published ones: their names, their numbers, their samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.autoregressive.checkpoints import convert, load_weights
from advflow.autoregressive.llamagen import SIZES, GPTConfig, LlamaGen, published, rotations
from advflow.autoregressive.mingpt import MinGPT, MinGPTConfig
from advflow.autoregressive.sampling import draws, policy_states, sample
from advflow.autoregressive.token_model import Condition, Text, TokenModel
from advflow.autoregressive.vq import VQ_16, VQConfig, VQModel
from safetensors.torch import save_file
from torch import Tensor

from tests.trainer.published import weights

# What tests/trainer/published/record.py saw LlamaGen @ce98ec4 and taming-transformers @3ba01b2 do.
RECORD = json.loads((Path(__file__).parent / "published/record.json").read_text())
KINDS = ("llamagen class", "llamagen text", "mingpt")
TOKENIZERS = ("llamagen", "taming")
IGNORED = ("quantize.codebook_used", ".mask")  # of their files, by our models


def model_of(kind: str) -> TokenModel:
    if kind == "mingpt":
        return MinGPT(MinGPTConfig(**weights.MINGPT))
    return LlamaGen(GPTConfig(**weights.LLAMAGEN[kind.split()[1]]))


def condition_of(kind: str) -> Condition:
    if kind == "llamagen text":
        return Text(*weights.text())
    return weights.labels()[:, None] if kind == "mingpt" else weights.labels()


def filled(model: Any) -> Any:
    weights.fill(model)
    return model.eval()


def assert_some(actual: Tensor, found: dict[str, Any]) -> None:
    expected = torch.tensor(found["values"], dtype=actual.dtype)
    torch.testing.assert_close(actual.flatten()[::7], expected, rtol=1e-6, atol=1e-5)


def their_state(found: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in found["keys"].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_have_the_published_names(kind: str) -> None:
    model, state = model_of(kind), their_state(RECORD[kind])
    model.load_state_dict(state, strict=True)
    assert {name for name in RECORD[kind]["keys"] if not name.endswith(IGNORED)} == set(model.state_dict())


@pytest.mark.parametrize("names", TOKENIZERS)
def test_tokenizers_have_the_published_names(names: str) -> None:
    found = RECORD[f"{names} vq"]
    model = VQModel(VQConfig(**weights.VQ[names]))
    model.load_state_dict({k: v for k, v in their_state(found).items() if not k.startswith("loss.")}, strict=True)
    assert {name for name in found["keys"] if not name.endswith(IGNORED)} == set(model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_published_ones(kind: str) -> None:
    model = filled(model_of(kind))
    tokens = weights.tokens("tokens", 3, model.tokens, model.config.vocabulary)
    states, head = model(condition_of(kind), tokens)
    assert_some(states @ head.T, RECORD[kind]["logits"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "guidance"), [("plain", 1.0), ("guided", weights.GUIDANCE)])
def test_the_likeliest_tokens_are_the_published_ones(kind: str, name: str, guidance: float) -> None:
    if name not in RECORD[kind]:
        pytest.skip("a minGPT has no guidance")
    model = filled(model_of(kind))
    drawn = sample(model, condition_of(kind), torch.full((3, 16), 0.5), guidance=guidance, top_k=1)
    assert drawn.tokens.tolist() == RECORD[kind][name]
    assert drawn.tokens.unique().numel() > 4


@pytest.mark.parametrize("names", TOKENIZERS)
def test_tokenizers_encode_and_decode_as_the_published_ones(names: str) -> None:
    found, model = RECORD[f"{names} vq"], filled(VQModel(VQConfig(**weights.VQ[names]))).double()
    images = weights.images().double()
    with torch.no_grad():
        assert_some(model.quant_conv(model.encoder(images)), found["latents"])
        tokens = model.encode(images)
        assert tokens.tolist() == found["tokens"]
        assert_some(model.lookup(tokens), found["codes"])
        assert_some(model.decode(tokens), found["decoded"])
    assert tokens.unique().numel() > 4


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_samples_are_those_of_scoring(kind: str) -> None:
    model, condition = filled(model_of(kind)), condition_of(kind)
    guidance = 1.0 if kind == "mingpt" else 2.5
    drawn = sample(model, condition, uniforms(3), guidance=guidance, temperature=0.8)
    unconditional = None if kind == "mingpt" else model.unconditional(condition)
    states, head = policy_states(model, condition, drawn.tokens, unconditional, guidance=guidance, temperature=0.8)
    scored = (states @ head.T).log_softmax(2).gather(2, drawn.tokens[:, :, None])[:, :, 0]
    torch.testing.assert_close(drawn.log_probs, scored, rtol=0, atol=1e-5)


def uniforms(rows: int, first: int = 0) -> Tensor:
    return draws([torch.Generator().manual_seed(first + row) for row in range(rows)], 16)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = filled(model_of("llamagen text"))
    features, words = weights.text()
    together = sample(model, Text(features, words), uniforms(3), guidance=1.5)
    alone = sample(model, Text(features[2:], words[2:]), uniforms(1, first=2), guidance=1.5)
    assert alone.tokens.tolist() == together.tokens[2:].tolist()
    assert len({tuple(row) for row in together.tokens.tolist()}) == 3


def test_samples_follow_the_policy() -> None:
    model, condition = filled(model_of("llamagen class")), torch.full((4000,), 2)
    first = sample(model, condition, uniforms(4000)).tokens[:, 0]
    states, head = model(condition[:1], torch.zeros(1, 16, dtype=torch.long))
    expected = (states[0, 0] @ head.T).softmax(0)
    seen = torch.bincount(first, minlength=48) / 4000
    assert ((seen - expected).abs() < 5 * (expected / 4000).sqrt() + 1e-3).all()


def test_truncation_keeps_what_llamagen_keeps() -> None:
    model, condition = filled(model_of("llamagen class")), torch.full((600,), 2)
    states, head = model(condition[:1], torch.zeros(1, 16, dtype=torch.long))
    probabilities = (states[0, 0] @ head.T).softmax(0)
    likeliest = probabilities.argsort(descending=True)
    kept = int((probabilities[likeliest].cumsum(0) <= 0.6).sum()) + 1
    drawn = sample(model, condition, uniforms(600), top_p=0.6)
    assert set(drawn.tokens[:, 0].tolist()) == set(likeliest[:kept].tolist())
    assert set(sample(model, condition, uniforms(600), top_k=3).tokens[:, 0].tolist()) == set(likeliest[:3].tolist())
    # Of the whole policy all the same, as the loss has them.
    torch.testing.assert_close(drawn.log_probs[:, 0], probabilities.log()[drawn.tokens[:, 0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"guidance": 2.0}, "guidance is not 1"),
    ],
)
def test_what_cannot_be_sampled_is_said(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sample(model_of("mingpt"), condition_of("mingpt"), uniforms(3), **options)


def test_a_row_of_draws_for_each_condition() -> None:
    with pytest.raises(ValueError, match=r"uniforms has shape \[2, 16\]"):
        sample(model_of("mingpt"), condition_of("mingpt"), uniforms(2))
    with pytest.raises(ValueError, match="without an unconditional"):
        policy_states(model_of("mingpt"), condition_of("mingpt"), torch.zeros(3, 16), guidance=2.0)


def test_what_was_drawn_in_inference_mode_can_be_trained_on() -> None:
    rotations.cache_clear()
    model, condition = filled(model_of("llamagen class")), weights.labels()
    with torch.inference_mode():
        drawn = sample(model, condition, uniforms(3)).tokens
    states, head = model(condition, drawn.clone())
    (states @ head.T).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_is_dropped_in_training_mode() -> None:
    """LlamaGen's released policy tuning leaves one label in ten out of what it scores."""
    model, condition = filled(model_of("llamagen class")), torch.zeros(64, dtype=torch.long)
    tokens = torch.zeros(64, 16, dtype=torch.long)
    assert model.train()(condition, tokens).states.std(0).max() < 1e-6


def numel(model: torch.nn.Module) -> int:
    return int(sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_number_of_weights(size: str) -> None:
    condition = "text" if size in ("GPT-1B", "GPT-3B", "GPT-7B") else "class"
    with torch.device("meta"):
        count = numel(LlamaGen(published(size, condition=condition)))
    said = {"GPT-B": "0.111", "GPT-L": "0.343", "GPT-XL": "0.775", "GPT-XXL": "1.4", "GPT-XXXL": "3.9"}
    said |= {"GPT-1B": "1.2", "GPT-3B": "3.1", "GPT-7B": "6.6"}  # billions, in their README and code
    assert f"{count / 1e9:.{len(said[size]) - 2}f}" == said[size]


def test_a_torch_file_is_converted_once_and_loads(tmp_path: Path) -> None:
    model = filled(model_of("llamagen class"))
    torch.save({"model": model.state_dict(), "steps": 3}, tmp_path / "c2i.pt")
    convert(tmp_path / "c2i.pt", tmp_path / "c2i.safetensors")
    with torch.device("meta"):
        loaded = model_of("llamagen class")
    load_weights(loaded, tmp_path / "c2i.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    tokens = torch.zeros(3, 16, dtype=torch.long)
    torch.testing.assert_close(loaded(weights.labels(), tokens).states, model(weights.labels(), tokens).states)


def test_a_part_of_a_file_loads(tmp_path: Path) -> None:
    model = filled(model_of("mingpt"))
    held = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    save_file(held | {"first_stage_model.loss.logvar": torch.zeros(1)}, tmp_path / "cin.safetensors")
    loaded = load_weights(model_of("mingpt"), tmp_path / "cin.safetensors", "transformer.")
    assert torch.equal(loaded.pos_emb, model.pos_emb)


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "run": Path}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert(tmp_path / "code.pt", tmp_path / "out.safetensors")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        convert(tmp_path / "list.pt", tmp_path / "out.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not of this model"):
        load_weights(model_of("mingpt"), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_weights(model_of("mingpt"), tmp_path / "code.pt")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: published("GPT-S"), "size is 'GPT-S'"),
        (lambda: GPTConfig(2, 2, 32, tokens=15), "tokens is 15"),
        (lambda: GPTConfig(2, 3, 32), "width is 32 with 3 heads"),
        (lambda: MinGPTConfig(2, 3, 32), "width is 32 with 3 heads"),
        (lambda: MinGPTConfig(2, 2, 32, tokens=64, places=32), "places is 32"),
        (lambda: VQConfig(channels=20), "channels are"),
        (lambda: VQModel(VQConfig(**weights.VQ["taming"])).lookup(torch.zeros(1, 15)), "tokens has 15 an image"),
    ],
)
def test_impossible_shapes_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_vq_16_has_16_pixels_to_a_token() -> None:
    assert VQ_16.downsampling == 16
    with torch.device("meta"):
        count = numel(VQModel(VQ_16))
    assert round(count / 1e6) == 72
