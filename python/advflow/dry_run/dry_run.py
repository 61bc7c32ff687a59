"""Looks at everything that a run needs, in the order in which it would meet it, and stops at nothing."""

from __future__ import annotations

from pathlib import Path

from advflow.algorithms import check_settings, require_proportional
from advflow.core.device import pick_device
from advflow.core.files import require_folder
from advflow.dry_run.account import account
from advflow.dry_run.estimate import decoded_at_once, disk, memory, micro_batch, prompts_on_disk, shares, work
from advflow.dry_run.findings import Findings
from advflow.dry_run.passes import passes_of
from advflow.dry_run.prompts import look_at_prompts
from advflow.models.adapters import read_adapter
from advflow.models.encoding import user_cache
from advflow.models.family import Outline, Outlined, make_family
from advflow.processes.reverse import StochasticSampler
from advflow.rewards.examined import Examined, examine
from advflow.run.folder import check_folder
from advflow.run.shares import check_shares
from advflow.run.trackers import check_trackers
from advflow.settings.config import TrainConfig
from advflow.settings.registry import FAMILIES, REWARDS, STOCHASTIC_SAMPLERS
from advflow.settings.yaml_files import CONFIG


def dry_run(config: TrainConfig, resume: bool, size: int) -> Findings:
    """What can be known of a run in `size` processes. Loads no weights, asks no network, writes nothing."""
    found = Findings()
    _look_at_settings(config, resume, size, found)
    rewards = _look_at_rewards(config, found)
    prompts, held_out = look_at_prompts(config.data, config.evaluation.prompts_per_category, rewards, found)
    _look_at_numbers(config, size, prompts, held_out, found)
    if outlined := _look_at_model(config, found):
        with found.noting():
            _estimate(config, *outlined, size, prompts, held_out, found)
    return found


def _look_at_settings(config: TrainConfig, resume: bool, size: int, found: Findings) -> None:
    model = config.model
    what = f"LoRA, rank {model.lora_rank}, alpha {model.lora_alpha}" if model.trainable == "lora" else "all weights"
    found.say("method", f"{config.algorithm}, {config.process} process; {what}; {model.dtype}")
    with found.noting():
        check_settings(config.algorithm, config.method, config.rollout.images_per_prompt)
    if config.process == "reverse" and config.sde.reweight:
        with found.noting():
            require_proportional(config.algorithm, config.method)
    with found.noting():
        check_folder(config, resume)
        there = (Path(config.out) / CONFIG).is_file()
        found.say("folder", f"{config.out}: {'the run in it goes on' if there else 'a new run'}")
    with found.noting():
        check_trackers(config.tracking)
    with found.noting():
        found.say("device", f"{config.device}: {pick_device(config.device)} here")
    with found.noting():
        check_shares(config, size)
        found.say("processes", shares(config, size))


def _look_at_rewards(config: TrainConfig, found: Findings) -> dict[bool, list[Examined]]:
    """The rewards, by whether they are learnt from."""
    rewards: dict[bool, list[Examined]] = {True: [], False: []}
    for name, each in config.data.rewards.items():
        examined = examine(each, config.section(REWARDS, each.reward))
        state = examined.remark or ("see below" if examined.faults else "what it needs is here")
        found.say("reward", f"{name}, weight {each.weight:g}: {state}")
        for fault in examined.faults:
            found.fault(fault)
        rewards[bool(each.weight)].append(examined)
    return rewards


def _look_at_numbers(config: TrainConfig, size: int, prompts: int, held_out: int, found: Findings) -> None:
    """How many prompts settings ask for, against how many there are. A file that could not be read has none."""
    for name, count in (
        ("rollout.prompts", config.rollout.prompts),
        ("capability.candidates", config.capability.candidates),
    ):
        if prompts and count is not None and count > prompts:
            found.fault(f"{name} is {count}; data.prompts has only {prompts} different prompts")
    if held_out and held_out < size:
        found.fault(
            f"there are {held_out} held-out prompts and {size} processes; accepted is one prompt or more for each"
        )
    folder = config.data.embeddings_cache
    if prompts_on_disk(config.data, prompts, held_out):
        found.say("embeddings", f"in {folder or user_cache()}")
    with found.noting():
        require_folder(folder or str(user_cache()), "data.embeddings_cache")


def _look_at_model(config: TrainConfig, found: Findings) -> tuple[Outlined, Outline] | None:
    """Its family and its shapes, where it has any and they can be read."""
    with found.noting():
        family = make_family(config.model.family, config.section(FAMILIES, config.model.family))
        with found.noting():
            read_adapter(config.model)
        if not isinstance(family, Outlined):
            family.check(config.model)
            found.say(
                "model", f"{config.model.pipeline}; no estimate: the family {config.model.family!r} has no outline"
            )
            return None
        for fault in family.missing(config.model):
            found.fault(fault)
        return family, family.outline(config.model)
    return None


def _estimate(
    config: TrainConfig,
    family: Outlined,
    outline: Outline,
    size: int,
    prompts: int,
    held_out: int,
    found: Findings,
) -> None:
    sigmas = outline.sigmas(config.rollout.steps)
    if config.process == "reverse":
        steps = STOCHASTIC_SAMPLERS.make(config.sde.sampler, config.section(STOCHASTIC_SAMPLERS, config.sde.sampler))
        StochasticSampler(config.sde, steps, config.rollout, sigmas, config.seed)
    its = account(family, outline, config.model, micro_batch(config, size), decoded_at_once(config, size))
    random = ", with RANDOM WEIGHTS" if config.model.random_weights else ""
    found.say(
        "model",
        f"{config.model.pipeline}{random}: {its.parameters / 1e6:,.1f} million parameters in the transformer, "
        f"{its.trained / 1e6:,.1f} million trained",
    )
    for line in (
        *memory(config, its, size, prompts, held_out),
        *disk(config, its, prompts, held_out),
        *work(config, its, passes_of(config, sigmas, held_out), size),
    ):
        found.say(*line)
