"""What is compared in docs/learning.md: for each study the runs of `advflow train`, and what is read off them.

All of a study are given the same number of images, those that a curriculum draws to choose its prompts among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SEEDS = (0, 1, 2)
IMAGES_AN_ITERATION = 128  # of --config tiny
CANDIDATES = 64  # of a curriculum: each gets one image, which counts
ITERATIONS = 36
ITERATIONS_OF_TOKENS, IMAGES_OF_TOKENS = 120, 256  # those of --config ar


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


def _curriculum(algorithm: str, select: str = "ema") -> str:
    settings = f"--algorithm {algorithm} --capability.candidates {CANDIDATES} --capability.select {select}"
    return _run(settings, ITERATIONS * IMAGES_AN_ITERATION // (IMAGES_AN_ITERATION + CANDIDATES))


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
    weights = f"{{embedded:{rule},redness:{redness}}}"
    return _run(f"--data.reward {weights} --advantage.combine {combine} --algorithm advantage_flow")


def _tokens(settings: str) -> str:
    return _run(f"--config ar {settings}", ITERATIONS_OF_TOKENS)


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
                *_methods("embedded", (label,)).items(),
                (f"{label} + AdaGRPO", _curriculum(_METHODS[label])),
            )
        },
    ),
    "selection": Study(
        "Which prompts a curriculum keeps (AdvantageFlow, six categories)",
        {select: _curriculum("advantage_flow", select) for select in ("random", "easiest", "hardest", "medium", "ema")},
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
        },
        of_set=("fid", "precision", "recall", "modes_kl"),
        images=ITERATIONS_OF_TOKENS * IMAGES_OF_TOKENS,
    ),
}
