"""What several processes have to share."""

from __future__ import annotations

from advflow.settings.config import TrainConfig


def check_shares(config: TrainConfig, size: int) -> None:
    """Refuses more processes than images, and groups in two processes where a loss compares within groups."""
    if config.rollout.images < size:
        raise ValueError(
            f"rollout.prompts x rollout.images_per_prompt is {config.rollout.images}; with {size} processes "
            f"accepted are {size} images or more"
        )
    candidates = config.capability.candidates
    if candidates is not None and candidates < size:
        raise ValueError(
            f"capability.candidates is {candidates}; with {size} processes accepted are {size} candidates or more"
        )
    best = config.algorithm == "reward_weighted" and config.method.method == "best"
    if best and config.rollout.prompts % size:
        raise ValueError(
            f'rollout.prompts is {config.rollout.prompts}; with reward_weighted.method "best", which compares the '
            f"images of a prompt, and {size} processes accepted is a multiple of {size}"
        )
