"""The training loop: roll out, score, turn rewards into advantages, improve the learner, let the rollout follow."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

import advflow_ext as af
from advflow.algorithms import REVERSE
from advflow.batch import Rollout, Transitions
from advflow.checkpoint import RunState, checkpoints, load_checkpoint, save_checkpoint
from advflow.config import OptimConfig, RolloutPolicyConfig, TrainConfig
from advflow.evaluate import Evaluation, evaluate
from advflow.forward_process import Draws, ForwardProcess
from advflow.model import LatentShape, PromptEncoder, Sampler, encode_prompts, load_pipeline, pick_device
from advflow.policies import follow, make_policies
from advflow.prompts import check_prompts, load_eval_prompts, load_training_prompts
from advflow.randomness import generator
from advflow.reference_control import ReferenceControl, reference_target
from advflow.reverse_process import ReverseProcess, StochasticSampler, join
from advflow.rewards import load_reward
from advflow.run_log import EVALS, RunLog, read_rows
from advflow.sampling import PromptEmbeddings, decode, sample_latents, sigma_grid

WeightedMetrics = tuple[af.LossMetrics, float]

GRID_COLUMNS = 6  # images of each category in the sample grids


class Trainer:
    """One run: everything that lives as long as it does."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        pipeline = load_pipeline(config.model, self.device)
        self.sampler = Sampler(pipeline.vae, pipeline.scheduler, LatentShape.of(pipeline, config.model.resolution))
        self.reward = load_reward(config.data.reward, config.data.reward_args)
        for remark in check_prompts(config.data, self.reward):
            print(remark)
        self.prompts = load_training_prompts(config.data.prompts)
        self.eval_prompts = load_eval_prompts(config.data.eval_prompts, config.evaluation.prompts_per_category)
        length = config.model.max_sequence_length
        self.encode = PromptEncoder(pipeline, self.prompts.texts, length)
        self.eval_embeddings = encode_prompts(pipeline, self.eval_prompts, length)
        self.policies = make_policies(pipeline.transformer, config.model, config.runtime, config.seed)
        self.sigmas = sigma_grid(pipeline.scheduler, config.rollout.steps)
        self.eval_sigmas = sigma_grid(pipeline.scheduler, config.evaluation.steps)
        self.stochastic_sampler: StochasticSampler | None = None
        self.process: ForwardProcess | ReverseProcess
        self.reference_control = ReferenceControl(reference_target(config))
        if config.algorithm in REVERSE:
            self.stochastic_sampler = StochasticSampler(config, self.sigmas)
            self.process = ReverseProcess(config, self.policies, self.sigmas)
        else:
            draws = Draws(config.draws, self.sampler.latent, self.sigmas, config.seed)
            self.process = ForwardProcess(config, self.policies, draws, self.reference_control)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.policies.learner,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )

    def iterate(self, iteration: int) -> dict[str, float]:
        """One round. Returns its numbers."""
        started = time.monotonic()
        rollout, row = self.roll_out(iteration)
        rolled_out = time.monotonic()
        row |= self._improve(iteration, rollout)
        trained = time.monotonic()
        rho = rollout_decay(self.config.rollout_policy, (iteration + 1) * self.config.updates)
        follow(self.policies, rho)
        return row | {
            "rollout_policy_rho": rho,
            "seconds_rollout": round(rolled_out - started, 4),
            "seconds_train": round(trained - rolled_out, 4),
        }

    def evaluate(self) -> Evaluation:
        return evaluate(
            self.policies.transformer("learner", for_images=True),
            self.sampler,
            self.eval_prompts,
            self.eval_embeddings,
            self.reward,
            self.eval_sigmas,
            self.config.rollout.batch,
        )

    def roll_out(self, iteration: int) -> tuple[Rollout, dict[str, float]]:
        """Samples groups of images from the rollout policy and scores them."""
        config = self.config.rollout
        group = config.images_per_prompt
        chosen = self.prompts.draw(config.prompts, generator(self.config.seed, "prompts", iteration))
        texts = [self.prompts.texts[i] for i in chosen for _ in range(group)]
        embeddings = self.encode(chosen)[torch.arange(len(chosen)).repeat_interleave(group)]
        noise = self.sampler.latent.noise(len(texts), generator(self.config.seed, "rollout", iteration), self.device)
        x0, transitions = self._sample(noise, embeddings, iteration)
        images = torch.cat([decode(self.sampler.vae, latents) for latents in x0.split(config.batch)])
        scores = self.reward(images, texts)
        broken = ~x0.flatten(1).isfinite().all(1).cpu()
        # NaN must not even enter the learner: a zero loss gradient times a NaN activation is a NaN weight gradient.
        x0[broken] = 0.0
        if transitions is not None:
            transitions.x[broken.to(x0.device)] = 0.0
        scores.reward[broken] = torch.nan
        advantages = self._advantages(scores.reward)
        groups = scores.reward.view(-1, group)
        row = {
            "reward": scores.reward.nanmean().item(),
            "score": scores.score.mean().item(),
            "broken_images": int(broken.sum()),
            "uniform_groups": (groups.amax(1) == groups.amin(1)).float().mean().item(),
            "advantage_group_mean_worst": advantages.view(-1, group).mean(1).abs().max().item(),
            "advantage_rms": advantages.square().mean().sqrt().item(),
        }
        advantages = advantages.masked_fill(broken, torch.nan)  # the loss gives such a sample no gradient and counts it
        rewards, advantages = scores.reward.to(self.device), advantages.to(self.device)
        return Rollout(x0, rewards, advantages, embeddings, group, transitions), row

    @torch.no_grad()
    def _sample(
        self, noise: torch.Tensor, embeddings: PromptEmbeddings, iteration: int
    ) -> tuple[torch.Tensor, Transitions | None]:
        """Latents of one iteration's images; with the steps that made them where the algorithm learns from those."""
        config = self.config.rollout
        # Stored velocities are what the learner's are compared with; replayed ones are not those of the rollout.
        for_images = self.stochastic_sampler is None or self.config.sde.anchor == "replay"
        transformer = self.policies.transformer(config.policy, for_images=for_images)
        starts = range(0, len(noise), config.batch)
        if self.stochastic_sampler is None:
            parts = [
                sample_latents(transformer, noise[rows], self.sigmas, embeddings[rows], config.solver)
                for rows in (slice(start, start + config.batch) for start in starts)
            ]
            return torch.cat(parts), None
        noise = self.stochastic_sampler.starting_noise(noise)
        latents, transitions = [], []
        for start in starts:
            rows = slice(start, start + config.batch)
            x0, steps = self.stochastic_sampler.sample(transformer, noise[rows], embeddings[rows], iteration, start)
            latents.append(x0)
            transitions.append(steps)
        return torch.cat(latents), join(transitions)

    def _advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        group, choice = self.config.rollout.images_per_prompt, self.config.advantage
        if choice.norm == "softmax":
            return af.softmax_advantages(rewards, group)
        return af.group_advantages(rewards, group, norm=choice.norm, clip=choice.clip, clip_mode=choice.clip_mode)

    def _improve(self, iteration: int, rollout: Rollout) -> dict[str, float]:
        """Takes this iteration's optimiser steps."""
        updates: list[list[WeightedMetrics]] = []
        norms: list[float] = []
        for losses in self.process.steps(iteration, rollout):
            updates.append([])
            for loss in losses:
                (loss.out.loss * loss.weight).backward()
                updates[-1].append((loss.out.metrics, loss.weight))
            norm = torch.nn.utils.clip_grad_norm_(self.policies.learner, self.config.optim.max_grad_norm).item()
            if math.isfinite(norm):
                self._step(iteration, len(updates) - 1)
                norms.append(norm)
            self.optimizer.zero_grad(set_to_none=True)
        row = join_metrics([(metrics, weight / len(updates)) for parts in updates for metrics, weight in parts])
        if isinstance(self.process, ReverseProcess):
            row |= self.process.mismatch(join_metrics(updates[0]))
        row |= self.reference_control.update(row)
        return row | {"grad_norm": sum(norms) / max(len(norms), 1), "skipped_steps": len(updates) - len(norms)}

    def _step(self, iteration: int, update: int) -> None:
        config = self.config
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(
                config.optim, iteration * config.updates + update, config.iterations * config.updates
            )
        self.optimizer.step()


