"""The embedded autoregressive world: what ships is decent, is scored as it was drawn, and can be made anew."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from advflow.ar_world import __main__ as command
from advflow.ar_world import sheet, texts
from advflow.ar_world.evaluate import compare_with_real, main, object_modes, real_scenes, score
from advflow.ar_world.pretrain import pretrain
from advflow.ar_world.settings import ARPretrainSettings
from advflow.ar_world.world import World, condition, decode, draw, load
from advflow.autoregressive.features import InceptionFeatures, VQFeatures, moments
from advflow.autoregressive.sampling import policy_states
from advflow.world.reward import score_batch
from advflow.world.scene import Caption, Placed, all_captions, render

import advflow_ext as af

FOLDER = Path(sys.modules[load.__module__].__file__ or "").parent / "base"
SMALL = ARPretrainSettings(tokenizer_scenes=12, scenes=24, tokenizer_steps=6, tokenizer_batch=4, steps=2, batch=4)


@pytest.fixture(scope="module")
def world() -> World:
    return load()


@pytest.fixture(scope="module")
def held_out() -> list[Caption]:
    return texts.held_out_prompts(24)


@pytest.fixture(scope="module")
def real(held_out: list[Caption]) -> torch.Tensor:
    return real_scenes(held_out)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def test_what_ships_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6


def test_words_and_their_places_from_the_end() -> None:
    (short, long), words = texts.encode(["a red circle", "a drawing of a red circle"])
    assert words.all() and torch.equal(short, short[:1].expand_as(short))
    assert short[0].sum() == 3 and long[0].sum() == 6 and bool((long[0] >= short[0]).all())
    every = texts.encode([caption.text for caption in all_captions()]).features[:, 0]
    assert len(every.unique(dim=0)) == len(every)


def test_prompts_of_this_world_are_held_out_too() -> None:
    training, held_out = texts.training_prompts(), texts.held_out_prompts(64)
    assert {prompt.category for prompt in training} == {prompt.category for prompt in held_out} == set(texts.CATEGORIES)
    assert len(held_out) == 64 * len(texts.CATEGORIES)
    assert {prompt.text for prompt in training}.isdisjoint(prompt.text for prompt in held_out)


@pytest.mark.parametrize("text", ["a purple circle", "", " ".join(["red"] * 12)])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: 1 to"):
        texts.encode(["a circle", text])


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (2.0, 0.9)])
def test_images_are_scored_as_they_were_drawn(world: World, guidance: float, temperature: float) -> None:
    told = condition(["a red circle", "a square", "a picture of a circle and a triangle"])
    drawn = draw(world.policy, world.tokenizer, told, generators(3), guidance=guidance, temperature=temperature)
    states, head = policy_states(
        world.policy, told, drawn.tokens, world.policy.unconditional(told), guidance=guidance, temperature=temperature
    )
    scored = (states @ head.T).log_softmax(2).gather(2, drawn.tokens[:, :, None])[:, :, 0]
    torch.testing.assert_close(drawn.log_probs, scored, rtol=1e-5, atol=1e-5)
    assert drawn.images.shape == (3, 3, 32, 32) and 0 <= drawn.images.min() and drawn.images.max() <= 1


def test_an_image_does_not_depend_on_its_batch(world: World) -> None:
    told = condition(["a red circle", "a square", "a circle and a triangle"])
    together = draw(world.policy, world.tokenizer, told, generators(3), guidance=2.0)
    alone = draw(world.policy, world.tokenizer, condition(["a circle and a triangle"]), generators(1, 2), guidance=2.0)
    assert torch.equal(alone.tokens, together.tokens[2:])


def test_the_tokenizer_keeps_what_the_rule_looks_at(world: World, held_out: list[Caption], real: torch.Tensor) -> None:
    again = decode(world.tokenizer, world.tokenizer.encode(real * 2 - 1))
    correct = [each.correct for each in score_batch(again.numpy(), held_out)]
    assert sum(correct) / len(correct) > 0.85


def test_a_collapsed_set_is_less_varied(world: World, held_out: list[Caption], real: torch.Tensor) -> None:
    extractor = VQFeatures(world.tokenizer)
    good = compare_with_real(real, held_out, extractor)
    assert score(real, held_out)[0] > 0.9
    assert good.fid < 1e-6 and good.precision == good.recall == 1 and good.modes > 0.9
    one = torch.from_numpy(render([Placed("circle", "red", 12, 12, 6)]))
    noise = torch.randn(len(held_out), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = one + 1e-3 * noise
    collapsed = compare_with_real(images, held_out, extractor)
    assert score(images, held_out)[0] < 0.2 and collapsed.fid > 10 * good.fid + 0.01 and collapsed.recall < 0.2
    assert collapsed.modes == pytest.approx(1 / 12) and collapsed.modes_kl > good.modes_kl
    assert collapsed.vendi < 0.5 * good.vendi


def test_objects_have_their_modes() -> None:
    scene = render([Placed("circle", "red", 8, 8, 5.5), Placed("triangle", "yellow", 23, 22, 5.5)])
    assert sorted(object_modes(torch.from_numpy(scene)[None]).tolist()) == [0, 11]
    assert object_modes(torch.zeros(0, 3, 32, 32)).tolist() == [-1]


def test_leaving_one_out_takes_the_shipped_reference(world: World, real: torch.Tensor) -> None:
    extractor = VQFeatures(world.tokenizer)
    ours = moments(extractor, real)
    assert (ours.extractor, ours.preprocessing) == (world.reference.extractor, world.reference.preprocessing)
    assert af.frechet_distance(ours, world.reference) < 0.3 * world.reference.covariance.trace()
    rewards = af.LeaveOneOutFID(world.reference).reward(extractor(real))
    assert rewards.isfinite().all() and rewards.std() > 0
    in_parts = torch.cat([extractor(real[:5]), extractor(real[5:])])
    torch.testing.assert_close(extractor(real), in_parts, rtol=1e-4, atol=1e-4)


def test_another_tokenizer_has_another_name(world: World, tmp_path: Path) -> None:
    pretrain(tmp_path / "a", SMALL)
    pretrain(tmp_path / "b", SMALL)
    first, again = load(tmp_path / "a"), load(tmp_path / "b")
    for one, other in ((first.policy, again.policy), (first.tokenizer, again.tokenizer)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert first.reference.extractor == VQFeatures(first.tokenizer).name != world.reference.extractor
    assert first.reference.count == SMALL.scenes


def test_the_command_refuses_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for given, sentence in (
        (["--out", str(tmp_path / "file")], "which is a file"),
        (["--out", str(tmp_path / "new"), "--caption_noise", "2"], "caption_noise is 2.0; accepted: a number in"),
    ):
        monkeypatch.setattr(sys, "argv", ["ar_world", *given])
        with pytest.raises(SystemExit):
            command.main()
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 0), ("lr", 0.0), ("caption_dropout", -0.1), ("seed", -1), ("scenes", 0)]
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; accepted"):
        ARPretrainSettings(**{name: value})


def test_inception_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"advflow\[inception\]"):
        InceptionFeatures(tmp_path / "weights.pth")


class Means(torch.nn.Module):
    """In Inception's place: the mean of each colour, and a classifier that has to go."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[2:] == (299, 299)
        out: torch.Tensor = self.fc(images.mean((2, 3)))
        return out


