"""The loss blocks of four trainers, taken out of their own scripts, before and after our patches, on the same tensors.

A block is what stands between two lines that a script has before and after. It is run with its variables bound: a
stand-in for the transformer answers with given velocities. Run in float64, the trainer's own is the truth.
"""

from __future__ import annotations

import ast
import contextlib
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import advflow_ext as af

Names = dict[str, Any]


def block(source: str, first: str, last: str) -> str:
    """From the line after the one that holds ``first`` to that before the next that holds ``last``."""
    _, _, rest = source.partition(first)
    body, found, _ = rest.partition("\n")[2].partition(last)
    assert found, f"no {first!r} ... {last!r}"
    return textwrap.dedent(body.rpartition("\n")[0])


def define(source: str, names: Names, *functions: str) -> None:
    """Defines functions of a script among ``names`` without running the rest of it."""
    wanted = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in functions]
    assert len(wanted) == len(functions)
    exec(compile(ast.Module(wanted, []), "script", "exec"), names)


class Velocities:
    """Answers as a transformer with three sets of weights: the learner's, the rollout's or EMA's, the reference's."""

    def __init__(self, **of: Tensor) -> None:
        self.of, self.adapter, self.module = of, "default", self

    def __call__(self, **_: object) -> tuple[Tensor]:
        return (self.of[self.adapter],)

    def set_adapter(self, name: str) -> None:
        self.adapter = name

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        kept, self.adapter = self.adapter, "ref"
        yield
        self.adapter = kept

    def train(self) -> None: ...

    def eval(self) -> None: ...


@dataclass(frozen=True)
class Given:
    """Latents of one shape, and numbers, that a block is run on."""

    v: Tensor
    v_old: Tensor
    v_ref: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    advantages: Tensor

    @classmethod
    def random(cls, count: int, shape: tuple[int, ...], drift: float) -> Given:
        generator = torch.Generator().manual_seed(7)
        x0, noise, *changes = (torch.randn(count, *shape, generator=generator) for _ in range(5))
        v_old = noise - x0 + 0.3 * changes[0]
        t = torch.linspace(1, 0.1, count)
        advantages = 2 * torch.randn(count, generator=generator)
        return cls(v_old + drift * changes[1], v_old, v_old + 0.02 * changes[2], x0, noise, t, advantages)

    def to(self, latents: torch.dtype, velocities: torch.dtype | None = None) -> Given:
        """The same values in other dtypes, velocities perhaps in one of their own."""
        cast = {name: value.to(latents) for name, value in vars(self).items()}
        cast |= {name: value.to(velocities or latents) for name, value in cast.items() if name.startswith("v")}
        return Given(**cast)


@dataclass
class Result:
    loss: Tensor
    gradient: Tensor
    logged: dict[str, Tensor]
    given: list[Tensor]  # what the block finds
    run: Callable[[], Tensor]  # the block once more, to be measured


def run(code: str, names: Names, v: Tensor, logged: Callable[[Names], dict[str, Tensor]]) -> Result:
    compiled = compile(code, "block", "exec")
    given = [each for each in (*names.values(), *names.get("sample", {}).values()) if isinstance(each, Tensor)]

    def once() -> Tensor:
        exec(compiled, names)
        loss: Tensor = names["loss"]
        return loss

    loss = once()
    (gradient,) = torch.autograd.grad(loss, v)
    values = {name: value.detach() for name, value in logged(names).items()}
    return Result(loss.detach(), gradient, values, given, once)


