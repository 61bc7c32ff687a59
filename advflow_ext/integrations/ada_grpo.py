"""AdaGRPO (arXiv 2606.06828) in yifan123/flow_grpo and XueZeyue/DanceGRPO, around a tracker of yours."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from advflow_ext.contract.checks import require_count
from advflow_ext.contract.numbers import require_number
from advflow_ext.integrations import _patching
from advflow_ext.integrations.dance_grpo import SCRIPTS
from advflow_ext.ops.capability import CapabilityTracker, cross_level_advantages

STATISTICS = "flow_grpo.stat_tracking"
_FLOW_GRPO = "yifan123/flow_grpo at ac4c86e"
_DANCE_GRPO = "XueZeyue/DanceGRPO at 15cc71d"
_UPDATE = "(self, prompts, rewards, type='grpo')"
_SAMPLER = "(self, dataset, batch_size, k, num_replicas, rank, seed=0)"
_STEP = (
    "(args, device, transformer, vae, reward_model, tokenizer, optimizer, lr_scheduler, loader, noise_scheduler, "
    "max_grad_norm, preprocess_val{last})"
)
_STEPS = {
    _STEP.format(last=last): f"{_DANCE_GRPO}, {where}" for last, where in (("", "LoRA"), (", ema_handler", "FLUX"))
}
# Their step takes the logarithm of its noise: none at all is not possible, this much is less than a bit of a latent.
_NO_NOISE = 1e-6

_flow_grpo, _dance_grpo = _patching.Patch("flow_grpo"), _patching.Patch("DanceGRPO")


def install_flow_grpo(
    tracker: CapabilityTracker,
    score: Callable[[list[int]], Tensor] | None = None,
    candidates: int | None = None,
    weight: float = 1.0,
) -> None:
    """Adds what ``tracker`` says to flow_grpo's advantages, and lets its prompts be the nearest of ``candidates``.

    ``PerPromptStatTracker.update`` keeps its own advantages, to which ``weight`` times the calibrated ones of
    :func:`advflow_ext.cross_level_advantages` are added, prompt by prompt. With ``score``, every
    ``DistributedKRepeatSampler`` of a script that is imported or runs draws ``candidates`` prompts where it drew the
    few that a batch needs, asks ``score`` what one deterministic image for each scores (the numbers of all of them in
    the dataset in, their scores out, on every rank the same), lets the tracker observe that, and keeps the nearest. The
    scores are of all ranks already, so make that tracker with ``per_rank=True``. Without ``score`` call
    ``tracker.observe`` yourself, before the first update. Called again, it goes on with what it is given last; where
    that is refused, with what it was given before.

    A data loader asks its sampler some batches ahead: of what the policy was then.

    Raises ValueError for one of ``score`` and ``candidates`` without the other, candidates below 1 and a negative
    weight, ImportError where flow_grpo cannot be imported and where no script is there for ``score``, RuntimeError
    where a signature is not that of ac4c86e and where something holds a function out of reach.
    """
    if (score is None) != (candidates is None):
        raise ValueError(
            f"candidates is {candidates!r} {'without' if score is None else 'with a'} score; accepted: both."
        )
    if candidates is not None:
        require_count("candidates", candidates, 1)
    require_number("weight", weight, low=0.0)
    owner = vars(_patching.find_module("flow_grpo", STATISTICS))["PerPromptStatTracker"]
    _patching.require_signature(owner, "update", {_UPDATE: _FLOW_GRPO})
    replacements = [_patching.Replacement(owner, "update", _fused_update(owner, tracker, weight))]
    if score is not None and candidates is not None:
        found = _samplers()
        if not found:
            raise ImportError(
                "flow_grpo is not to be patched: no module that is imported defines DistributedKRepeatSampler; "
                "accepted is a call in the script."
            )
        for sampler in found:
            _patching.require_signature(sampler, "__init__", {_SAMPLER: _FLOW_GRPO})
            replacements.append(
                _patching.Replacement(sampler, "__iter__", _nearest_batches(tracker, score, candidates))
            )
    _flow_grpo.replace_anew(replacements)
    _patching.announce("flow_grpo", "advantages of a group and of the capability are added (AdaGRPO).")


def install_dance_grpo(tracker: CapabilityTracker, candidates: int = 10) -> None:
    """Lets a step of DanceGRPO's FLUX scripts learn from the nearest of ``candidates`` batches' prompts.

    ``train_one_step`` of every such script that is imported or runs is handed a loader that draws so many batches,
    gives each prompt one image of the script's own ``sample_reference_model`` without noise, lets the tracker observe
    the scores, and goes on with as many prompts as a batch has. Called again, it goes on with what it is given last.
    Its advantages stand inline, where nothing can be replaced by name; AdaGRPO's are this in place of its loop over
    groups::

        advantages = af.cross_level_advantages(
            samples["rewards"], args.num_generations, mean=tracker.mean, variance=tracker.variance
        ).advantages

    Raises ValueError for candidates below 1, ImportError where no such script is there, RuntimeError where its
    signature is not that of 15cc71d and where something holds a function out of reach.
    """
    require_count("candidates", candidates, 1)
    scripts = _scripts()
    if not scripts:
        raise ImportError(
            "DanceGRPO is not to be patched: no module that is imported defines train_one_step and "
            "sample_reference_model; accepted is a call in a FLUX script of it, below them, such as in the first line "
            "of main."
        )
    for script in scripts:
        if not _dance_grpo.replaces(script, "train_one_step"):
            _patching.require_signature(script, "train_one_step", _STEPS)
    _dance_grpo.replace_anew(
        [
            _patching.Replacement(script, "train_one_step", _nearest_step(script, tracker, candidates))
            for script in scripts
        ]
    )
    _patching.announce("DanceGRPO", f"a step learns from the nearest of {candidates} batches' prompts (AdaGRPO).")


def uninstall() -> None:
    """Puts back what was replaced in both, wherever it is; harmless without."""
    _flow_grpo.restore()
    _dance_grpo.restore()


def _fused_update(owner: type, tracker: CapabilityTracker, weight: float) -> _patching.Function:
    def update(self: Any, prompts: Any, rewards: Any, type: str = "grpo") -> Any:
        advantages = _flow_grpo.original(owner, "update")(self, prompts, rewards, type)
        if type != "grpo":
            return advantages
        values = torch.as_tensor(rewards, dtype=torch.float64)
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(str(prompt), []).append(place)
        for rows in places.values():
            if len(rows) > 1:
                # Of [N, timesteps] rewards every column is a group.
                group = values[rows].reshape(len(rows), -1).T.flatten()
                out = cross_level_advantages(group, len(rows), mean=tracker.mean, variance=tracker.variance)
                added = weight * out.calibrated.view(-1, len(rows)).T.reshape(values[rows].shape)
                advantages[rows] = advantages[rows] + added.cpu().numpy()
        return advantages

    return update


def _samplers() -> list[type]:
    held = [vars(module).get("DistributedKRepeatSampler") for module in _patching.imported_modules()]
    return list({id(each): each for each in held if isinstance(each, type)}.values())


def _nearest_batches(
    tracker: CapabilityTracker, score: Callable[[list[int]], Tensor], candidates: int
) -> _patching.Function:
    def __iter__(self: Any) -> Iterator[list[int]]:
        while True:
            g = torch.Generator().manual_seed(self.seed + self.epoch)  # as theirs: the same on every rank
            drawn = torch.randperm(len(self.dataset), generator=g)[: max(candidates, self.m)].tolist()
            scores = score(drawn)
            tracker.observe(scores)
            kept = [drawn[place] for place in tracker.pick(scores, self.m).tolist()]
            repeated = [number for number in kept for _ in range(self.k)]
            shuffled = [repeated[place] for place in torch.randperm(len(repeated), generator=g).tolist()]
            yield shuffled[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    return __iter__


def _scripts() -> list[ModuleType]:
    names = ("train_one_step", "sample_reference_model")
    return [
        module
        for module in _patching.imported_modules()
        if module.__name__.startswith(SCRIPTS) and all(callable(vars(module).get(name)) for name in names)
    ]


def _nearest_step(script: ModuleType, tracker: CapabilityTracker, candidates: int) -> _patching.Function:
    def train_one_step(*given: Any, **named: Any) -> Any:
        original = _dance_grpo.original(script, "train_one_step")
        call = inspect.signature(original).bind(*given, **named)
        call.arguments["loader"] = iter([_nearest_batch(script, tracker, candidates, call.arguments)])
        return original(*call.args, **call.kwargs)

    return train_one_step


def _nearest_batch(
    script: ModuleType, tracker: CapabilityTracker, candidates: int, given: dict[str, Any]
) -> tuple[Any, ...]:
    """What the loader would give, of the prompts nearest to the tracker's mean among ``candidates`` batches."""
    batches = [next(given["loader"]) for _ in range(candidates)]
    *tensors, captions = zip(*batches, strict=True)
    states, pooled, text_ids = (torch.cat(parts) for parts in tensors)
    texts = [text for part in captions for text in ([part] if isinstance(part, str) else part)]
    still = copy.copy(given["args"])
    still.eta = _NO_NOISE
    names = ("device", "transformer", "vae")
    scores = vars(script)["sample_reference_model"](
        still, *(given[name] for name in names), states, pooled, text_ids,
        given["reward_model"], given["tokenizer"], texts, given["preprocess_val"],
    )[0].float()  # fmt: skip
    tracker.observe(scores)
    kept = tracker.pick(scores, len(states) // candidates)
    return states[kept], pooled[kept], text_ids[kept], [texts[place] for place in kept.tolist()]
