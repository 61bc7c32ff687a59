"""What a run will take, in memory and in time: from shapes, and from what has been measured elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from advflow.dry_run.account import Account
from advflow.dry_run.passes import Passes
from advflow.models.encoding import IN_MEMORY_AT_MOST
from advflow.settings.config import TrainConfig
from advflow.settings.data import DataConfig
from advflow.settings.model import RuntimeConfig

PEAK = 989e12  # FLOP/s, the data sheet's dense bf16 of H100 and H200
_PEAK_OF = "989 TFLOP/s, dense bf16 of H100 and H200"
# bench/results/nvidia-h200/step.json and step-compiled.json: Stable Diffusion 3.5 Medium, LoRA, 512 px, micro-batches
# of 9. Shares of the peak while drawing and while learning, which credit every variant with the FLOPs counted here.
_GRAPHS, _FUSED, _COMPILED, _STOCK = (0.478, 0.404), (0.297, 0.215), (0.413, 0.380), (0.192, 0.187)
_KEPT_BY_FUSED = 0.5  # of what diffusers' own blocks keep for the backward pass: 10.9 of 21.9 GB there
_RESERVED = ": a run on an H200 had 53 GB reserved where this count is 30"  # bench/results/nvidia-h200/loop.json
_BYTES = {"float32": 4, "bfloat16": 2}
_FP32 = 4


def memory(config: TrainConfig, its: Account, size: int, prompts: int, held_out: int) -> Iterator[tuple[str, str]]:
    """Lines about the memory of one of `size` processes, where that is a GPU's: 1 GB is 1e9 bytes."""
    model, runtime = config.model, config.runtime
    dtype, share = _BYTES[model.dtype], size if runtime.shard else 1
    trained = float(its.trained * _FP32)
    parts: dict[str, float] = {}
    if model.trainable == "full":
        parts["learner and rollout policy, fp32"] = 2 * (trained / share + its.buffers * _FP32)
        parts[f"reference, {model.dtype}"] = (its.parameters / share + its.buffers) * dtype
        trained /= share
    else:
        parts[f"frozen weights, {model.dtype}"] = (its.parameters / share + its.buffers) * dtype
        parts["learner and rollout policy, fp32 adapters"] = 2 * trained
        if runtime.merge_lora != "none" and not runtime.shard:
            parts["merged weights"] = min(2 * its.merged * dtype, runtime.merged_gigabytes * 1e9)
    parts["Adam's moments and gradients, fp32"] = 3 * trained
    if config.evaluation.ema is not None:
        parts["moving average, twice in an evaluation"] = 2 * trained
    parts[f"decoder, {model.vae_dtype}"] = its.decoder * _BYTES[model.vae_dtype]
    stored = prompts_on_disk(config.data, prompts, held_out)
    parts["embeddings of prompts"] = (prompts + held_out - stored + config.guided) * its.embedding
    if config.process == "reverse":
        kept = its.latent * (_FP32 + dtype + _FP32)
        parts["states that are learnt from"] = _per_process(config.rollout.images, size) * config.sde.steps * kept
        if config.sde.reweight:
            parts["gradients of each image"] = _per_process(config.rollout.images, size) * its.trained * _FP32
    for name, held in parts.items():
        if held:
            yield "memory", f"{_size(held)}  {name}"
    halved = runtime.fused and model.trainable == "lora" and not model.gradient_checkpointing
    kept_by_pass = its.kept * (_KEPT_BY_FUSED if halved else 1)
    told = ", on fused kernels: half of what stock blocks keep, as on an H200" if halved else ""
    yield "memory", f"{_size(kept_by_pass)}  activations of a micro-batch of {micro_batch(config, size)}{told}"
    drawn = decoded_at_once(config, size)
    yield "memory", f"{_size(its.decoding)}  while {drawn} images are decoded (model.vae_batch)"
    held = sum(parts.values())
    # What a recording of a pass uses is nobody else's afterwards.
    peak = kept_by_pass + its.decoding if runtime.cuda_graphs else max(kept_by_pass, its.decoding)
    yield "memory", f"{_size(held + peak)}  together; reward models, CUDA and fragments come on top{_RESERVED}"
    if its.encoders:
        start = (its.parameters + its.buffers + its.encoders) * dtype + its.decoder * _BYTES[model.vae_dtype]
        yield "memory", f"{_size(start)}  at the start, with the text encoders, before the policies are made"


