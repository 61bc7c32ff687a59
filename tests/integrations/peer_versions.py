"""The trainers' checkouts beside copies with our patches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from advflow_ext.integrations.patches import apply

FOLDERS = {
    "awm": "advantage_weighted_matching",
    "dance_grpo": "DanceGRPO",
    "diffusion_nft": "DiffusionNFT",
    "flow_grpo": "flow_grpo",
}
SCRIPTS = {
    "awm": "advantage_weighted_matching/scripts/train_sd3_awm.py",
    "dance_grpo": "fastvideo/train_grpo_flux.py",
    "diffusion_nft": "scripts/train_nft_sd3.py",
    "flow_grpo": "scripts/train_sd3.py",
}
FLOW_GRPO_STEP = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"


class Versions(NamedTuple):
    theirs: Path
    patched: Path


def patched_copy(name: str, peers: Path, scratch: Path) -> Versions:
    """A trainer's checkout, one of the folders in ``peers``, and its Python files with our patch."""
    checkout = peers / FOLDERS[name]
    for file in checkout.rglob("*.py"):
        target = scratch / file.relative_to(checkout)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    apply(name, scratch)
    return Versions(checkout, scratch)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())
