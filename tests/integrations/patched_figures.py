"""What our diffs change, for docs/drop-in.md: ``PEERS=folder python -m tests.integrations.patched_figures``.

Errors are against the trainer's own block in float64. Operations are those of the loss block and its backward pass on
tensors of latent size and on smaller ones, without views. Saved is what autograd keeps between the two, in latents of
float32. Reads are operations that would wait for a device. Times are medians of one thread.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from tests.integrations import patched_blocks as blocks
from tests.integrations.counting import Count, as_on_a_device
from tests.integrations.patched_blocks import Given, Result
from tests.integrations.peer_versions import FLOW_GRPO_STEP, SCRIPTS, Versions, error, patched_copy


class Kept:
    """A saved tensor, as long as the graph that saved it lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_latents(result: Result, given: Given) -> float:
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*vars(given).values(), *result.given)}
    kept: WeakSet[Kept] = WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept.add(saved := Kept(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        loss = result.run()
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage() for saved in kept}
    size = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in inputs)
    loss.detach()  # what it keeps has to live until here
    return size / (4 * given.v.numel())


def milliseconds(result: Result) -> float:
    taken = []
    for _ in range(15):
        start = time.perf_counter()
        result.run().backward()
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken)


def operations(result: Result, latent: int) -> Count:
    with pytest.MonkeyPatch.context() as monkeypatch, Count(latent) as counted:
        as_on_a_device(monkeypatch)
        result.run().backward()
    return counted


def row(name: str, versions: Versions, script: str, of: Callable[[str, Given], Result], given: Given) -> str:
    theirs, patched = ((root / script).read_text() for root in versions)
    truth = of(theirs, given.to(torch.float64))
    cells = [name]
    found = [of(source, given) for source in (theirs, patched)]
    cells += [" / ".join(f"{error(each.loss, truth.loss):.1e}" for each in found)]
    cells += [" / ".join(f"{error(each.gradient, truth.gradient):.1e}" for each in found)]
    counted = [operations(each, given.v.numel()) for each in found]
    cells += [" / ".join(f"{each.large}+{each.small}" for each in counted)]
    cells += [" / ".join(str(each.reads) for each in counted)]
    cells += [" / ".join(f"{saved_latents(each, given):.1f}" for each in found)]
    cells += [" / ".join(f"{milliseconds(each):.1f}" for each in found)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    warnings.filterwarnings("ignore", "CUDA is not available")
    torch.set_num_threads(1)
    peers, scratch = Path(os.environ["PEERS"]), Path(tempfile.mkdtemp())
    of = {name: patched_copy(name, peers, scratch / name) for name in SCRIPTS}
    given = Given.random(8, (16, 64, 64), drift=0.01)
    in_half = given.to(torch.float32, torch.bfloat16)
    print("| | loss | gradient | operations | reads | saved | ms |\n|---|---|---|---|---|---|---|")
    for name, latents in (("float32", given), ("bfloat16", in_half)):
        nft = partial(blocks.diffusion_nft, beta=1.0, mode="all")
        print(row(f"DiffusionNFT, velocities {name}", of["diffusion_nft"], SCRIPTS["diffusion_nft"], nft, latents))
    for off_policy, clip in ((False, 1.0), (True, 2e-5)):
        awm = partial(blocks.awm, loss_type="exp_first", off_policy=off_policy, clip_range=clip)
        print(row(f"AWM, {'off' if off_policy else 'on'} policy", of["awm"], SCRIPTS["awm"], awm, given))
    step = (of["flow_grpo"].theirs / FLOW_GRPO_STEP).read_text()
    flow = partial(blocks.flow_grpo, step=step, clip=1e-4, j=4, kl_weight=0.04)
    given = Given.random(8, (16, 64, 64), drift=3e-4)
    print(row("flow_grpo", of["flow_grpo"], SCRIPTS["flow_grpo"], flow, given))
    for name, velocities in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        dance = partial(blocks.dance_grpo, clip=1e-4, step=6)
        given = Given.random(1, (1024, 64), drift=1e-3).to(torch.float32, velocities)
        print(row(f"DanceGRPO, velocities {name}", of["dance_grpo"], SCRIPTS["dance_grpo"], dance, given))


if __name__ == "__main__":
    main()
