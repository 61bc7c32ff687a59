"""Some iterations of advflow's own training loop on Stable Diffusion 3.5 Medium's shape, every weight random.

python -m bench.step.loop --iterations 10 --json loop.json          # a GPU: 2.5 billion weights, 512 px
python -m bench.step.loop --model tiny --iterations 2               # anywhere: to see that it goes

A pipeline is made of transformer and decoder in their real sizes and of text encoders of the real width and few layers,
and saved to a folder of its own; from there on it is `advflow train` and the rows it writes. The reward is how red an
image is: weights that know nothing draw noise, and nothing is to be learnt, but everything is computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from advflow.models.sd3 import pipeline_folder
from advflow.run.train import train
from advflow.settings.config import TrainConfig
from advflow.settings.data import EMBEDDED, DataConfig, EvalConfig, RolloutConfig
from advflow.settings.model import ModelConfig, RuntimeConfig
from advflow.settings.optim import OptimConfig
from advflow.settings.processes import DrawConfig
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from advflow_ext.bench.harness import report
from bench.roofline.models import SIZES, count

PHASES = ("seconds_rollout", "seconds_train")


def random_pipeline() -> StableDiffusion3Pipeline:
    """SD3.5 Medium's transformer, decoder and widths; the embedded world's tokenizers."""
    world = Path(pipeline_folder(EMBEDDED))
    tokenizers = [AutoTokenizer.from_pretrained(world / f"tokenizer{number}") for number in ("", "_2", "_3")]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(**SIZES["sd35-medium"].config()),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": _clip(768, tokenizers[0]),
            "text_encoder_2": _clip(1280, tokenizers[1]),
            "text_encoder_3": T5EncoderModel(
                T5Config(vocab_size=len(tokenizers[2]), d_model=4096, d_kv=64, d_ff=1024, num_layers=1, num_heads=64)
            ),
        }
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    made = {name: part.to(torch.bfloat16) for name, part in parts.items()}
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **dict(zip(names, tokenizers, strict=True)), **made
    )


def _clip(width: int, tokenizer: Any) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,  # the last but one is what SD3 takes
            num_attention_heads=width // 64,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def settings(model: str, folder: Path, iterations: int, cuda_graphs: bool) -> TrainConfig:
    """32 images an iteration, each at three timesteps; the tiny model's four."""
    tiny = model == "tiny"
    return TrainConfig(
        algorithm="advantage_flow",
        iterations=iterations,
        out=str(folder / "run"),
        checkpoint_every=iterations,
        model=ModelConfig(
            pipeline=EMBEDDED if tiny else str(folder / "pipeline"),
            trainable="lora",
            dtype="bfloat16",
            resolution=32 if tiny else 512,
            max_sequence_length=12 if tiny else 128,
        ),
        data=DataConfig(reward="redness"),
        rollout=RolloutConfig(prompts=2 if tiny else 8, images_per_prompt=2 if tiny else 4, steps=10, batch=16),
        draws=DrawConfig(per_image=3, timesteps="sampler_grid"),
        optim=OptimConfig(micro_batch=8),
        evaluation=EvalConfig(every=iterations, steps=2, prompts_per_category=1),
        runtime=RuntimeConfig(cuda_graphs=cuda_graphs),
    )


def measure(config: TrainConfig) -> dict[str, Any]:
    """Runs it; what its rows say, and the device's memory. The first iteration compiles and records."""
    summary = train(config, resume=False)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    later = rows[1:] or rows
    seconds = {phase: statistics.median(row[phase] for row in later) for phase in PHASES}
    cuda = torch.cuda.is_available()
    return {
        "settings": {"cuda_graphs": config.runtime.cuda_graphs, "images": config.rollout.images, "timesteps": 3},
        "median": seconds,
        "images_per_second": config.rollout.images / sum(seconds.values()),
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "summary": summary,
        "rows": rows,
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.step.loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=["sd35-medium", "tiny"], default="sd35-medium", help="tiny: the embedded one")
    p.add_argument("--iterations", type=count, default=10, help="default 10")
    p.add_argument("--no-cuda-graphs", action="store_true", help="without runtime.cuda_graphs")
    p.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    return p


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.model != "tiny":
            random_pipeline().save_pretrained(folder / "pipeline")
            torch.cuda.empty_cache()
        config = settings(options.model, folder, options.iterations, not options.no_cuda_graphs)
        document = {"environment": report.environment(device), "model": options.model} | measure(config)
    seconds = ", ".join(f"{phase.removeprefix('seconds_')} {document['median'][phase]:.3g} s" for phase in PHASES)
    print(f"{options.model}: {document['images_per_second']:.3g} images/s, an iteration: {seconds}")
    if options.json is not None:
        report.write(document, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
