"""What a reward server answers: /score, /check, /rewards, /health, /metrics, and /openapi.json on all of them."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from advflow.data.prompt import Prompt, UnknownPrompt
from advflow.rewards import CheckedReward
from advflow.rewards.wire import JSON, NPZ, BadRequest, decode_check, decode_request, encode_answer
from advflow.serve.metrics import Metrics
from advflow.serve.schema import ANSWERS, check_schema, score_schema
from advflow.serve.work import Job, Unavailable, Workers
from advflow.settings.serve import ServeConfig

_LOOK_UP = 1.0  # seconds between two looks at whether who asked is still there

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Service:
    """The rewards `served` by name, with the `workers` that score; `identity` is that of the rewards."""

    def __init__(
        self,
        settings: ServeConfig,
        served: Mapping[str, CheckedReward],
        identity: str,
        workers: Workers,
        metrics: Metrics,
    ) -> None:
        self._settings, self._served, self._identity = settings, dict(served), identity
        self._workers, self._metrics = workers, metrics
        self._most, self._most_held = settings.max_request_mb * 10**6, settings.max_waiting_mb * 10**6
        self._held = 0

    @property
    def names(self) -> list[str]:
        return list(self._served)

    async def score(self, request: Request) -> Response:
        names = self._names(request)
        async with self._body(request, (NPZ, JSON)) as body:
            kind = _kind(request)
            try:
                # In a thread: unpacking megabytes would keep everybody else waiting.
                images, prompts = await asyncio.to_thread(decode_request, body, kind, self._most)
            except BadRequest as error:
                raise HTTPException(422, str(error)) from error
            job = Job(images, prompts, names)
            self._workers.submit(job)
            return await self._finished(request, job)

    async def _finished(self, request: Request, job: Job) -> Response:
        answer = asyncio.wrap_future(job.answer)
        while not (await asyncio.wait([answer], timeout=_LOOK_UP))[0]:
            if await request.is_disconnected():
                answer.cancel()  # who does not wait for it will ask again
                return Response(status_code=499)
        try:
            return Response(encode_answer(self._identity, answer.result()), media_type=JSON)
        except Unavailable as error:
            raise HTTPException(503, str(error), {"Retry-After": "5"}) from error

    async def check(self, request: Request) -> Response:
        names = self._names(request)
        async with self._body(request, (JSON,)) as body:
            try:
                prompts = decode_check(body)
            except BadRequest as error:
                raise HTTPException(422, str(error)) from error
            refused = {name: await asyncio.to_thread(_refused, self._served[name], prompts) for name in names}
        return self._answer(refused)

    async def rewards(self) -> Response:
        return self._answer({name: {"checks": each.checks, "batch": each.batch} for name, each in self._served.items()})

    async def health(self) -> Response:
        return Response(json.dumps({"status": "ok"}), media_type=JSON)

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _answer(self, of_rewards: Mapping[str, object]) -> Response:
        return Response(json.dumps({"service": self._identity, "rewards": of_rewards}), media_type=JSON)

    def _names(self, request: Request) -> tuple[str, ...]:
        """The rewards that a request asks for; all where it names none."""
        names = tuple(dict.fromkeys(request.query_params.getlist("reward"))) or tuple(self._served)
        for name in names:
            if name not in self._served:
                raise HTTPException(404, f"there is no reward {name!r}; served here: {', '.join(self._served)}")
        return names

    @asynccontextmanager
    async def _body(self, request: Request, kinds: tuple[str, ...]) -> AsyncIterator[bytes]:
        """The body of a request, as long as which counts as held here."""
        if _kind(request) not in kinds:
            raise HTTPException(415, f"the body is of type {_kind(request)!r}; accepted: {' or '.join(kinds)}")
        told = request.headers.get("content-length", "")
        size = int(told) if told.isdecimal() else self._most
        if size > self._most:
            raise HTTPException(413, f"the body has {size} bytes; accepted are {self._most} or less (max_request_mb)")
        if self._held + size > self._most_held:
            raise HTTPException(503, "too many requests are waiting (max_waiting_mb)", {"Retry-After": "1"})
        self._hold(size)
        try:
            yield await self._read(request)
        finally:
            self._hold(-size)

    def _hold(self, size: int) -> None:
        self._held += size
        self._metrics.add("held_bytes", size)

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.max_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self._most:
                        raise HTTPException(413, f"accepted are {self._most} bytes or less (max_request_mb)")
                    parts.append(part)
        except TimeoutError as error:
            raise HTTPException(408, f"it took more than {self._settings.max_seconds} s to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "it broke off") from error
        return b"".join(parts)


def _kind(request: Request) -> str:
    kind: str = request.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def _refused(reward: CheckedReward, prompts: list[Prompt]) -> dict[int, str]:
    """Why the reward cannot score some of the prompts, by their places."""
    refused = {}
    for place, prompt in enumerate(prompts):
        try:
            reward.check(prompt)
        except UnknownPrompt as error:
            refused[place] = str(error)
        except Exception as error:
            refused[place] = f"{type(error).__name__}: {error}"
    return refused


class Guard:
    """Answers 401 to whoever brings no token, where there is one; counts the answers.

    /health alone is for everybody: it says nothing but that the server is there.
    """

    def __init__(self, app: Any, token: str | None, metrics: Metrics, most: int, seconds: float) -> None:
        self._app, self._metrics, self._most, self._seconds = app, metrics, most, seconds
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unread = True

        async def watched() -> MutableMapping[str, Any]:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def drained() -> None:
            """Reads what of a body nobody has read, and forgets it: who still sends would miss the answer."""
            size = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    while unread and size <= 2 * self._most:
                        size += len((await watched()).get("body", b""))

        async def answered(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.add("requests_total", status=str(message["status"]))
                if message["status"] != 408:
                    await drained()
            await send(message)

        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self._token is None or scope["path"] == "/health" or hmac.compare_digest(given, self._token):
            await self._app(scope, watched, answered)
            return
        content = json.dumps({"detail": "the token is missing or wrong; accepted: Authorization: Bearer TOKEN"})
        await Response(content, 401, {"WWW-Authenticate": "Bearer"}, JSON)(scope, watched, answered)


def make_app(settings: ServeConfig, service: Service, token: str | None, workers: Workers, metrics: Metrics) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(workers.close, settings.grace)

    names = service.names
    # No pages that load scripts from elsewhere.
    app = FastAPI(title="advflow reward-server", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_api_route("/score", service.score, methods=["POST"], openapi_extra=score_schema(names), responses=ANSWERS)
    app.add_api_route("/check", service.check, methods=["POST"], openapi_extra=check_schema(names), responses=ANSWERS)
    app.add_api_route("/rewards", service.rewards, methods=["GET"], responses=ANSWERS)
    app.add_api_route("/health", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"], responses=ANSWERS)
    most, seconds = settings.max_request_mb * 10**6, settings.max_seconds
    app.add_middleware(Guard, token=token, metrics=metrics, most=most, seconds=seconds)
    return app