def test_inception_sees_what_it_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ModuleType("torchvision.models")
    models.inception_v3 = Means
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    torch.save(Means().state_dict(), tmp_path / "weights.pth")
    features = InceptionFeatures(tmp_path / "weights.pth")(torch.full((2, 3, 32, 32), 0.5))
    expected = [(0.5 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(features, torch.tensor([expected] * 2), rtol=0, atol=1e-5)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not of torchvision's inception_v3"):
        InceptionFeatures(tmp_path / "other.pth")


def test_the_base_can_be_looked_at(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sheet, "PROMPTS", ("a circle",))
    page = sheet.sheet(world)
    assert page.size == (832, 96) and page.crop((0, 28, 410, 96)) != page.crop((424, 28, 834, 96))
    main(guidances=(1.0,), per_category=4)
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["guidance", "correct"] and len(line.split()) == len(header.split())


def test_the_base_is_honestly_imperfect_and_guidance_helps(world: World) -> None:
    prompts = texts.held_out_prompts(32)
    told = condition([prompt.text for prompt in prompts])
    correct = []
    for guidance in (1.0, 2.0):
        images = draw(world.policy, world.tokenizer, told, generators(len(prompts)), guidance=guidance).images
        correct.append(sum(each.correct for each in score_batch(images.numpy(), prompts)) / len(prompts))
    plain, guided = correct
    assert 0.35 < plain < 0.6 and plain + 0.05 < guided < 0.8