def join_metrics(parts: list[WeightedMetrics]) -> dict[str, float]:
    """One set of metrics from those of several micro-batches and their weights; waits for the device once.

    Means are weighted, extremes are the extreme, and counts are added up.
    """
    names = parts[0][0].names
    values = torch.stack([metrics.values for metrics, _ in parts]).cpu()
    weights = torch.tensor([weight for _, weight in parts])
    joined: dict[str, float] = {}
    for name, column in zip(names, values.unbind(1), strict=True):
        if name.startswith("min_"):
            joined[name] = column.min().item()
        elif name.startswith("max_"):
            joined[name] = column.max().item()
        elif name.endswith(("_samples", "_steps", "_timesteps")):
            joined[name] = column.sum().item()
        else:
            joined[name] = (column * weights).sum().item()
    return joined


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of a run of `steps`."""
    risen = min(1.0, (step + 1) / max(config.warmup, 1))
    left = 2.0 * (1.0 - step / steps) if config.decay == "second_half" else 1.0
    held = min(1.0, config.hold / (step + 1)) if config.hold is not None else 1.0
    return config.lr * min(risen, left) * held


def rollout_decay(config: RolloutPolicyConfig, step: int) -> float:
    """rho of the rollout policy's exponential moving average after `step` optimiser steps."""
    return min(max(config.rate * (step - config.start), 0.0), config.maximum)


