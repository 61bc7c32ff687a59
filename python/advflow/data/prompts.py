"""The prompts of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from advflow.ar_world import texts as ar_world
from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.data.prompt_files import read_prompts
from advflow.settings.data import AR_WORLD, EMBEDDED, SHAPES, DataConfig
from advflow.shapes import prompts as shapes
from advflow.shapes.request import to_metadata
from advflow.world.captions import held_out_captions, training_captions
from advflow.world.scene import Caption


@dataclass(frozen=True)
class PromptSource:
    """Training prompts; each iteration draws some without repetition, with probability proportional to `weights`."""

    prompts: list[Prompt]
    weights: torch.Tensor

    def require(self, name: str, count: int) -> None:
        """Refuses a setting that would draw more prompts in an iteration than there are."""
        if count > len(self.prompts):
            raise ValueError(f"{name} is {count}; data.prompts has only {len(self.prompts)} different prompts")

    def draw(self, count: int, rng: torch.Generator) -> list[int]:
        return torch.multinomial(self.weights, count, generator=rng).tolist()


def load_training_prompts(name: str) -> PromptSource:
    """The training prompts that are built in under a name, every category as likely as the others, or a file's."""
    if name not in _TRAINING:
        prompts = list(read_prompts(name, "data.prompts"))
        return PromptSource(prompts, torch.ones(len(prompts)))
    prompts = _TRAINING[name]()
    sizes = Counter(prompt.category for prompt in prompts)
    return PromptSource(prompts, torch.tensor([1.0 / sizes[prompt.category] for prompt in prompts]))


def load_eval_prompts(name: str, per_category: int) -> list[Prompt]:
    """The first `per_category` of each category of the held-out prompts that are built in under a name, or a file's."""
    if name in _HELD_OUT:
        return _HELD_OUT[name](per_category)
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in read_prompts(name, "data.eval_prompts"):
        seen[prompt.category] += 1
        if seen[prompt.category] <= per_category:
            chosen.append(prompt)
    return chosen


def _of_captions(captions: list[Caption]) -> list[Prompt]:
    return [Prompt(caption.text, caption.category) for caption in captions]


def _of_shapes(prompts: Iterable[shapes.ShapesPrompt]) -> list[Prompt]:
    return [Prompt(each.text, each.category, to_metadata(each.request)) for each in prompts]


_TRAINING: dict[str, Callable[[], list[Prompt]]] = {
    EMBEDDED: lambda: _of_captions(training_captions()),
    AR_WORLD: lambda: _of_captions(ar_world.training_prompts()),
    SHAPES: lambda: _of_shapes(shapes.training_prompts()),
}
_HELD_OUT: dict[str, Callable[[int], list[Prompt]]] = {
    EMBEDDED: lambda count: _of_captions(held_out_captions(count)),
    AR_WORLD: lambda count: _of_captions(ar_world.held_out_prompts(count)),
    SHAPES: lambda count: _of_shapes(shapes.held_out_prompts(count)),
}
_CHECKED = 64  # held-out prompts of a category that is built in


def check_prompts(
    data: DataConfig,
    check: Callable[[Prompt], None],
    check_held_out: Callable[[Prompt], None] | None = None,
    expect: Callable[[list[Prompt]], None] = lambda prompts: None,
) -> list[str]:
    """Refuses prompts that `check` does not know, of held-out ones what `check_held_out` does not where there is one.

    `expect` is told before which they will be.
    Returns what else should be said about the files, a sentence each. Raises ValueError naming the field, the file, the
    line and the prompt.
    """
    training, held_out = training_lines(data), held_out_lines(data)
    for field, path, prompts, known in (
        ("data.prompts", data.prompts, training, check),
        ("data.eval_prompts", data.eval_prompts, held_out, check_held_out or check),
    ):
        expect(list(prompts))
        if unknown := unknown_prompts(field, path, prompts, known, most=1):
            raise ValueError(unknown[0])
    return said_of_files(data, training, held_out)


def unknown_prompts(
    field: str, path: str, prompts: Mapping[Prompt, list[int]], known: Callable[[Prompt], None], most: int
) -> list[str]:
    """What is to be said of the first prompts, at `most` so many, that `known` refuses."""
    found = []
    for prompt, (line, *_) in prompts.items():
        try:
            known(prompt)
        except UnknownPrompt as error:
            place = f", line {line}" if line else ""
            found.append(f"{field} is {path!r}{place}: {error}")
            if len(found) == most:
                break
    return found


def said_of_files(
    data: DataConfig, training: Mapping[Prompt, list[int]], held_out: Mapping[Prompt, list[int]]
) -> list[str]:
    """Repeated prompts, and held-out ones that are trained on, a sentence each."""
    remarks = []
    for field, path, prompts in (
        ("data.prompts", data.prompts, training),
        ("data.eval_prompts", data.eval_prompts, held_out),
    ):
        if repeats := sum(len(lines) - 1 for lines in prompts.values()):
            lines = "1 line repeats" if repeats == 1 else f"{repeats:,} lines repeat"
            remarks.append(f"{field}: {lines} an earlier one of {path}; its {len(prompts):,} prompts count once each")
    trained_on = {prompt.text for prompt in training}
    if both := [prompt.text for prompt in held_out if prompt.text in trained_on]:
        are = "prompt is" if len(both) == 1 else "prompts are"
        remarks.append(
            f"data.eval_prompts: {len(both):,} of {len(held_out):,} held-out {are} also trained on, first {both[0]!r}"
        )
    return remarks


def training_lines(data: DataConfig) -> dict[Prompt, list[int]]:
    """The training prompts and the lines that hold each; line 0 for those that are built in."""
    return _with_lines(data.prompts, "data.prompts", _TRAINING)


def held_out_lines(data: DataConfig) -> dict[Prompt, list[int]]:
    """The same of the held-out prompts, of those that are built in the first of each category."""
    built_in = {name: partial(make, _CHECKED) for name, make in _HELD_OUT.items()}
    return _with_lines(data.eval_prompts, "data.eval_prompts", built_in)


def _with_lines(name: str, field: str, built_in: Mapping[str, Callable[[], list[Prompt]]]) -> dict[Prompt, list[int]]:
    if name in built_in:
        return {prompt: [0] for prompt in built_in[name]()}
    return read_prompts(name, field)