def disk(config: TrainConfig, its: Account, prompts: int, held_out: int) -> Iterator[tuple[str, str]]:
    """Lines about what a run writes, of which all processes together write as much as one."""
    # Learner, rollout policy, Adam's two moments, the average if any, and what others load.
    trained = 5 + (config.evaluation.ema is not None)
    every = config.checkpoints_kept_every
    more = "" if every is None else f", those of every {every} iterations"
    size = _size(trained * its.trained * _FP32)
    yield "disk", f"{size}  a checkpoint; kept are the newest {config.checkpoints_kept}{more} and the best one"
    if stored := prompts_on_disk(config.data, prompts, held_out):
        yield "disk", f"{_size(stored * its.embedding)}  embeddings of {stored:,} prompts"


def prompts_on_disk(data: DataConfig, *counts: int) -> int:
    """How many prompts have their embeddings in a cache, of sets of so many."""
    return sum(count for count in counts if data.embeddings_cache is not None or count > IN_MEMORY_AT_MOST)


def work(config: TrainConfig, its: Account, passes: Passes, size: int) -> Iterator[tuple[str, str]]:
    """Lines about passes, FLOPs and time; of evaluations too where there is anything to evaluate."""

    def of_evaluation(text: str) -> str:
        return f"; an evaluation {text}" if passes.evaluation else ""

    yield (
        "passes, an iteration",
        f"{passes.drawing:,} draw, {passes.learning:,} learn (forward and backward), {passes.comparing:,} beside them "
        f"without gradient{of_evaluation(f'{passes.evaluation:,}')}",
    )
    drawing = passes.drawing * its.forward
    learning = passes.learning * its.learning + passes.comparing * its.forward
    evaluation = passes.evaluation * its.forward
    yield (
        "FLOPs, an iteration",
        f"{(drawing + learning) / 1e12:,.4g} TFLOP in the transformer ({its.forward / 1e12:.3g} an image forward, "
        f"{its.learning / 1e12:.3g} forward and backward){of_evaluation(f'{evaluation / 1e12:,.4g}')}",
    )
    if config.model.dtype != "bfloat16":
        yield "time", "no estimate: what was measured is bfloat16 on a GPU"
        return
    drawn_at, learnt_at = _shares(config.runtime)
    each = (drawing / drawn_at + learning / learnt_at) / PEAK / size
    scored = evaluation / drawn_at / PEAK / size
    evaluations = 1 + -(-config.iterations // config.evaluation.every)
    scores = f"{scored:,.0f} s an evaluation, " if passes.evaluation else ""
    scoring = f"{evaluations:,} evaluations" if passes.evaluation else "none of the evaluations"
    whole = (config.iterations * each + evaluations * scored) / 3600
    yield (
        "time, an estimate",
        f"{each:,.1f} s an iteration, {scores}{whole:,.1f} h for {config.iterations:,} iterations and {scoring}, on "
        f"{size} GPU{'s' if size > 1 else ''}: {drawn_at:.0%} of the "
        f"peak while drawing, {learnt_at:.0%} while learning, as measured on one H200 with LoRA at 512 px "
        f"(peak: {_PEAK_OF}); decoding, rewards and what passes between GPUs come on top",
    )


def _shares(runtime: RuntimeConfig) -> tuple[float, float]:
    if not runtime.fused:
        return _COMPILED if runtime.compile == "regional" else _STOCK
    return _GRAPHS if runtime.cuda_graphs else _FUSED


def micro_batch(config: TrainConfig, size: int) -> int:
    """Rows of a learner's pass."""
    images, sde = config.rollout.images, config.sde
    if config.process == "reverse" and sde.reweight:
        return decoded_at_once(config, size)
    if config.process == "reverse":
        images = images // config.optim.steps_per_iteration * max(1, int(sde.steps * sde.trained_share))
    return min(config.optim.micro_batch, _per_process(images, size))


def decoded_at_once(config: TrainConfig, size: int) -> int:
    drawn = min(config.rollout.batch, _per_process(config.rollout.images, size))
    return min(drawn, config.model.vae_batch or drawn)


def shares(config: TrainConfig, size: int) -> str:
    """What each of `size` processes does of an iteration."""
    images = config.rollout.images
    sizes = {images // size, _per_process(images, size)}
    each = " or ".join(map(str, sorted(sizes)))
    batches = -(-max(sizes) // config.rollout.batch)
    steps = "1 optimiser step" if config.updates == 1 else f"{config.updates} optimiser steps"
    return (
        f"{size}; of an iteration's {images:,} images each draws {each}, in {batches} "
        f"batch{'es' if batches > 1 else ''} of at most {config.rollout.batch}; "
        f"micro-batches of {micro_batch(config, size)}; {steps}"
    )


def _per_process(count: int, size: int) -> int:
    return -(-count // size)


def _size(count: float) -> str:
    return f"{count / 1e9:8.2f} GB" if count >= 1e8 else f"{count / 1e6:8.2f} MB"
