"""Our diffs on the trainers' own checkouts, in the folder that PEERS names: `make test-peers PEERS=folder`.

Each is applied to a copy, and its loss block runs beside the trainer's own on the same tensors: errors against that
block in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from advflow_ext.integrations.patches import PATCHES, apply, trainer_patch
from tests.integrations import patched_blocks as blocks
from tests.integrations.patched_blocks import Given, Result
from tests.integrations.peer_versions import FLOW_GRPO_STEP, FOLDERS, SCRIPTS, Versions, error, patched_copy

every_patch = pytest.mark.parametrize("name", PATCHES)
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning"),  # of their autocast
]


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Versions]:
    """A trainer's files as its checkout has them, and a copy with our patch."""
    made: dict[str, Versions] = {}

    def of(name: str) -> Versions:
        peers = Path(os.environ["PEERS"])
        if not (peers / FOLDERS[name]).is_dir():
            pytest.skip(f"there is no {FOLDERS[name]} in {peers}")
        if name not in made:
            made[name] = patched_copy(name, peers, tmp_path_factory.mktemp(name))
        return made[name]

    return of


class Compared(NamedTuple):
    truth: Result
    theirs: Result
    ours: Result

    def assert_close(self, loss: float, gradient: float) -> None:
        """Within the bounds, or as close as the trainer's where float32 itself ends earlier, at small sigma."""
        assert error(self.ours.loss, self.truth.loss) <= loss
        theirs = error(self.theirs.gradient, self.truth.gradient)
        assert error(self.ours.gradient, self.truth.gradient) <= max(gradient, 1.05 * theirs)
        assert self.ours.logged.keys() == self.theirs.logged.keys()

    def assert_logged(self, *apart: str, tolerance: float = 2e-5) -> None:
        for name, value in self.ours.logged.items():
            if name not in apart:
                torch.testing.assert_close(value.double(), self.truth.logged[name].double(), rtol=tolerance, atol=0)


def compare(versions: Versions, script: str, of: Callable[[str, Given], Result], given: Given) -> Compared:
    theirs, patched = ((root / script).read_text() for root in versions)
    compile(patched, script, "exec")
    return Compared(of(theirs, given.to(torch.float64)), of(theirs, given), of(patched, given))


@every_patch
def test_it_applies_to_the_named_commit(versions: Callable[[str], Versions], name: str) -> None:
    theirs, patched = versions(name)
    apply(name, theirs, check=True)
    for file in trainer_patch(name).files:
        assert (theirs / file).read_text() != (patched / file).read_text()
        compile((patched / file).read_text(), file, "exec")


@pytest.mark.parametrize(
    ("beta", "mode", "velocities", "gradient"),
    [
        (1.0, "all", torch.float32, 3e-7),
        (0.1, "positive_only", torch.float32, 2e-6),
        (1.0, "negative_only", torch.float32, 3e-7),
        (1.0, "one_only", torch.float32, 3e-7),
        (1.0, "binary", torch.float32, 3e-7),
        (0.1, "all", torch.bfloat16, 3e-3),
    ],
)
def test_diffusion_nft(versions, beta, mode, velocities, gradient) -> None:
    given = Given.random(8, (16, 32, 32), drift=0.01).to(torch.float32, velocities)
    of = partial(blocks.diffusion_nft, beta=beta, mode=mode)
    compared = compare(versions("diffusion_nft"), SCRIPTS["diffusion_nft"], of, given)
    compared.assert_close(2e-7, gradient)
    assert error(compared.ours.gradient, compared.truth.gradient) < error(
        compared.theirs.gradient, compared.truth.gradient
    )
    compared.assert_logged(tolerance=3e-3 if velocities == torch.bfloat16 else 2e-5)


@pytest.mark.parametrize("loss_type", ["exp_first", "sum_first"])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("weights", ["Uniform", "ELBO"])
@pytest.mark.parametrize("weighting", ["ghuber", "huber", "Uniform", "t", "t**2"])
def test_awm(versions, loss_type, off_policy, weights, weighting) -> None:
    of = partial(
        blocks.awm, loss_type=loss_type, off_policy=off_policy, weighting=weighting, kl_weight=weights,
        kl_ema_weight=weights, clip_range=2e-5,
    )  # fmt: skip
    compared = compare(versions("awm"), SCRIPTS["awm"], of, Given.random(8, (16, 32, 32), drift=0.01))
    compared.assert_close(2e-7, 3e-7)
    compared.assert_logged(*(["kl_loss", "ema_kl_loss"] if weights == "ELBO" else []))
    assert (compared.truth.logged["clipfrac"] > 0) == off_policy


@pytest.mark.parametrize("step", [0, 4, 9])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_flow_grpo(versions, step, kl_weight) -> None:
    found = versions("flow_grpo")
    of = partial(
        blocks.flow_grpo, step=(found.theirs / FLOW_GRPO_STEP).read_text(), clip=2e-6, j=step, kl_weight=kl_weight
    )
    compared = compare(found, SCRIPTS["flow_grpo"], of, Given.random(8, (16, 32, 32), drift=3e-4))
    compared.assert_close(1e-7, 4e-7)
    compared.assert_logged()
    assert error(compared.ours.logged["approx_kl"], compared.truth.logged["approx_kl"]) <= 1e-5


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flow_grpos_pipeline_has_no_log_ratio_before_an_update(versions, dtype, guidance) -> None:
    pytest.importorskip("diffusers")
    theirs, ours = (blocks.flow_grpo_rollout(root, dtype, guidance) for root in versions("flow_grpo"))
    assert ours.log_ratio == 0
    assert (theirs.log_ratio == 0) == (dtype == torch.float32)
    assert torch.equal(ours.latents[:, 0], theirs.latents[:, 0])
    if guidance == 1 or dtype == torch.float32:  # or guidance is no longer rounded
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=tolerance)


@pytest.mark.parametrize("velocities", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [0, 6, 14])
def test_dance_grpo(versions, velocities, step) -> None:
    given = Given.random(1, (1024, 64), drift=1e-3).to(torch.float32, velocities)
    compared = compare(
        versions("dance_grpo"), SCRIPTS["dance_grpo"], partial(blocks.dance_grpo, clip=0.5, step=step), given
    )
    compared.assert_close(1e-7, 3e-3 if velocities == torch.bfloat16 else 1.5e-6)
    ratio = compared.ours.logged["ratio"].double()  # of 1 + 1e-6, float32 has one digit
    torch.testing.assert_close(ratio, compared.truth.logged["ratio"][0], rtol=2e-7, atol=0)


def test_dance_grpos_sampling_keeps_its_latents_in_float32_and_explains_them(versions) -> None:
    given = Given.random(1, (1024, 64), drift=1e-3)
    found = [(root / SCRIPTS["dance_grpo"]).read_text() for root in versions("dance_grpo")]
    (theirs, _), (ours, stored) = (blocks.dance_rollout(source, given) for source in found)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    v_old, eps = stored.unbind(2)
    assert torch.equal(v_old, given.v_old[:, None].expand_as(v_old))
    assert eps[:, :-1].std() == pytest.approx(1, abs=0.01)
    in_half = given.to(torch.float32, torch.bfloat16)
    (theirs, _), (ours, _) = (blocks.dance_rollout(source, in_half) for source in found)
    assert 1e-3 < (theirs - ours).abs().max() < 5e-2  # sigma times the velocity, rounded to bfloat16
