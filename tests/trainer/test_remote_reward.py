"""The remote reward: whatever a server does, the run that ends is the one that no server has disturbed."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from advflow.cli import main
from advflow.core.ranks import Ranks
from advflow.rewards import CheckedReward, Prompt, Scores, UnknownPrompt, load_reward, service
from advflow.rewards.remote import RemoteReward
from advflow.rewards.several import Rewards
from advflow.run.checkpoint import checkpoints
from advflow.run.interrupt import Interrupted
from advflow.run.log import METRICS
from advflow.run.scoring import Scoring
from advflow.run.trainer import Trainer
from advflow.settings.data import DataConfig, RolloutConfig

from tests.trainer.reward_servers import FAULTS, FaultyServer, error_500, hanging, hung_up
from tests.trainer.runs import SMALL, assert_same_run, rows

PROMPTS = [Prompt("a red circle", "single", {"n": each, "é": [1.5, None]}) for each in range(6)]
IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Numbers:
    """A number for each image that its pixels and its prompt decide; none for the prompts of `UNSCORED`."""

    UNSCORED: set[int] = set()

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        reward = [float(image.sum()) + float(each.metadata["n"]) for image, each in zip(images, prompts, strict=True)]  # type: ignore[arg-type]
        score = [math.nan if each.metadata["n"] in self.UNSCORED else 0.1 for each in prompts]
        return Scores(reward, score)  # type: ignore[arg-type]


class Fails(Numbers):
    """Raises for the prompts of `UNSCORED`."""

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        if any(each.metadata["n"] in {1, 4} for each in prompts):
            raise RuntimeError("no face\nin it")
        return super().__call__(images, prompts)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_REST", 0.01)
    monkeypatch.setattr(service, "LONGEST_REST", 0.1)
    monkeypatch.delenv(service.TOKEN, raising=False)


def _served(faults: Any = (), **rewards: Any) -> FaultyServer:
    return FaultyServer(
        {name: CheckedReward(each) for name, each in (rewards or {"numbers": Numbers()}).items()}, faults
    )


def _assert_equal(found: Scores, expected: Scores) -> None:
    for name in ("reward", "score"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == torch.float32 and torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_past(fault: str) -> None:
    with _served([FAULTS[fault]]) as server:
        remote = CheckedReward(RemoteReward(server.url, timeout=1.0, batch=4))
        _assert_equal(remote(IMAGES, PROMPTS), CheckedReward(Numbers())(IMAGES, PROMPTS))
        assert sorted(server.sizes) == ([2, 4] if fault == "slow" else sorted(server.sizes)) and server.faults == []


def test_scores_are_put_back_in_the_order_of_the_images() -> None:
    """The first image's request is answered last."""
    later = threading.Event()

    def wait(handler: Any) -> None:
        assert handler.prompts[0].metadata["n"] != 0 or later.wait(20)

    with _served([wait] * 6) as server:
        remote = CheckedReward(RemoteReward(server.url, batch=1, workers=3))
        begun = remote.begin(IMAGES, PROMPTS)
        for future in begun.futures[1:]:
            future.result(20)
        assert not begun.futures[0].done()
        later.set()
        _assert_equal(begun.result(), CheckedReward(Numbers())(IMAGES, PROMPTS))


def test_several_servers_share_the_requests_and_one_may_be_away() -> None:
    with _served() as one, _served() as other, _served() as gone:
        urls = [one.url, other.url, gone.url]
        gone.__exit__()
        remote = CheckedReward(RemoteReward(urls, batch=1, workers=1))
        for server in (one, other):
            server.faults = [lambda handler: time.sleep(0.02)] * 6
        _assert_equal(remote(IMAGES, PROMPTS), CheckedReward(Numbers())(IMAGES, PROMPTS))
        assert len(one.sizes) + len(other.sizes) == 6 and one.sizes and other.sizes


def test_no_more_requests_are_under_way_than_workers() -> None:
    here, most = [0], [0]

    def count(handler: Any) -> None:
        with handler.server.lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        time.sleep(0.03)
        with handler.server.lock:
            here[0] -= 1

    with _served([count] * 6) as server:
        CheckedReward(RemoteReward(server.url, batch=1, workers=2))(IMAGES, PROMPTS)
    assert most == [2]


