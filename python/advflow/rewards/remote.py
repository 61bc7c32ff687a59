"""A reward that is scored elsewhere, by `advflow reward-server`, while the next images are drawn."""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from urllib.parse import urlencode

import torch

from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.rewards import Scores, WrongArgument
from advflow.rewards.service import Server, Servers, ServiceError, Token
from advflow.rewards.wire import JSON, NPZ, Scored, decode_answer, described, encode_prompts, encode_request

_PROMPTS = 1000  # that a server is asked about at a time
_SAID_AT_MOST = 20  # different reasons of failed images


class RemoteReward:
    """Scores of one reward of one or several servers, which serve the same.

    An image that the server cannot score has NaN for its numbers. A server that does not answer, or answers anything
    but scores, is asked again, and another one too: there is no score until one of them gives it.

    Arguments:
        urls: of a server, or a list of several.
        reward: which of the server's rewards; not needed where it has one.
        token_file: a file with the servers' token; else $ADVFLOW_REWARD_TOKEN, where there is one.
        timeout: seconds that a request may take, waiting at a busy server included.
        retries: how often a request is tried again before the run says that it waits.
        workers: requests under way at a time at each server.
        batch: images in a request.
    """

    def __init__(
        self,
        urls: str | list[str],
        reward: str | None = None,
        token_file: str | None = None,
        timeout: float = 300.0,
        retries: int = 4,
        workers: int = 4,
        batch: int = 8,
    ) -> None:
        _require_number("timeout", timeout, float)
        for name, value in (("retries", retries), ("workers", workers), ("batch", batch)):
            _require_number(name, value, int, least=0 if name == "retries" else 1)
        self.batch, self._retries = batch, retries
        token = Token(token_file)
        try:
            token.read()
        except ServiceError as error:
            raise WrongArgument("token_file", token_file, f": {error}") from error
        self._servers = Servers(_servers(urls, token, float(timeout)), workers)
        self._service: str | None = None
        self._reward, self._checks = self._find(urls, reward)
        self._threads, self._most_threads = 0, workers * len(self._servers.all)
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._notices = _Notices()
        self._verdicts: dict[Prompt, str | None] = {}

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return self.begin(images, prompts).result()

    def begin(self, images: torch.Tensor, prompts: list[Prompt]) -> Future[Scores]:
        """Sends the images, and returns before there are scores. A Future that is cancelled is asked for no more."""
        request = _Request(images.detach().to("cpu", torch.float32), prompts)
        with self._lock:
            self._waiting.append(request)
            if self._threads < self._most_threads:
                self._threads += 1
                # Daemons: a run that ends while a server is silent does not wait for it.
                threading.Thread(target=self._work, daemon=True).start()
        return request.scores

    def expect(self, prompts: list[Prompt]) -> None:
        """Asks about many prompts at once, whose `check` then needs no server."""
        for start in range(0, len(prompts) if self._checks else 0, _PROMPTS):
            self._learn(prompts[start : start + _PROMPTS])

    def check(self, prompt: Prompt) -> None:
        if not self._checks:
            return
        if prompt not in self._verdicts:
            self._learn([prompt])
        if refusal := self._verdicts[prompt]:
            raise UnknownPrompt(refusal)

    def _learn(self, prompts: list[Prompt]) -> None:
        """Asks a server which prompts the reward cannot score. Raises ValueError where none answers."""
        body = f'{{"prompts": {encode_prompts(prompts)}}}'.encode()
        server = next((each for each in self._servers.all if not each.failures), self._servers.all[0])
        try:
            answer = described(server.ask("POST", self._path("/check"), body, JSON), self._service)
        except (ServiceError, ValueError) as error:
            raise ValueError(f"the reward server {server.url} cannot be asked about prompts: {error}") from error
        refused = answer["rewards"].get(self._reward)
        if not isinstance(refused, dict):
            raise ValueError(f"the reward server {server.url} does not answer which prompts it refuses")
        self._verdicts |= {prompt: refused.get(str(place)) for place, prompt in enumerate(prompts)}

    def _path(self, path: str) -> str:
        return f"{path}?{urlencode({'reward': self._reward})}"

    def _find(self, urls: object, reward: str | None) -> tuple[str, bool]:
        """Which reward it is, and whether that refuses prompts. One server has to be there; the others may come."""
        silent: list[str] = []
        served: dict[str, object] = {}
        for server in self._servers.all:
            try:
                content = described(server.ask("GET", "/rewards"), self._service)
            except (ServiceError, ValueError) as error:
                server.failures = 1
                silent.append(f"{server.url}: {error}")
                continue
            self._service, served = str(content["service"]), content["rewards"]
        if self._service is None:
            raise WrongArgument("urls", urls, f", where no reward server answers: {'; '.join(silent)}")
        for each in silent:
            print(f"reward server {each}; the others are asked until it is there", file=sys.stderr)
        name = next(iter(served)) if reward is None and len(served) == 1 else reward
        if name not in served:
            raise WrongArgument("reward", reward, f"; served there: {', '.join(served)}")
        entry = served[name]
        return name, isinstance(entry, dict) and entry.get("checks") is True

    def _work(self) -> None:
        """Requests one after another, while there are any."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                request = self._waiting.popleft()
            try:
                scores = self._scores(request)
            except Exception as error:  # of ours; a server's fault never comes here
                if not request.scores.cancelled():
                    request.scores.set_exception(error)
                continue
            if scores is not None and request.scores.set_running_or_notify_cancel():
                request.scores.set_result(scores)

    def _scores(self, request: _Request) -> Scores | None:
        """What a server says of them, however long that takes; None where nobody wants it any more."""
        body = encode_request(request.images, request.prompts)
        failures = 0
        while (server := self._servers.take(request.scores.cancelled)) is not None:
            try:
                if server.failures:  # before megabytes are sent, and it says why it refuses them
                    described(server.ask("GET", "/rewards"), self._service)
                answer = server.ask("POST", self._path("/score"), body, NPZ)
                scored = decode_answer(answer, str(self._service), self._reward, len(request.prompts))
            except (ServiceError, ValueError) as error:
                self._servers.failed(server)
                failures += 1
                if failures > self._retries:
                    self._notices.waits(request, f"{server.url}: {error}")
                continue
            self._servers.answered(server)
            self._notices.answered(request, server.url, scored)
            return Scores(torch.tensor(scored.reward), torch.tensor(scored.score))
        return None


@dataclass(eq=False)
class _Request:
    images: torch.Tensor
    prompts: list[Prompt]
    scores: Future[Scores] = field(default_factory=Future)


class _Notices:
    """What is said of servers and images that fail, once each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[_Request, str] = {}
        self._said: set[str] = set()

    def waits(self, request: _Request, reason: str) -> None:
        with self._lock:
            new = reason not in self._waiting.values()
            self._waiting = {each: why for each, why in self._waiting.items() if not each.scores.cancelled()}
            self._waiting[request] = reason
        if new:
            _say(f"no scores from {reason}. The run waits and goes on when there are some; Ctrl-C saves and stops it.")

    def answered(self, request: _Request, url: str, scored: Scored) -> None:
        with self._lock:
            over = self._waiting.pop(request, None) is not None and not self._waiting
            new = {*scored.errors.values()} - self._said
            new = new if len(self._said) < _SAID_AT_MOST else set()
            self._said |= new
        if over:
            _say(f"{url} gives scores again; the run goes on.")
        for reason in sorted(new):
            _say(f"{url} cannot score an image, which is not learnt from: {reason}")


def _say(sentence: str) -> None:
    # A line of its own, where a progress bar may stand.
    print(f"\nreward server: {sentence}", file=sys.stderr, flush=True)


def _servers(urls: object, token: Token, timeout: float) -> list[Server]:
    several = [urls] if isinstance(urls, str) else urls
    if not isinstance(several, list) or not several or not all(isinstance(each, str) for each in several):
        raise WrongArgument("urls", urls, "; accepted is the URL of a server, or a list of several")
    try:
        return [Server(each, token, timeout) for each in several]
    except ValueError as error:
        raise WrongArgument("urls", urls, f"; {error}") from error


def _require_number(name: str, value: object, kind: type, least: int = 0) -> None:
    usable = isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]
    if not usable or value < least or (kind is float and value <= 0):  # type: ignore[operator]
        accepted = "a positive number of seconds" if kind is float else f"{least} or more"
        raise WrongArgument(name, value, f"; accepted: {accepted}")