def train(config: TrainConfig, resume: bool) -> dict[str, Any]:
    """Runs `advflow train`; returns the summary it also writes to summary.json."""
    folder = Path(config.out)
    trainer = Trainer(config)
    first = 0
    if resume and (saved := checkpoints(folder / "checkpoints")):
        state = load_checkpoint(saved[-1], trainer.policies, trainer.optimizer)
        first = state.iteration
        trainer.reference_control.restore(state.reference_scale)
    log = RunLog(folder, first)
    grid = _grid_indices(trainer)
    log.sample_prompts([trainer.eval_prompts[index] for index in grid])
    images = config.rollout.prompts * config.rollout.images_per_prompt
    earlier = max((row["seconds"] for row in read_rows(folder / EVALS)), default=0.0)
    started = time.monotonic() - earlier
    progress = tqdm(range(first, config.iterations), initial=first, total=config.iterations, desc="train", unit="it")

    def assess(iteration: int) -> Evaluation:
        result = trainer.evaluate()
        log.evaluation(iteration, iteration * images, time.monotonic() - started, result, grid)
        return result

    latest = assess(first) if first == 0 else None
    with _interruptible() as interrupted:
        for iteration in progress:
            row = trainer.iterate(iteration)
            log.metrics({"iteration": iteration} | row)
            done = iteration + 1
            if done % config.evaluation.every == 0 or done == config.iterations:
                latest = assess(done)
            if done % config.checkpoint_every == 0 or done == config.iterations or interrupted():
                state = RunState(done, trainer.reference_control.scale)
                save_checkpoint(folder / "checkpoints", state, trainer.policies, trainer.optimizer)
            held_out = f"{latest.overall:.3f}" if latest else "-"
            progress.set_postfix(reward=f"{row['reward']:.3f}", held_out=held_out)
            if interrupted() and done < config.iterations:
                progress.close()
                log.close()
                raise SystemExit(f"stopped after iteration {done}, saved; go on with --resume")
    log.close()
    summary = summarise(config, folder, time.monotonic() - started, trainer.device)
    _write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(config: TrainConfig, folder: Path, seconds: float, device: torch.device) -> dict[str, Any]:
    """The numbers of a finished run."""
    evals = read_rows(folder / EVALS)
    base, final = evals[0], evals[-1]
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "base_score": base["overall"],
        "final_score": final["overall"],
        "gain": final["overall"] - base["overall"],
        "base_categories": base["categories"],
        "final_categories": final["categories"],
        "iterations": config.iterations,
        "images": final["images"],
        "seconds": round(seconds, 1),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    names = ("advflow", "advflow-ext", "torch", "diffusers", "transformers", "peft")
    found = {name: metadata.version(name) for name in names}
    return found | {"python": platform.python_version()}


def _commit() -> str | None:
    """The commit of this source tree; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _grid_indices(trainer: Trainer) -> list[int]:
    """The first few evaluation prompts of each category."""
    by_category: dict[str, list[int]] = {}
    for index, prompt in enumerate(trainer.eval_prompts):
        by_category.setdefault(trainer.reward.category(prompt), []).append(index)
    return [index for indices in by_category.values() for index in indices[:GRID_COLUMNS]]


def _write_atomically(path: Path, text: str) -> None:
    scratch = path.with_suffix(".partial")
    scratch.write_text(text)
    os.replace(scratch, path)


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Turns the first SIGINT or SIGTERM into a flag, so that an iteration is finished and saved before stopping."""
    asked = False

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signum, previous[signal.Signals(signum)])

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
