"""What is compared in docs/learning.md: for each study the runs of `advflow train`, and what is read off them.

All of a study are given the same number of images, those that a curriculum draws to choose its prompts among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SEEDS = (0, 1, 2)
ITERATIONS, IMAGES_AN_ITERATION = 36, 128  # of --config tiny
# The same with four and eight times the images, without which some methods learn next to nothing.
MANY, IMAGES_OF_MANY = "--rollout.prompts 64 --rollout.batch 512 --optim.micro_batch 512", 512
MOST = "--rollout.prompts 64 --rollout.images_per_prompt 16 --rollout.batch 1024 --optim.micro_batch 1024"
ITERATIONS_OF_MOST, IMAGES_OF_MOST = 40, 1024
ITERATIONS_OF_TOKENS, IMAGES_OF_TOKENS = 120, 256  # of --config ar
MANY_TOKENS, IMAGES_OF_MANY_TOKENS = "--rollout.prompts 32 --rollout.images_per_prompt 32 --rollout.batch 512", 1024
CANDIDATES, CANDIDATES_OF_MANY = 48, 256  # of a curriculum: each gets one image, which counts


@dataclass(frozen=True)
class Study:
    """Arguments of `advflow train` by label. Of several `rewards` each one's held-out score is read; of a model of
    tokens, beside the score, numbers `of_set`, of all held-out images together."""

    title: str
    rows: dict[str, str]
    rewards: tuple[str, ...] = ()
    of_set: tuple[str, ...] = ()
    images: int = ITERATIONS * IMAGES_AN_ITERATION


def _run(settings: str, iterations: int = ITERATIONS) -> str:
    return f"{settings} --iterations {iterations} --evaluation.every {iterations // 4}"


def _many(algorithm: str) -> str:
    return _run(f"--algorithm {algorithm} {MANY}")


def _curriculum(algorithm: str, select: str = "ema") -> str:
    settings = (
        f"--algorithm {algorithm} {MANY} --capability.candidates {CANDIDATES_OF_MANY} --capability.select {select}"
    )
    return _run(settings, ITERATIONS * IMAGES_OF_MANY // (IMAGES_OF_MANY + CANDIDATES_OF_MANY))


def _gammas(reward: str) -> dict[str, str]:
    run = f"--data.reward {reward} --algorithm advantage_flow"
    gammas = ("0.2", "0.5", "1.1", "2", "5", "1-A", "auto")
    # 1.1 is the default, and so the run of other studies too.
    return {
        f"gamma {gamma}": _run(run if gamma == "1.1" else f"{run} --advantage_flow.gamma {gamma}") for gamma in gammas
    }


def _pulls(reward: str) -> dict[str, str]:
    """What holds AdvantageFlow back: advantages / 5, its default, or clipped at 1, the paper's; and the reference."""
    run = f"--data.reward {reward} --algorithm advantage_flow"
    papers = f"{run} --advantage.clip 1 --advantage.clip_mode clip"
    return {
        "advantages / 5, lambda 0.01 (default)": _run(run),
        "advantages / 5, lambda 0": _run(f"{run} --advantage_flow.lam 0"),
        "clipped at 1, lambda 0.01": _run(papers),
        "clipped at 1, lambda 0.001 (the paper's)": _run(f"{papers} --advantage_flow.lam 0.001"),
    }


def _two_rewards(rule: str, redness: str, combine: str = "weighted_sum") -> str:
    weights = f"{{embedded: {rule}, redness: {redness}}}"
    return _run(f"--data.reward '{weights}' --advantage.combine {combine} --algorithm advantage_flow")


def _tokens(settings: str, iterations: int = ITERATIONS_OF_TOKENS) -> str:
    return _run(f"--config ar {settings}", iterations)


def _most(settings: str) -> str:
    return _run(f"{MOST} --algorithm {settings}", ITERATIONS_OF_MOST)


_OF_SET = ("fid", "precision", "recall", "modes_kl")
_METHODS = {
    "AdvantageFlow": "advantage_flow",
    "DiffusionNFT": "diffusion_nft",
    "AWM": "awm",
    "FlowAWR": "flow_awr",
    "Reward-weighted": "reward_weighted",
    "Flow-GRPO": "flow_grpo",
    "DanceGRPO": "dance_grpo",
    "MixGRPO": "mix_grpo",
    "Flow-CPS": "flow_cps",
    "GRPO-Guard": "grpo_guard",
    "Flow-DPPO": "flow_dppo",
}


def _methods(reward: str, labels: Iterable[str] = _METHODS) -> dict[str, str]:
    return {label: _run(f"--data.reward {reward} --algorithm {_METHODS[label]}") for label in labels}


