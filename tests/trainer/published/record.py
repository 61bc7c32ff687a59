"""Runs the published classes on the shapes and numbers of `weights` and records what they say.

    python -m tests.trainer.published.record LLAMAGEN_CHECKOUT TAMING_CHECKOUT

Needs checkouts of FoundationVision/LlamaGen at ce98ec4 and CompVis/taming-transformers at 3ba01b2, and einops.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.trainer.published import weights

RECORD = Path(__file__).with_name("record.json")


def theirs(name: str) -> Any:
    return importlib.import_module(name)


def keys(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def listed(tensor: Tensor) -> Any:
    """As many digits as float32 has."""
    flat = [float(f"{value:.8g}") for value in tensor.flatten().tolist()]
    return {"shape": list(tensor.shape), "values": flat}


def some(tensor: Tensor) -> Any:
    """Every 7th value of [..., n], so that the record stays small."""
    return listed(tensor.flatten()[::7])


@torch.no_grad()
def llamagen_gpt(kind: str) -> dict[str, Any]:
    gpt, generate = theirs("autoregressive.models.gpt"), theirs("autoregressive.models.generate").generate

    shape = weights.LLAMAGEN[kind]
    prefix = shape.get("text_tokens", 1)
    model = gpt.Transformer(
        gpt.ModelArgs(
            dim=shape["width"], n_layer=shape["layers"], n_head=shape["heads"], multiple_of=shape["multiple"],
            num_classes=shape.get("classes", 1000), caption_dim=shape.get("text_width", 2048), cls_token_num=prefix,
            model_type="c2i" if kind == "class" else "t2i", vocab_size=shape["vocabulary"], block_size=shape["tokens"],
        )
    )  # fmt: skip
    if kind == "text":  # theirs is made for 120 places
        model.cls_embedding = gpt.CaptionEmbedder(shape["text_width"], shape["width"], 0.1, prefix)
    weights.fill(model.eval())
    length = prefix + shape["tokens"]
    drawn = weights.tokens("tokens", 3, shape["tokens"], shape["vocabulary"])
    mask = None
    condition, emb_masks = weights.labels(), None
    if kind == "text":
        condition, words = weights.text()
        emb_masks = words.float()
        # As dataset/t2i.py makes it.
        square = torch.tril(torch.ones(length, length))[None].repeat(3, 1, 1)
        square[:, :, :prefix] *= emb_masks[:, None]
        eye = torch.eye(length)
        mask = (square * (1 - eye) + eye).bool()[:, None]
    logits, _ = model(drawn, condition, mask=mask)
    found = {"keys": keys(model), "logits": some(logits[:, prefix - 1 : -1])}
    for name, scale in (("plain", 1.0), ("guided", weights.GUIDANCE)):
        greedy = generate(model, condition, shape["tokens"], emb_masks, cfg_scale=scale, sample_logits=False)
        found[name] = greedy.tolist()
    return found


@torch.no_grad()
def llamagen_vq() -> dict[str, Any]:
    tokenizer = theirs("tokenizer.tokenizer_image.vq_model")

    shape = weights.VQ["llamagen"]
    levels = list(shape["multipliers"])
    args = tokenizer.ModelArgs(codebook_size=shape["codes"], z_channels=shape["latent_channels"])
    model = tokenizer.VQModel(args)
    tiny = {"ch": shape["channels"], "ch_mult": levels, "num_res_blocks": shape["blocks"]}
    model.encoder = tokenizer.Encoder(z_channels=shape["latent_channels"], **tiny)
    model.decoder = tokenizer.Decoder(z_channels=shape["latent_channels"], **tiny)
    return vq(model.eval(), [2, 8, 4, 4])


@torch.no_grad()
def taming_vq() -> dict[str, Any]:
    shape = weights.VQ["taming"]
    network = {
        "ch": shape["channels"], "out_ch": 3, "ch_mult": shape["multipliers"], "num_res_blocks": shape["blocks"],
        "attn_resolutions": [4], "in_channels": 3, "resolution": 16, "z_channels": shape["latent_channels"],
        "double_z": False,
    }  # fmt: skip
    model = theirs("taming.models.vqgan").VQModel(network, None, n_embed=shape["codes"], embed_dim=shape["code_width"])
    return vq(model.eval(), [2, 4, 4, 16])


def vq(model: Any, shape: list[int]) -> dict[str, Any]:
    weights.fill(model)
    model, images = model.double(), weights.images().double()  # float32 loses three digits on the way
    _, _, (_, _, tokens) = model.encode(images)
    again = model.quantize.get_codebook_entry(tokens, shape)
    return {
        "keys": keys(model),
        "latents": some(model.quant_conv(model.encoder(images))),
        "tokens": tokens.view(2, -1).tolist(),
        "codes": some(again),
        "decoded": some(model.decode(again)),
    }


@torch.no_grad()
def taming_gpt() -> dict[str, Any]:
    mingpt = theirs("taming.modules.transformer.mingpt")
    shape = weights.MINGPT
    model = mingpt.GPT(shape["vocabulary"], shape["places"], shape["layers"], shape["heads"], shape["width"]).eval()
    weights.fill(model)
    condition = weights.labels()[:, None]
    drawn = weights.tokens("tokens", 3, shape["tokens"], shape["vocabulary"])
    logits, _ = model(torch.cat([condition, drawn[:, :-1]], 1))
    greedy = mingpt.sample_with_past(condition, model, shape["tokens"], sample_logits=False)
    return {"keys": keys(model), "logits": some(logits), "plain": greedy.tolist()}


def without_lightning() -> None:
    """Lets taming's models be imported without pytorch_lightning, which they use for training alone."""
    import transformers

    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = nn.Module  # type: ignore[attr-defined]
    main = types.ModuleType("main")
    main.instantiate_from_config = lambda config: nn.Identity()  # type: ignore[attr-defined]
    transformers.top_k_top_p_filtering = None
    sys.modules |= {"pytorch_lightning": lightning, "main": main}


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:3]
    without_lightning()
    found = {
        "llamagen class": llamagen_gpt("class"),
        "llamagen text": llamagen_gpt("text"),
        "llamagen vq": llamagen_vq(),
        "mingpt": taming_gpt(),
        "taming vq": taming_vq(),
    }
    RECORD.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    subprocess.run(["wc", "-c", RECORD], check=True)