def test_a_failed_image_has_no_score_and_the_others_have_theirs(capfd: pytest.CaptureFixture[str]) -> None:
    with _served(fails=Fails()) as server:
        scores = CheckedReward(RemoteReward(server.url, batch=4))(IMAGES, PROMPTS)
        expected = CheckedReward(Numbers())(IMAGES, PROMPTS).reward
    assert scores.reward.isnan().tolist() == scores.score.isnan().tolist() == [False, True, False, False, True, False]
    assert torch.equal(scores.reward[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
    said = capfd.readouterr().err
    assert said.count("cannot score an image, which is not learnt from: RuntimeError: no face in it") == 1


def test_a_score_that_is_not_finite_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numbers, "UNSCORED", {2})
    with _served() as server:
        scores = CheckedReward(RemoteReward(server.url))(IMAGES, PROMPTS)
    _assert_equal(scores, CheckedReward(Numbers())(IMAGES, PROMPTS))
    assert scores.score.isnan().tolist() == [False, False, True, False, False, False]


def test_the_run_says_that_it_waits_and_that_it_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    with _served([error_500] * 8) as server:
        CheckedReward(RemoteReward(server.url, retries=1))(IMAGES, PROMPTS)
    waits, goes_on = capfd.readouterr().err.strip().split("\n\n")
    assert waits == (
        f"reward server: no scores from {server.url}: it answers 500: Internal Server Error. The run waits and goes on "
        "when there are some; Ctrl-C saves and stops it."
    )
    assert goes_on == f"reward server: {server.url} gives scores again; the run goes on."


def test_a_token_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    with _served() as server:
        server.token = "old"
        remote = RemoteReward(server.url, token_file=str(file), retries=0)
        server.token = "new"
        begun = remote.begin(IMAGES, PROMPTS)
        _until(lambda: "401: the token is missing or wrong" in capfd.readouterr().err)
        assert not begun.done()
        file.write_text("new\n")
        assert torch.equal(begun.result(20).reward, CheckedReward(Numbers())(IMAGES, PROMPTS).reward)
        monkeypatch.setenv(service.TOKEN, "new")
        assert RemoteReward(server.url)(IMAGES, PROMPTS).reward.shape == (6,)


def test_prompts_are_checked_by_the_server_many_at_a_time() -> None:
    class Knows(Numbers):
        def check(self, prompt: Prompt) -> None:
            if "red" not in prompt.text:
                raise UnknownPrompt(f"not {prompt.text!r}, {prompt.metadata}")

    with _served(knows=Knows(), numbers=Numbers()) as server:
        remote = CheckedReward(RemoteReward(server.url, reward="knows"))
        blue = Prompt("a blue circle", metadata={"n": 1})
        remote.expect([*PROMPTS, blue])
        for prompt in PROMPTS:
            remote.check(prompt)
        with pytest.raises(UnknownPrompt, match=r"^not 'a blue circle', \{'n': 1\}$"):
            remote.check(blue)
        assert sum(path.startswith("/check") for path in server.asked) == 1
        with pytest.raises(UnknownPrompt):
            remote.check(Prompt("a green circle"))
        server.asked.clear()
        CheckedReward(RemoteReward(server.url, reward="numbers")).check(blue)
        assert server.asked == ["/rewards"]


def test_what_it_cannot_be_made_with_is_a_sentence(tmp_path: Path) -> None:
    def refused(**arguments: Any) -> str:
        with pytest.raises(ValueError) as caught:
            load_reward("remote", arguments)
        return str(caught.value)

    with _served(one=Numbers(), two=Numbers()) as server:
        url = server.url
        assert refused(urls=url) == "data.reward_args.reward is None; served there: one, two"
        assert refused(urls=url, reward="three") == "data.reward_args.reward is 'three'; served there: one, two"
        assert refused(urls=url, reward="one", timeout=0).endswith(
            "timeout is 0; accepted: a positive number of seconds"
        )
        assert refused(urls=url, reward="one", workers=0) == "data.reward_args.workers is 0; accepted: 1 or more"
        assert refused(urls=url, reward="one", batch=True) == "data.reward_args.batch is True; accepted: 1 or more"
        assert refused(urls=url, reward="one", retries=-1) == "data.reward_args.retries is -1; accepted: 0 or more"
        missing = str(tmp_path / "none")
        assert f"the token file {missing!r} cannot be read" in refused(urls=url, reward="one", token_file=missing)
        server.token = "t"
        assert "where no reward server answers" in (said := refused(urls=url, reward="one"))
        assert "it answers 401: the token is missing or wrong" in said
    assert "Connection refused" in refused(urls=url)
    for odd in ("127.0.0.1:80", "ftp://a", "http://", "http://u:p@h", "http://h:port", "http://h?x"):
        assert refused(urls=odd).startswith(f"data.reward_args.urls is {odd!r}; "), odd
    for none in ([], 5, ["http://h", 5]):
        assert refused(urls=none).endswith("accepted is the URL of a server, or a list of several")


def test_servers_that_serve_different_rewards_are_not_mixed(capfd: pytest.CaptureFixture[str]) -> None:
    with _served() as one, _served() as other:
        other.service = "another"
        remote = CheckedReward(RemoteReward([one.url, other.url], batch=1))
        _assert_equal(remote(IMAGES, PROMPTS), CheckedReward(Numbers())(IMAGES, PROMPTS))
        assert other.sizes == [] and "other rewards are served there" in capfd.readouterr().err


# The loop


class Background:
    """Scores when it is told to."""

    batch = 2

    def __init__(self) -> None:
        self.asked: list[tuple[Future[Scores], int]] = []

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        raise AssertionError("it scores elsewhere")

    def begin(self, images: torch.Tensor, prompts: list[Prompt]) -> Future[Scores]:
        self.asked.append((Future(), len(prompts)))
        return self.asked[-1][0]

    def answer(self, place: int) -> None:
        future, count = self.asked[place]
        future.set_result(Scores(torch.full((count,), float(place)), torch.zeros(count)))


def _scoring(*rewards: Any, check: Any = lambda: None, ranks: Ranks | None = None, images: int = 8) -> Scoring:
    named = {f"r{place}": CheckedReward(each) for place, each in enumerate(rewards)}
    return Scoring(Rewards(named, dict.fromkeys(named, 1.0)), PROMPTS[:1] * images, check, ranks or Ranks())


def test_images_are_drawn_while_those_before_are_scored() -> None:
    """Two batches may wait for their scores; the third returns when the first has its own, whatever the order."""
    background = Background()
    with _scoring(background, Numbers()) as scoring:
        scoring.add(IMAGES[:2])
        scoring.add(IMAGES[2:4])
        assert len(background.asked) == 2 and not any(future.done() for future, _ in background.asked)
        background.answer(1)
        adding = threading.Thread(target=scoring.add, args=(IMAGES[4:6],))
        adding.start()
        adding.join(0.3)
        assert adding.is_alive()  # the first batch is not answered, and three are not kept
        background.answer(0)
        adding.join(20)
        assert not adding.is_alive()
        background.answer(2)
        scores = scoring.scores()
    assert scores.reward[:, 0].tolist() == [0, 0, 1, 1, 2, 2] and scores.reward.shape == (6, 2)
    assert torch.equal(scores.reward[:, 1], CheckedReward(Numbers())(IMAGES, PROMPTS[:1] * 6).reward)


def test_a_stop_ends_the_waiting_and_what_was_asked_for() -> None:
    background = Background()

    def stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted), _scoring(background, check=stop) as scoring:
        scoring.add(IMAGES[:2])
        scoring.scores()
    assert all(future.cancelled() for future, _ in background.asked)


