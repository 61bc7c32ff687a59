"""The training loop: roll out, score, turn rewards into advantages, improve the learner, let the rollout follow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

import advflow_ext as af
from advflow.algorithms import require_proportional
from advflow.algorithms.batch import Experience, Transitions
from advflow.control.capability import Curriculum
from advflow.control.distribution import DistributionReward
from advflow.core.device import pick_device
from advflow.core.files import require_folder
from advflow.core.randomness import generator
from advflow.core.ranks import Ranks, batches, longest
from advflow.core.sharding import clip_gradients
from advflow.data.prompts import check_prompts, load_eval_prompts, load_training_prompts
from advflow.models.adapters import read_adapter
from advflow.models.encoding import Encoder
from advflow.models.family import make_family
from advflow.policies import follow, make_policies
from advflow.processes.metrics import WeightedMetrics, join_metrics, of_all_ranks
from advflow.processes.reverse import join
from advflow.rewards.several import load_rewards
from advflow.run.average import AVERAGE, WeightAverage
from advflow.run.candidates import score_candidates
from advflow.run.drawing import draw_of
from advflow.run.evaluate import Evaluation, evaluate, finite_mean
from advflow.run.process import make_process
from advflow.run.scoring import Scoring
from advflow.run.shares import check_shares
from advflow.run.state import OptimizerState, Part, weights_of
from advflow.samplers.guidance import guide
from advflow.samplers.sampling import Conditioning
from advflow.settings.config import TrainConfig
from advflow.settings.optim import OptimConfig, RolloutPolicyConfig
from advflow.settings.registry import FAMILIES, REWARDS, SAMPLERS


class Trainer:
    """One run: everything that lives as long as it does.

    `check_stop` is called before each batch of images and while scores are waited for; what it raises ends a rollout or
    an evaluation. Of the images of an iteration `ranks` have a share each; all else, weights and advantages too, every
    process has whole.
    """

    def __init__(
        self, config: TrainConfig, check_stop: Callable[[], None] = lambda: None, ranks: Ranks | None = None
    ) -> None:
        self.config, self._check_stop, self.ranks = config, check_stop, ranks or Ranks()
        # One process alone can stop between two batches; several must agree on when, which they do between iterations
        # and where their scores have come.
        self._between_batches = check_stop if self.ranks.size == 1 else lambda: None
        # First what takes no model to check, so that a mistake is seen within seconds.
        check_shares(config, self.ranks.size)
        self.device = pick_device(config.device, self.ranks.local)
        self.prompts = load_training_prompts(config.data.prompts)
        self.prompts.require("rollout.prompts", config.rollout.prompts)
        if config.capability.candidates is not None:
            self.prompts.require("capability.candidates", config.capability.candidates)
        family = make_family(config.model.family, config.section(FAMILIES, config.model.family))
        family.check(config.model)
        if config.process == "reverse" and config.sde.reweight:
            require_proportional(config.algorithm, config.method)
        start = read_adapter(config.model)
        data = config.data
        self.rewards = load_rewards(data, lambda name: config.section(REWARDS, name))
        self.learnt = self.rewards.learnt()
        if data.embeddings_cache is not None:
            require_folder(data.embeddings_cache, "data.embeddings_cache")
        for remark in check_prompts(data, self.learnt.check, self.rewards.check, self.rewards.expect):
            print(remark)
        self.eval_prompts = load_eval_prompts(data.eval_prompts, config.evaluation.prompts_per_category)
        if len(self.eval_prompts) < self.ranks.size:
            raise ValueError(
                f"there are {len(self.eval_prompts)} held-out prompts and {self.ranks.size} processes; accepted is one "
                "prompt or more for each"
            )
        model = family.load(config.model, self.device)
        self.latents, self.real = model.latents, model.real
        encode = Encoder(model, data.embeddings_cache, self.device, self.ranks)
        self.conditioning = encode([prompt.text for prompt in self.prompts.prompts], "data.prompts")
        # What guidance leads away from; one row, held whole wherever embeddings are kept.
        negative = [config.rollout.negative_prompt]
        self._untold = encode(negative, "rollout.negative_prompt")[:1] if config.guided else None
        told = encode([prompt.text for prompt in self.eval_prompts], "data.eval_prompts")
        self.eval_conditioning = guide(told, self._untold, config.evaluation.guidance)
        transformer = model.transformer
        del model, encode  # and with them, unless prompts are encoded on demand, the text encoders
        self.policies = make_policies(family, transformer, config.model, config.runtime, config.seed, start, self.ranks)
        self.sampler = SAMPLERS.make(config.rollout.solver, config.section(SAMPLERS, config.rollout.solver))
        made = make_process(config, self.policies, self.latents, self.sampler)
        self.process, self.reference_control = made.process, made.reference
        self.gamma_control, self.entropy_control = made.gamma, made.entropy
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.policies.learner,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            foreach=self.device.type == "cuda" or None,  # which torch does not choose for sharded parameters
        )
        # What the next iteration depends on; whatever keeps a state of its own adds it here.
        self.parts: dict[str, Part] = {
            **weights_of(self.policies),
            "optimizer": OptimizerState(self.optimizer, self.policies.learner),
            "reference": self.reference_control,
        }
        controls = {"gamma": self.gamma_control, "entropy": self.entropy_control}
        self.parts |= {name: control for name, control in controls.items() if control is not None}
        self.distribution: DistributionReward | None = None
        if config.loo_fid.weight:
            if self.real is None:
                raise ValueError(
                    f"loo_fid.weight is {config.loo_fid.weight}; accepted is 0 with model.family "
                    f"{config.model.family!r}, which does not say what real images are like"
                )
            self.distribution = DistributionReward(config.loo_fid, self.real.extractor, self.real.reference)
            self.parts["loo_fid"] = self.distribution
        self.average: WeightAverage | None = None
        if config.evaluation.ema is not None:
            self.average = self.parts[AVERAGE] = WeightAverage(self.policies.learner, config.evaluation.ema)
        self.curriculum: Curriculum | None = None
        if config.capability.candidates is not None:
            rollout = config.rollout
            self.curriculum = Curriculum(
                config.capability, rollout.prompts, rollout.images_per_prompt, config.advantage
            )
            self.parts["capability"] = self.curriculum

    def iterate(self, iteration: int) -> dict[str, float]:
        """One round. Returns its numbers."""
        started = time.monotonic()
        experience, row = self.roll_out(iteration)
        rolled_out = time.monotonic()
        row |= self._improve(iteration, experience)
        trained = time.monotonic()
        rho = rollout_decay(self.config.rollout_policy, (iteration + 1) * self.config.updates)
        follow(self.policies, rho)
        updates = self.config.updates
        return row | {
            "rollout_policy_rho": rho,
            "lr": self._rate((iteration + 1) * updates - 1),
            "seconds_rollout": round(rolled_out - started, 4),
            "seconds_train": round(trained - rolled_out, 4),
            "images_per_second": round(self.config.images / (trained - started), 4),
            **self._memory(),
        }

    def _memory(self) -> dict[str, float]:
        """The most that tensors have held on a GPU since the iteration before; nothing is known of a CPU's."""
        if self.device.type != "cuda":
            return {}
        held = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"gigabytes": held / 1e9}

    def evaluate(self, keep: list[int] | None = None) -> Evaluation:
        """Scores what is given away on the held-out prompts; returns the images number `keep`, None being all."""
        with self.given_away():
            return evaluate(
                draw_of(self.config, self.policies, self.latents, "learner", self.config.evaluation.steps),
                self.latents,
                self.eval_prompts,
                self.eval_conditioning,
                self.rewards,
                self.config.rollout.batch,
                self.device,
                keep,
                self._between_batches,
                self.ranks,
                self._check_stop,
                compare=None if self.real is None else self.real.compare,
            )

    def given_away(self) -> AbstractContextManager[None]:
        """While it is open, the learner is what is evaluated, sampled from and exported: the average, if any."""
        return nullcontext() if self.average is None else self.average.in_force()

    def export(self, folder: Path) -> None:
        """Writes what is given away, as `Policies.export` does."""
        with self.given_away():
            self.policies.export(folder)

    def roll_out(self, iteration: int) -> tuple[Experience, dict[str, float]]:
        """Samples this process's share of the iteration's images from the rollout policy and scores them."""
        config, ranks = self.config.rollout, self.ranks
        group, rows = config.images_per_prompt, ranks.share(config.images)
        chosen = self._choose_prompts(iteration)
        prompts = [self.prompts.prompts[i] for i in chosen for _ in range(group)][rows]
        told = self._conditioning(chosen, rows)
        drawn_with = guide(told, self._untold, config.guidance)
        noise = self.latents.noise(config.images, generator(self.config.seed, "rollout", iteration), self.device)
        start = self.process.starting_noise(noise)[rows]
        with Scoring(self.learnt, prompts, self._check_stop, ranks) as scoring:
            x0, transitions, features = self._sample(start, drawn_with, iteration, rows.start, scoring)
            scores = scoring.scores()
        broken = ~x0.flatten(1).isfinite().all(1).cpu()
        # NaN must not even enter the learner: a zero loss gradient times a NaN activation is a NaN weight gradient.
        x0[broken] = 0.0
        if transitions is not None:
            # Each state by itself: one that a group shares stands for all of its images.
            usable = transitions.x.flatten(2).isfinite().all(2) & transitions.v_old.flatten(2).isfinite().all(2)
            transitions.x[~usable] = 0.0
        broken, reward, score = map(ranks.gather, (broken, scores.reward, scores.score))
        reward = reward.masked_fill(broken[:, None], torch.nan)
        rewards = self.learnt.combine(reward, group, self.config.advantage.combine)
        unscored = ~rewards.isfinite() & ~broken
        advantages = self._advantages(rewards)
        of_curriculum: dict[str, float] = {}
        of_distribution: dict[str, float] = {}
        if self.curriculum is not None:
            advantages, of_curriculum = self.curriculum.fuse(self.learnt.total(reward), advantages)
        more_advantages: tuple[torch.Tensor, ...] = ()
        if self.distribution is not None:
            of_set, of_distribution = self.distribution(torch.cat(features))
            more_advantages = (self.config.loo_fid.weight * self._advantages(ranks.gather(of_set)),)
        groups = rewards.view(-1, group)
        row = (
            self.learnt.means(reward, broken)
            | {
                "reward": finite_mean(self.learnt.total(reward)),
                "score": finite_mean(self.learnt.total(score)),
                "broken_images": int(broken.sum()),
                "unscored_images": int(unscored.sum()),
                "uniform_groups": (groups.amax(1) == groups.amin(1)).float().mean().item(),
                "advantage_group_mean_worst": advantages.view(-1, group).mean(1).abs().max().item(),
                "advantage_rms": advantages.square().mean().sqrt().item(),
            }
            | of_curriculum
            | of_distribution
        )
        # The loss gives a sample with this advantage no gradient and counts it.
        advantages = advantages.masked_fill(broken | unscored, torch.nan)
        rewards, advantages = rewards[rows].to(self.device), advantages[rows].to(self.device)
        in_step = ranks.in_step(config.images)
        learnt_with = guide(told, self._untold, self.config.learnt_guidance)
        more_advantages = tuple(each[rows].to(self.device) for each in more_advantages)
        experience = Experience(
            x0, rewards, advantages, learnt_with, group, rows, config.images, in_step, transitions, more_advantages
        )
        return experience, row

    def _choose_prompts(self, iteration: int) -> list[int]:
        """The numbers of the prompts that this iteration learns from."""
        config, seed, count = self.config.rollout, self.config.seed, self.config.capability.candidates
        drawn = self.prompts.draw(count or config.prompts, generator(seed, "prompts", iteration))
        if self.curriculum is None:
            return drawn
        told = self.conditioning[torch.tensor(drawn[self.ranks.share(len(drawn))], dtype=torch.long)]
        scores = score_candidates(
            draw_of(self.config, self.policies, self.latents, config.policy, config.steps, self.sampler),
            self.latents,
            [self.prompts.prompts[i] for i in drawn],
            guide(told, self._untold, config.guidance),
            self.latents.noise(len(drawn), generator(seed, "candidates", iteration), self.device),
            self.learnt,
            config.batch,
            self._between_batches,
            self.ranks,
            self._check_stop,
        )
        return [drawn[place] for place in self.curriculum.choose(scores)]

    def _conditioning(self, chosen: list[int], rows: slice) -> Conditioning:
        """What the policies are told of the images `rows`, of prompts `chosen`; other prompts are not encoded."""
        group = self.config.rollout.images_per_prompt
        first, last = rows.start // group, -(-rows.stop // group)
        return self.conditioning[torch.tensor(chosen[first:last])][torch.arange(rows.start, rows.stop) // group - first]

    @torch.no_grad()
    def _sample(
        self, noise: torch.Tensor, conditioning: Conditioning, iteration: int, first: int, scoring: Scoring
    ) -> tuple[torch.Tensor, Transitions | None, list[torch.Tensor]]:
        """Latents of images, the first being the iteration's `first`; with the steps that made them where the algorithm
        learns from those, and with the images' features where those are rewarded. The images are given to `scoring`."""
        config, process = self.config.rollout, self.process
        policy = process.policy(config.policy)
        latents, transitions, features = [], [], []
        most = longest(self.ranks.in_step(config.images))
        for rows, used in batches(len(noise), config.batch, most):
            self._between_batches()
            x0, steps = process.sample(policy, noise[rows], conditioning[rows], iteration, first + rows.start)
            if not used:
                continue
            latents.append(x0)
            images = self.latents.decode(x0)
            scoring.add(images)
            if self.distribution is not None:
                features.append(self.distribution.features(images))
            if steps is not None:
                transitions.append(steps)
        return torch.cat(latents), join(transitions) if transitions else None, features

    def _advantages(self, rewards: torch.Tensor) -> torch.Tensor:
        group, choice = self.config.rollout.images_per_prompt, self.config.advantage
        if choice.norm == "softmax":
            return af.softmax_advantages(rewards, group, clip_rewards=choice.clip, scale_by_std=choice.scale_by_std)
        return af.group_advantages(rewards, group, norm=choice.norm, clip=choice.clip, clip_mode=choice.clip_mode)

    def _improve(self, iteration: int, experience: Experience) -> dict[str, float]:
        """Takes this iteration's optimiser steps."""
        updates: list[list[WeightedMetrics]] = []
        norms: list[float] = []
        for losses in self.process.steps(iteration, experience):
            updates.append([])
            for loss in losses:
                (loss.out.loss * loss.weight).backward()
                if loss.weight:
                    updates[-1].append((loss.out.metrics, loss.weight))
            self.ranks.sum_gradients(self.policies.learner)
            norm = clip_gradients(self.policies.learner, self.config.optim.max_grad_norm)
            if math.isfinite(norm):
                self._step(iteration, len(updates) - 1)
                norms.append(norm)
            self.optimizer.zero_grad(set_to_none=True)
        updates = of_all_ranks(updates, self.ranks)
        row = join_metrics([(metrics, weight / len(updates)) for parts in updates for metrics, weight in parts])
        row |= self.process.diagnose(updates[0])
        row |= self.reference_control.update(row)
        if self.entropy_control is not None:
            row |= self.entropy_control.update(row["mean_entropy"], iteration)
        if self.gamma_control is not None:
            done = iteration * self.config.updates
            rho, rate = rollout_decay(self.config.rollout_policy, done), self._rate(max(done - 1, 0))
            row |= self.gamma_control.update(join_metrics(updates[0]), rho, rate / self.config.optim.lr)
        return row | {"grad_norm": sum(norms) / max(len(norms), 1), "skipped_steps": len(updates) - len(norms)}

    def _step(self, iteration: int, update: int) -> None:
        config = self.config
        step = iteration * config.updates + update
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._rate(step)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)

    def _rate(self, step: int) -> float:
        return learning_rate(self.config.optim, step, self.config.iterations * self.config.updates)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of a run of `steps`."""
    risen = min(1.0, (step + 1) / max(config.warmup, 1))
    left = 2.0 * (1.0 - step / steps) if config.decay == "second_half" else 1.0
    held = min(1.0, config.hold / (step + 1)) if config.hold is not None else 1.0
    return config.lr * min(risen, left) * held


def rollout_decay(config: RolloutPolicyConfig, step: int) -> float:
    """rho of the rollout policy's exponential moving average after `step` optimiser steps."""
    return min(max(config.rate * (step - config.start), 0.0), config.maximum)
