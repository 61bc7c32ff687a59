"""How good and how varied a set of the world's images is.

python -m advflow.ar_world.evaluate prints it of the base, at several guidances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import advflow_ext as af
from advflow.ar_world.texts import held_out_prompts
from advflow.ar_world.world import condition, draw, load
from advflow.autoregressive.features import Extractor, VQFeatures
from advflow.core.randomness import generator
from advflow.world.reward import detect, score_batch
from advflow.world.scene import COLORS, SHAPES, Caption, render, sample_scene

MODES = len(COLORS) * len(SHAPES)


class SetOfImages(NamedTuple):
    """`fid`, `precision`, `recall`: to real scenes of the same prompts.

    `modes` and `modes_kl`, of colour x shape, look at prompts that leave the colour open: the share that occurs, and
    how far from equally often, in nats. `vendi`: how many different images the set is worth.
    """

    fid: float
    precision: float
    recall: float
    modes: float
    modes_kl: float
    vendi: float


def score(images: Tensor, prompts: Sequence[Caption]) -> tuple[float, float]:
    """How many are correct, and how much of each is, of images [N, 3, 32, 32] in [0, 1], each for the prompt at its
    place."""
    scores = score_batch(images.cpu().numpy(), list(prompts))
    correct, partial = (float(np.mean([getattr(each, name) for each in scores])) for name in ("correct", "partial"))
    return correct, partial


def compare_with_real(images: Tensor, prompts: Sequence[Caption], extractor: Extractor) -> SetOfImages:
    """Of images [N, 3, 32, 32] in [0, 1], each for the prompt at its place; at least 4."""
    drawn, real = extractor(images), extractor(real_scenes(prompts))
    precision, recall = af.precision_recall(drawn, real)
    open_ones = [index for index, prompt in enumerate(prompts) if prompt.wanted[0].color is None]
    share, kl, _ = af.mode_coverage(object_modes(images[open_ones].cpu()), MODES)
    fid = af.frechet_distance(af.FeatureMoments.of(drawn), af.FeatureMoments.of(real))
    return SetOfImages(
        fid=fid.item(),
        precision=precision.item(),
        recall=recall.item(),
        modes=share.item(),
        modes_kl=kl.item(),
        vendi=af.vendi_score(drawn - real.mean(0)).item(),
    )


def real_scenes(prompts: Sequence[Caption]) -> Tensor:
    """A scene for each prompt, the same at every call."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([render(sample_scene(prompt, rng)) for prompt in prompts]))


def object_modes(images: Tensor) -> Tensor:
    """The colour and shape, as one number, of every object there is; -1 for one that has no shape."""
    found = [each for image in images.numpy() for each in detect(image)]
    numbers = [
        -1 if each.shape is None else COLORS.index(each.color) * len(SHAPES) + SHAPES.index(each.shape)
        for each in found
    ]
    return torch.tensor(numbers or [-1])


def main(guidances: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.0), per_category: int = 128) -> None:
    world, prompts = load(), held_out_prompts(per_category)
    told = condition([prompt.text for prompt in prompts])
    print("guidance correct partial", *SetOfImages._fields)
    for guidance in guidances:
        generators = [generator(0, "evaluation", index) for index in range(len(prompts))]
        images = draw(world.policy, world.tokenizer, told, generators, guidance=guidance).images
        of_set = compare_with_real(images, prompts, VQFeatures(world.tokenizer))
        print(guidance, *(f"{value:.3f}" for value in (*score(images, prompts), *of_set)))


if __name__ == "__main__":
    main()