def test_processes_stop_together() -> None:
    """One that has its scores, and was not asked to stop, does so where another was."""

    class Other(Ranks):
        def everyone(self, value: Any) -> list[Any]:
            return [value, True]

    with pytest.raises(Interrupted), _scoring(Numbers(), ranks=Other()) as scoring:
        scoring.add(IMAGES[:2])
        scoring.scores()


def test_what_a_background_reward_returns_is_checked() -> None:
    background = Background()
    with _scoring(background) as scoring:
        scoring.add(IMAGES[:2])
        background.asked[0][0].set_result(Scores(torch.zeros(3), torch.zeros(3)))
        with pytest.raises(
            ValueError, match="Background returned Scores whose reward is a tensor of float32 and shape"
        ):
            scoring.scores()


class Slow(Numbers):
    """A score takes a fifth of a second."""

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        time.sleep(0.2 * len(prompts))
        return super().__call__(images, prompts)


def test_four_workers_hide_a_slow_reward_behind_the_next_batch() -> None:
    """Ten batches of four images that take 0.2 s to draw and, with four workers, 0.2 s to score."""
    with ExitStack() as stack:
        urls = [stack.enter_context(_served(slow=Slow())).url for _ in range(4)]
        remote = RemoteReward(urls, batch=1, workers=1)
        began = time.monotonic()
        with _scoring(remote, images=40) as scoring:
            for _ in range(10):
                time.sleep(0.2)
                scoring.add(IMAGES[:4])
            scoring.scores()
        seconds = time.monotonic() - began
    assert 1 - (seconds - 10 * 0.2) / (40 * 0.2 / 4) >= 0.7


