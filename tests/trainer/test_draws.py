"""How (t, noise) pairs are drawn."""

from __future__ import annotations

import pytest
import torch
from advflow.algorithms.batch import Experience
from advflow.models.sd3 import PromptEmbeddings
from advflow.processes.forward import Draws
from advflow.settings.processes import DrawConfig


class Latents:
    """Of two channels of four by four."""

    def noise(self, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        return torch.randn(count, 2, 4, 4, generator=generator)


LATENT = Latents()
GRID = [1.0, 0.75, 0.5, 0.25, 0.0]
IMAGES = Experience(
    torch.zeros(12, 2, 4, 4),
    torch.zeros(12),
    torch.zeros(12),
    PromptEmbeddings(torch.zeros(12, 1, 1), torch.zeros(12, 1)),
    4,
    slice(0, 12),
    12,
    [slice(0, 12)],
)


@pytest.mark.parametrize("timesteps", ["uniform", "stratified", "sampler_grid"])
@pytest.mark.parametrize("noise", ["per_image", "shared_in_group"])
def test_sharing_is_inside_groups_only(timesteps: str, noise: str) -> None:
    draws = Draws(DrawConfig(2, noise, timesteps), LATENT, GRID, seed=1)  # type: ignore[arg-type]
    draw = draws.draw(0, 0, IMAGES)
    assert draw.t.shape == (12,) and draw.noise.shape == (12, 2, 4, 4)
    assert ((draw.t > 0) & (draw.t <= 1)).all()
    first_group = draw.noise[:4]
    assert all(torch.equal(first_group[0], other) for other in first_group[1:]) == (noise == "shared_in_group")
    assert not torch.equal(draw.noise[0], draw.noise[4])


def test_strata_are_met_once_each_by_every_image_and_all_by_every_draw() -> None:
    draws = Draws(DrawConfig(4, "per_image", "stratified"), LATENT, GRID, seed=1)
    strata = torch.stack([(draws.draw(3, i, IMAGES).t * 4).ceil().long() - 1 for i in range(4)])
    assert (strata.sort(0).values == torch.arange(4)[:, None]).all()
    assert all(set(row.tolist()) == {0, 1, 2, 3} for row in strata)


def test_the_sampler_grid_is_drawn_without_repetition() -> None:
    draws = Draws(DrawConfig(4, "per_image", "sampler_grid"), LATENT, GRID, seed=1)
    t = torch.stack([draws.draw(0, i, IMAGES).t for i in range(4)])
    assert (t.sort(0).values == torch.tensor([0.25, 0.5, 0.75, 1.0])[:, None]).all()
    with pytest.raises(ValueError, match="draws.per_image is 5"):
        Draws(DrawConfig(5, "per_image", "sampler_grid"), LATENT, GRID, seed=1)


@pytest.mark.parametrize("timesteps", ["uniform", "stratified"])
def test_shift_moves_every_t_as_stable_diffusion_3_does(timesteps: str) -> None:
    plain, shifted = (
        Draws(DrawConfig(4, "per_image", timesteps, shift), LATENT, GRID, seed=1).draw(3, 0, IMAGES).t  # type: ignore[arg-type]
        for shift in (1.0, 2.3)
    )
    torch.testing.assert_close(shifted, 2.3 * plain / (1 + 1.3 * plain))
    assert (shifted <= 1).all()
    with pytest.raises(ValueError, match=r"draws.shift is 2.0; accepted: 1 with draws.timesteps=sampler_grid"):
        DrawConfig(4, "per_image", "sampler_grid", 2.0)


def test_steps_share_pairs_or_images() -> None:
    """Two steps of an iteration: half the pairs of all images, or all pairs of half the images, others each time."""
    by_pairs = Draws(DrawConfig(4), LATENT, GRID, seed=1).shares(0, 12, 2)
    assert [(list(pairs), images.tolist()) for pairs, images in by_pairs] == [
        ([0, 1], list(range(12))),
        ([2, 3], list(range(12))),
    ]
    draws = Draws(DrawConfig(9, split="images"), LATENT, GRID, seed=1)
    first, second = draws.shares(0, 12, 2)
    assert list(first[0]) == list(second[0]) == list(range(9)) and len(first[1]) == len(second[1]) == 6
    assert sorted(torch.cat([first[1], second[1]]).tolist()) == list(range(12))
    assert not torch.equal(first[1], draws.shares(1, 12, 2)[0][1])


def test_a_draw_depends_on_seed_iteration_and_index_alone() -> None:
    config = DrawConfig(2, "per_image", "uniform")
    first = Draws(config, LATENT, GRID, seed=1)
    first.draw(7, 1, IMAGES)
    again = Draws(config, LATENT, GRID, seed=1).draw(5, 1, IMAGES)
    assert torch.equal(first.draw(5, 1, IMAGES).noise, again.noise)
    assert not torch.equal(first.draw(5, 0, IMAGES).noise, again.noise)
    assert not torch.equal(first.draw(6, 1, IMAGES).noise, again.noise)
    assert not torch.equal(Draws(config, LATENT, GRID, seed=2).draw(5, 1, IMAGES).noise, again.noise)
