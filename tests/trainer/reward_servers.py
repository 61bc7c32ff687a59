"""Servers for tests of the remote reward: one of the standard library's that fails as it is told, and the real one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from advflow.rewards import CheckedReward
from advflow.rewards.wire import JSON, decode_check, decode_request, encode_answer
from advflow.serve.work import score

SERVICE = "a-service"
Fault = Callable[["Handler"], None]


class FaultyServer(ThreadingHTTPServer):
    """Serves `rewards`, but does to each request for scores the next of `faults` first, whatever that is.

    A fault that has answered raises Answered.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, rewards: dict[str, CheckedReward], faults: list[Fault] | None = None, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.rewards, self.faults = rewards, list(faults or [])
        self.token: str | None = None
        self.service = SERVICE
        self.sizes: list[int] = []  # images of the requests for scores that were answered
        self.asked: list[str] = []  # paths
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.scoring = threading.Lock()  # as with one worker
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has hung up is no news."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Answered(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self._allowed():
            rewards = {name: {"checks": each.checks} for name, each in self.server.rewards.items()}
            self.answer(json.dumps({"service": self.server.service, "rewards": rewards}))

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._allowed():
            return
        parts = urlsplit(self.path)
        names = parse_qs(parts.query)["reward"]
        if parts.path == "/check":
            verdicts = {name: _refused(self.server.rewards[name], body) for name in names}
            self.answer(json.dumps({"service": self.server.service, "rewards": verdicts}))
            return
        self.images, self.prompts = decode_request(body, self.headers["Content-Type"], 2**30)
        self.names = names
        with self.server.lock:
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            if fault is not None:
                fault(self)
        except Answered:
            return
        answer = self.true_answer()
        self.server.sizes.append(len(self.images))  # first: who has the answer may look at once
        self.answer(answer)

    def true_answer(self) -> str:
        with self.server.scoring:
            scored = {name: score(self.server.rewards[name], self.images, self.prompts) for name in self.names}
        return encode_answer(self.server.service, scored)

    def answer(self, content: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def _allowed(self) -> bool:
        token = self.server.token
        if token is None or self.headers.get("Authorization") == f"Bearer {token}":
            return True
        self.answer(json.dumps({"detail": "the token is missing or wrong"}), 401)
        return False


def _refused(reward: CheckedReward, body: bytes) -> dict[int, str]:
    refused = {}
    for place, prompt in enumerate(decode_check(body)):
        try:
            reward.check(prompt)
        except ValueError as error:
            refused[place] = str(error)
    return refused


def slow(handler: Handler) -> None:
    time.sleep(0.2)


def hanging(handler: Handler) -> None:
    time.sleep(3)
    raise Answered


def dripping(handler: Handler) -> None:
    """A byte now and then, each well in time."""
    content = handler.true_answer()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    for byte in content.encode():
        handler.wfile.write(bytes([byte]))
        time.sleep(0.3)
    raise Answered


def error_500(handler: Handler) -> None:
    handler.answer(json.dumps({"detail": "Internal Server Error"}), 500)
    raise Answered


def unavailable(handler: Handler) -> None:
    handler.answer(json.dumps({"detail": "too many requests are waiting"}), 503)
    raise Answered


def redirect(handler: Handler) -> None:
    handler.answer("{}", 307)
    raise Answered


def hung_up(handler: Handler) -> None:
    raise Answered


def cut_off(handler: Handler) -> None:
    content = handler.true_answer()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[:-5].encode())
    raise Answered


def _with(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Answers with the true answer changed."""

    def fault(handler: Handler) -> None:
        content = json.loads(handler.true_answer())
        changed = change(content)
        handler.answer(changed if isinstance(changed, str) else json.dumps(content))
        raise Answered

    return fault


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    return list(content["rewards"].values())


no_json = _with(lambda content: "<html>a proxy's page</html>")
a_list = _with(lambda content: "[1, 2]")
deep = _with(lambda content: "[" * 100_000)
too_few = _with(lambda content: [each["reward"].pop() for each in _entries(content)] and None)
too_many = _with(lambda content: [each["score"].append(0.5) for each in _entries(content)] and None)
words = _with(
    lambda content: [each.update(reward=["good"] * len(each["reward"])) for each in _entries(content)] and None
)
truths = _with(lambda content: [each.update(score=[True] * len(each["score"])) for each in _entries(content)] and None)
no_scores = _with(lambda content: content["rewards"].clear())
another_service = _with(lambda content: content.update(service="another"))

FAULTS: dict[str, Fault] = {
    "slow": slow,
    "hanging": hanging,
    "dripping": dripping,
    "500": error_500,
    "503": unavailable,
    "redirect": redirect,
    "hung up": hung_up,
    "cut off": cut_off,
    "no JSON": no_json,
    "a list": a_list,
    "deep": deep,
    "too few": too_few,
    "too many": too_many,
    "words": words,
    "truths": truths,
    "no scores": no_scores,
    "another service": another_service,
}


@contextmanager
def real_server(settings: Any, token: str | None = None) -> Iterator[str]:
    """`advflow reward-server` in a thread of this process; gives its address. Needs FastAPI and uvicorn."""
    import uvicorn
    from advflow.serve.server import application, listen

    app = application(settings, token)
    listening = listen(settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