def diffusion_nft(source: str, given: Given, *, beta: float, mode: str) -> Result:
    v = given.v.clone().requires_grad_()
    t = given.t.view(-1, *[1] * (v.dim() - 1))
    names = {
        "torch": torch, "af": af, "j_idx": 0, "x0": given.x0, "noise": given.noise, "t": given.t, "t_expanded": t,
        "xt": (1 - t) * given.x0 + t * given.noise,
        "config": SimpleNamespace(
            beta=beta, train=SimpleNamespace(adv_clip_max=5, adv_mode=mode, beta=1e-4)
        ),
        "train_sample_batch": {"advantages": given.advantages[:, None]},
        "forward_prediction": v, "old_prediction": given.v_old, "ref_forward_prediction": given.v_ref,
        "loss_terms": {},
    }  # fmt: skip
    code = block(source, "loss_terms = {}", "# Scale loss for gradient accumulation")
    return run(code, names, v, lambda names: names["loss_terms"])


def awm(source: str, given: Given, *, loss_type: str, off_policy: bool, **train: Any) -> Result:
    v, draws = given.v.clone().requires_grad_(), 2
    column = given.t.view(-1, 1, 1, 1)
    transformer = Velocities(default=v, ema=given.v_old, ref=given.v_ref)
    settings: Names = {"weighting": "ghuber", "kl_weight": "Uniform", "kl_ema_weight": "Uniform", "clip_range": 1.0}
    settings |= {"loss_type": loss_type, "off_policy": off_policy, "cfg": False, "ghuber_power": 0.25, "beta": 0.003}
    settings |= {"ema_beta": 1, "adv_clip_max": 5, "advantage_max": 1, "train_timesteps": draws}
    settings |= {"batch_size": len(v) // draws, "gradient_accumulation_steps": 1, **train}
    config = SimpleNamespace(train=SimpleNamespace(**settings), sample=SimpleNamespace())
    sample = {"timesteps": column, "clean_latents": given.x0, "train_random_noise": given.noise}
    sample["advantages"] = given.advantages[: len(v) // draws, None]
    names: Names = {
        "torch": torch, "af": af, "transformer": transformer, "pipeline": None, "sample": sample, "config": config,
        "embeds": None, "pooled_embeds": None, "autocast": contextlib.nullcontext, "i": 0,
        "accelerator": SimpleNamespace(is_main_process=False), "info": defaultdict(list),
    }  # fmt: skip
    define(source, names, "compute_log_prob_awm")
    if off_policy:
        transformer.set_adapter("ema")
        noised = (1 - column) * given.x0 + column * given.noise
        arguments = (transformer, None, sample, column, None, None, config, noised, given.x0, given.noise)
        old = names["compute_log_prob_awm"](*arguments, weighting=settings["weighting"])[0].detach()
        sample["old_log_probs"] = old.view(draws, -1)
        transformer.set_adapter("default")
    code = block(source, "with accelerator.accumulate(transformer):", 'info["loss"].append(loss)')
    return run(code, names, v, lambda names: {name: values[-1] for name, values in names["info"].items()})


def flow_grpo_scheduler(dtype: torch.dtype) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    scheduler.sigmas = scheduler.sigmas.to(dtype)
    return scheduler


def flow_grpo(source: str, given: Given, *, step: str, clip: float, j: int, kl_weight: float) -> Result:
    """Of step ``j``, as the script trains them. ``step``: the file of sde_step_with_logprob."""
    v, exact = given.v.clone().requires_grad_(), given.x0.dtype == torch.float64
    if exact:
        source, step = (text.replace(".float()", ".double()") for text in (source, step))
    scheduler = flow_grpo_scheduler(given.x0.dtype)
    names: Names = {"torch": torch, "af": af, "transformer": Velocities(default=v, ref=given.v_ref)}
    exec(step, names)
    define(source, names, "compute_log_prob")
    table = af.StepTable(scheduler.sigmas, noise_level=0.7)
    # Drawn in float32, as the rollout does, then stored as each version of the script stores it.
    drawn = af.sde_step(given.v_old.float(), given.x0.float(), table, j, given.noise.float())
    x_next, timesteps = drawn.x_next.to(given.x0.dtype), scheduler.timesteps.expand(len(v), -1)
    if "sde_step_with_logprob" in source:
        given_step = (scheduler, given.v_old, timesteps[:, j], given.x0, 0.7, x_next)
        with torch.no_grad():
            old = names["sde_step_with_logprob"](*given_step)[1]
    else:
        old = torch.stack([given.v_old.float(), drawn.eps], dim=1)
    stored = {"latents": given.x0, "next_latents": x_next, "log_probs": old, "advantages": given.advantages}
    sample = {name: value[:, None].expand(-1, 10, *value.shape[1:]) for name, value in stored.items()}
    names |= {
        "sample": sample | {"timesteps": timesteps}, "j": j, "embeds": None, "pooled_embeds": None,
        "autocast": contextlib.nullcontext, "pipeline": SimpleNamespace(scheduler=scheduler),
        "info": defaultdict(list),
        "config": SimpleNamespace(
            train=SimpleNamespace(cfg=False, beta=kl_weight, adv_clip_max=5, clip_range=clip),
            sample=SimpleNamespace(noise_level=0.7),
        ),
    }  # fmt: skip
    exec("".join(re.findall(r"^ *(table = .*)$", source, re.MULTILINE)), names)
    code = block(source, "with accelerator.accumulate(transformer):", 'info["loss"].append(loss)')
    return run(code, names, v, lambda names: {name: values[-1] for name, values in names["info"].items()})


def dance_names(source: str, transformer: Velocities) -> Names:
    names: Names = {"torch": torch, "af": af, "math": math, "transformer": transformer}
    define(source, names, "flux_step", "run_sample_step", "grpo_one_step")
    sigmas = torch.linspace(1, 0, 17)
    names["sigma_schedule"] = 3 * sigmas / (1 + 2 * sigmas)
    names["args"] = SimpleNamespace(eta=0.3, clip_range=1e-4, adv_clip_max=5.0, gradient_accumulation_steps=1)
    return names


def dance_grpo(source: str, given: Given, *, clip: float, step: int) -> Result:
    """One transition, as the script trains them; ``x0`` is its latent."""
    v, exact = given.v.clone().requires_grad_(), given.x0.dtype == torch.float64
    names = dance_names(source.replace("torch.float32", "torch.float64") if exact else source, Velocities(default=v))
    sigmas, args = names["sigma_schedule"].to(given.x0.dtype), names["args"]
    args.clip_range = clip
    table = af.StepTable(sigmas, sampler="dance_sde", noise_level=args.eta)
    drawn = af.sde_step(given.v_old.float(), given.x0.float(), table, step, given.noise.float())
    x_next = drawn.x_next.to(given.x0.dtype)
    if "torch.exp(new_log_probs" in source:
        with torch.no_grad():
            old = names["flux_step"](given.v_old, given.x0, args.eta, sigmas, step, x_next, True, True)[2]
    else:
        old = torch.stack([given.v_old.float(), drawn.eps], dim=1)
    sample = dict.fromkeys(("encoder_hidden_states", "pooled_prompt_embeds", "text_ids", "image_ids"), torch.ones(1, 8))
    sample |= {"latents": given.x0[:, None], "next_latents": x_next[:, None], "log_probs": old[:, None]}
    sample |= {"advantages": given.advantages, "timesteps": torch.zeros(1, 1)}
    names |= {"sample": sample, "perms": torch.tensor([[step]]), "i": 0, "_": 0, "train_timesteps": 1}
    names |= {"sigma_schedule": sigmas, "table": table}
    code = block(source, "for _ in range(train_timesteps):", "loss.backward()")
    return run(code, names, v, lambda names: {"ratio": names["ratio"]})


def dance_rollout(source: str, given: Given) -> tuple[Tensor, Tensor]:
    """The latents that ``run_sample_step`` makes with one velocity at every step, and what travels as log_probs."""
    transformer = Velocities(default=given.v_old)
    names = dance_names(source, transformer)
    ones = torch.ones(1, 8)
    torch.manual_seed(3)
    with torch.no_grad():
        z, _, latents, log_probs = names["run_sample_step"](
            names["args"], given.x0, range(16), names["sigma_schedule"], transformer, ones, ones, ones, ones, True
        )
    assert torch.equal(z, latents[:, -1])
    return latents, log_probs


class FlowGRPORollout(NamedTuple):
    latents: Tensor  # [B, T + 1, ...]
    log_ratio: Tensor  # the largest magnitude over T - 1 steps, before any update
    stored: Tensor


def flow_grpo_rollout(checkout: Path, dtype: torch.dtype, guidance: float) -> FlowGRPORollout:
    """The script's pipeline and compute_log_prob on the embedded Stable Diffusion 3, as accelerate runs it: autocast
    inside the transformer, whose answer is float32, and prompts in half precision."""
    from advflow.models.sd3 import pipeline_folder
    from diffusers import StableDiffusion3Pipeline

    folder = checkout / "flow_grpo" / "diffusers_patch"
    package = ModuleType("flow_grpo_patched")
    package.__path__ = [str(folder)]
    parts: Names = {"__package__": package.__name__, "__name__": f"{package.__name__}.pipeline"}
    with mock.patch.dict(sys.modules, {package.__name__: package}):
        exec((folder / "sd3_pipeline_with_logprob.py").read_text(), parts)
        script: Names = {"torch": torch, "af": af}
        exec((folder / "sd3_sde_with_logprob.py").read_text(), script)
    define((checkout / "scripts" / "train_sd3.py").read_text(), script, "compute_log_prob")

    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_folder("embedded"))
    pipeline.set_progress_bar_config(disable=True)
    forward = pipeline.transformer.forward

    def as_accelerate(*arguments: Any, **named: Any) -> tuple[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return (forward(*arguments, **named)[0].float(),)

    pipeline.transformer.forward = as_accelerate
    with torch.no_grad():
        prompts = pipeline.encode_prompt(["a red circle", "two blue squares"], None, None, max_sequence_length=16)
        given, nothing, pooled, pooled_nothing = (each.to(dtype) for each in prompts)
        torch.manual_seed(0)
        _, latents, stored = parts["pipeline_with_logprob"](
            pipeline, prompt_embeds=given, pooled_prompt_embeds=pooled, negative_prompt_embeds=nothing,
            negative_pooled_prompt_embeds=pooled_nothing, num_inference_steps=10, guidance_scale=guidance,
            output_type="pt", height=32, width=32, noise_level=0.7,
        )  # fmt: skip
        steps = torch.stack(latents, dim=1)
        sample = {"latents": steps[:, :-1], "next_latents": steps[:, 1:], "log_probs": torch.stack(stored, dim=1)}
        sample["timesteps"] = pipeline.scheduler.timesteps.repeat(len(steps), 1)
        cfg = guidance > 1
        settings = SimpleNamespace(guidance_scale=guidance, noise_level=0.7)
        config = SimpleNamespace(train=SimpleNamespace(cfg=cfg), sample=settings)
        embeds = (torch.cat([nothing, given]), torch.cat([pooled_nothing, pooled])) if cfg else (given, pooled)
        table = af.StepTable(pipeline.scheduler.sigmas, noise_level=0.7)
        largest = torch.zeros(())
        for j in range(9):
            answer = script["compute_log_prob"](pipeline.transformer, pipeline, sample, j, *embeds, config)
            old = sample["log_probs"][:, j]
            if isinstance(answer, tuple):
                log_ratio = (answer[1] - old).abs().max()
            else:
                out = af.flow_grpo_loss(answer, *old.unbind(1), table, j, torch.ones(len(steps)))
                log_ratio = out.metrics.values[out.metrics.names.index("max_abs_log_ratio")]
            largest = torch.maximum(largest, log_ratio)
    return FlowGRPORollout(steps, largest, sample["log_probs"])