STUDIES: dict[str, Study] = {
    "dense": Study("Every method on redness", _methods("redness")),
    "ordering": Study(
        "AdvantageFlow, DiffusionNFT and Flow-GRPO on the six categories",
        _methods("embedded", ("AdvantageFlow", "DiffusionNFT", "Flow-GRPO")),
    ),
    "pull-redness": Study("What holds AdvantageFlow, on redness", _pulls("redness")),
    "pull": Study("What holds AdvantageFlow, on the six categories", _pulls("embedded")),
    "gamma": Study("Gamma, on the six categories", _gammas("embedded")),
    "gamma-redness": Study("Gamma, on redness", _gammas("redness")),
    "capability": Study(
        "AdaGRPO's curriculum and its advantages, on the six categories",
        {
            row: arguments
            for label in ("Flow-GRPO", "Flow-CPS", "AdvantageFlow")
            for row, arguments in (
                (label, _many(_METHODS[label])),
                (f"{label} + AdaGRPO", _curriculum(_METHODS[label])),
            )
        },
        images=ITERATIONS * IMAGES_OF_MANY,
    ),
    "selection": Study(
        "Which prompts a curriculum keeps (AdvantageFlow, six categories)",
        {select: _curriculum("advantage_flow", select) for select in ("random", "easiest", "hardest", "medium", "ema")},
        images=ITERATIONS * IMAGES_OF_MANY,
    ),
    "front": Study(
        "Two rewards that are in each other's way (AdvantageFlow)",
        {
            "the rule alone": _two_rewards("1", "0"),
            "rule + 0.5 redness": _two_rewards("1", "0.5"),
            "rule + 2 redness": _two_rewards("1", "2"),
            "redness alone": _two_rewards("0", "1"),
            "gdpo": _two_rewards("1", "1", "gdpo"),
            "worst_first": _two_rewards("1", "1", "worst_first"),
        },
        rewards=("embedded", "redness"),
    ),
    "tokens": Study(
        "An autoregressive model: the reward alone, and leave-one-out FID beside it",
        {
            "the reward alone": _tokens("--loo_fid.weight 0"),
            "with leave-one-out FID": _tokens("--loo_fid.weight 1"),
            "the same, evaluated with guidance 2": _tokens("--loo_fid.weight 1 --evaluation.guidance 2"),
            "half its weight": _tokens("--loo_fid.weight 0.5"),
            "and the entropy controller": _tokens("--loo_fid.weight 1 --entropy.weight 2e-3"),
            "and AdaGRPO's curriculum": _tokens(
                f"--loo_fid.weight 1 --rollout.prompts 12 --capability.candidates {CANDIDATES}",
                ITERATIONS_OF_TOKENS * IMAGES_OF_TOKENS // (12 * 16 + CANDIDATES),
            ),
        },
        of_set=_OF_SET,
        images=ITERATIONS_OF_TOKENS * IMAGES_OF_TOKENS,
    ),
    "tokens-many": Study(
        "The same with four times the images an iteration",
        {
            "the reward alone": _tokens(f"--loo_fid.weight 0 {MANY_TOKENS}"),
            "with leave-one-out FID": _tokens(f"--loo_fid.weight 1 {MANY_TOKENS}"),
            "half its weight": _tokens(f"--loo_fid.weight 0.5 {MANY_TOKENS}"),
            "the released trainer's weight, 2": _tokens(f"--loo_fid.weight 2 {MANY_TOKENS}"),
        },
        of_set=_OF_SET,
        images=ITERATIONS_OF_TOKENS * IMAGES_OF_MANY_TOKENS,
    ),
    "reverse": Study(
        "Flow-GRPO with eight times the images an iteration, on the six categories",
        {
            "AdvantageFlow": _most("advantage_flow"),
            "Flow-GRPO": _most("flow_grpo"),
            "16 prompts of 64 images": _most("flow_grpo --rollout.prompts 16 --rollout.images_per_prompt 64"),
            "four sampler steps": _most("flow_grpo --rollout.steps 4"),
            "four, evaluated in four": _most("flow_grpo --rollout.steps 4 --evaluation.steps 4"),
            "three times the rate": _most("flow_grpo --optim.lr 2.1e-4"),
            "a random one of five steps": _most("flow_grpo --sde.window random --sde.within 5"),
            "the same, 1 / kappa": _most(
                "flow_grpo --sde.window random --sde.within 5 --flow_grpo.time_weight inverse_kappa"
            ),
            "KL to the reference": _most("flow_grpo --flow_grpo.kl_weight 0.04"),
            "AdamW's beta2 0.95, averaged weights": _most("flow_grpo --optim.betas [0.9,0.95] --evaluation.ema 0.9"),
        },
        images=ITERATIONS_OF_MOST * IMAGES_OF_MOST,
    ),
}