@pytest.mark.slow
def test_four_workers_hide_a_slow_reward_behind_a_models_next_batch(small_config: Any) -> None:
    """The same of a real rollout of 16 batches, which takes longer than the reward: no more can be hidden than that."""
    with ExitStack() as stack:
        rewards = {"embedded": load_reward("embedded"), "slow": CheckedReward(SlowEmbedded())}
        urls = [stack.enter_context(FaultyServer(rewards)).url for _ in range(4)]
        rollout = RolloutConfig(prompts=8, images_per_prompt=8, steps=32, batch=4)
        seconds: dict[str, list[float]] = {"embedded": [], "slow": []}
        trainers = {
            name: Trainer(
                small_config(
                    rollout=rollout,
                    data=DataConfig(
                        reward="remote", reward_args={"urls": urls, "reward": name, "batch": 1, "workers": 1}
                    ),
                )
            )
            for name in seconds
        }
        found = {}
        for repeat in range(3):
            for name, trainer in trainers.items():
                began = time.monotonic()
                _, found[name] = trainer.roll_out(repeat)
                seconds[name].append(time.monotonic() - began)
            assert found["slow"] == found["embedded"]
    of_reward = 64 * 0.2 / 4
    assert min(seconds["embedded"]) > of_reward
    hidden = 1 - (min(seconds["slow"]) - min(seconds["embedded"])) / of_reward
    print(f"hidden: {hidden:.1%} of {of_reward:.1f} s, beside a rollout of {min(seconds['embedded']):.1f} s; {seconds}")
    assert hidden >= 0.7


class SlowEmbedded:
    """The embedded world's reward, 0.2 s an image."""

    def __init__(self) -> None:
        self._reward = load_reward("embedded")

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        time.sleep(0.2 * len(prompts))
        return self._reward(images, prompts)


# Whole runs

WORDS = [*SMALL, "--iterations", "2", "--evaluation.every", "2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward is in its own process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    main(["train", "--out", str(folder), *WORDS])
    return folder


def _remote(server: FaultyServer, **arguments: object) -> list[str]:
    given = {"urls": server.url, "batch": 1, "timeout": 1.0, "retries": 1, **arguments}
    return ["--data.reward", "remote", "--data.reward_args", json.dumps(given)]


def test_a_run_that_every_fault_has_met_is_the_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    faults = [*FAULTS.values(), error_500, error_500, hanging, hung_up]
    with _served(faults, embedded=load_reward("embedded")) as server:
        main(["train", "--out", str(tmp_path / "run"), *WORDS, *_remote(server)])
        assert server.faults == []
    assert_same_run(undisturbed, tmp_path / "run")
    assert [row["unscored_images"] for row in rows(tmp_path / "run", METRICS)] == [0, 0]


def test_a_server_that_is_killed_and_started_again(undisturbed: Path, tmp_path: Path, capfd: Any) -> None:
    embedded = load_reward("embedded")
    again: list[FaultyServer] = []

    def kill(handler: Any) -> None:
        """Gone in the middle of a request; back at its port when the run has said that it waits."""
        port = server.server_address[1]

        def start() -> None:
            server.__exit__()
            _until(lambda: "The run waits" in capfd.readouterr().err)
            again.append(FaultyServer({"embedded": embedded}, port=port))

        threading.Thread(target=start, daemon=True).start()
        hung_up(handler)

    with _served([lambda handler: None] * 10 + [kill], embedded=embedded) as server:
        main(["train", "--out", str(tmp_path / "run"), *WORDS, *_remote(server, retries=0)])
    with again[0]:
        assert sum(again[0].sizes) > 10
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.fixture
def interrupts_count() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_the_run_waits_leaves_what_resumes(
    undisturbed: Path, tmp_path: Path, interrupts_count: None, capfd: Any
) -> None:
    """And it goes on with a server elsewhere: where a reward is scored is not what it is."""
    folder, embedded = tmp_path / "run", load_reward("embedded")

    def kill(handler: Any) -> None:
        def stop() -> None:
            server.__exit__()
            _until(lambda: "The run waits" in capfd.readouterr().err)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=stop, daemon=True).start()
        hung_up(handler)

    # Six held-out prompts and six images for each iteration: the second one's fourth is never scored.
    with _served([lambda handler: None] * 15 + [kill], embedded=embedded) as server:
        with pytest.raises(SystemExit, match="stopped after iteration 1, saved; go on with --resume"):
            main(["train", "--out", str(folder), *WORDS, *_remote(server, workers=1)])
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["000001"]
    assert len(rows(folder, METRICS)) == 1
    with _served(embedded=embedded) as elsewhere:
        urls = _remote(elsewhere)[3]
        main(["train", "--out", str(folder), "--resume", "--data.reward_args", urls])
    assert_same_run(undisturbed, folder)
    with _served(other=embedded) as elsewhere:
        with pytest.raises(SystemExit, match="was started with other settings: data.reward_args is"):
            main(["train", "--out", str(folder), "--resume", *_remote(elsewhere, reward="other")])
