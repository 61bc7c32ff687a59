"""One reward server as its client sees it: an exchange with a deadline, and whom to ask next."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

TOKEN = "ADVFLOW_REWARD_TOKEN"
"""Where the environment has the token, where no file is named."""
_MOST_BYTES = 2**24  # of an answer
_CONNECT_SECONDS = 10.0
FIRST_REST, LONGEST_REST = 0.25, 10.0  # seconds, of a server that has failed


class ServiceError(Exception):
    """Why a server gave no scores, in a few words."""


class Token:
    """The token of a file, read anew for each request so that it may be changed under a run, or the environment's."""

    def __init__(self, file: str | None) -> None:
        self._file = file

    def read(self) -> str | None:
        """None where there is neither. Raises ServiceError where the file cannot be read, or holds something else."""
        if self._file is None and TOKEN not in os.environ:
            return None
        place = TOKEN if self._file is None else f"the token file {self._file!r}"
        try:
            text = os.environ[TOKEN] if self._file is None else Path(self._file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServiceError(f"{place} cannot be read: {error}") from error
        token = text.strip()
        if not token or not token.isascii() or not token.isprintable():
            raise ServiceError(f"{place} holds no token: accepted is a line of ASCII")
        return token


class Server:
    """A server's address, and how it has done lately."""

    def __init__(self, url: str, token: Token, timeout: float) -> None:
        """Raises ValueError for what is no URL."""
        self.url, self._token, self._timeout = url.rstrip("/"), token, timeout
        parts = urlsplit(self.url)
        self._kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}.get(parts.scheme)
        if self._kind is None or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ValueError("accepted is http://host:port or https://host:port")
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path
        self.under_way = self.failures = 0
        self.rests_until = 0.0

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        """The body of the answer. Raises ServiceError where there is none with status 200 in time."""
        deadline = time.monotonic() + self._timeout
        token = self._token.read()
        headers = {"Connection": "close"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if kind:
            headers["Content-Type"] = kind
        assert self._kind is not None
        connection = self._kind(self._host, self._port, timeout=min(_CONNECT_SECONDS, self._timeout))
        # A connection for each request: none is found closed, and no late answer is taken for that to another.
        try:
            connection.connect()
            wire = connection.sock  # which the connection forgets when the answer begins
            wire.settimeout(_left(deadline))
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before it hung up
                connection.request(method, self._path + path, body, headers)
            with connection.getresponse() as response:
                status, answer = response.status, _read(response, wire, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise ServiceError(_reason(error)) from error
        finally:
            connection.close()
        if status != 200:
            raise ServiceError(f"it answers {status}{_detail(answer)}")
        return answer


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _read(response: http.client.HTTPResponse, wire: socket.socket, deadline: float) -> bytes:
    """All of it; a server that sends a byte now and then has no more time than another."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(2**16):
        size += len(part)
        if size > _MOST_BYTES:
            raise http.client.HTTPException(f"it answers more than {_MOST_BYTES} bytes")
        parts.append(part)
        wire.settimeout(_left(deadline))
    if response.length:  # which read1 does not complain of
        raise http.client.HTTPException("its answer breaks off")
    return b"".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return str(said or type(error).__name__)[:200]


def _detail(answer: bytes) -> str:
    """The sentence in an answer that is a refusal; nothing where there is none."""
    with suppress(ValueError, RecursionError):
        content = json.loads(answer)
        if isinstance(content, dict) and isinstance(content.get("detail"), str):
            return f": {content['detail'][:300]}"
    return ""


class Servers:
    """Several servers with the same rewards; each has at most `workers` requests under way.

    One that has failed rests, longer each time, and is asked again then, however well the others do.
    """

    def __init__(self, servers: list[Server], workers: int) -> None:
        self.all, self._workers = servers, workers
        self._changed = threading.Condition()

    def take(self, cancelled: Callable[[], bool]) -> Server | None:
        """The server to ask next, when there is one: of those that may be asked the one with the fewest requests."""
        with self._changed:
            while not cancelled():
                now = time.monotonic()
                free = [each for each in self.all if each.under_way < self._workers and each.rests_until <= now]
                if free:
                    chosen = min(free, key=lambda each: each.under_way)
                    chosen.under_way += 1
                    return chosen
                self._changed.wait(0.05)
        return None

    def answered(self, server: Server) -> None:
        with self._changed:
            server.under_way -= 1
            server.failures, server.rests_until = 0, 0.0
            self._changed.notify()

    def failed(self, server: Server) -> None:
        with self._changed:
            server.under_way -= 1
            now = time.monotonic()
            if now >= server.rests_until:  # else it rests for a failure of the same moment
                rest = min(FIRST_REST * 2 ** min(server.failures, 16), LONGEST_REST)
                server.failures += 1
                # Jitter: clients that a server has lost together do not come back together.
                server.rests_until = now + rest * random.uniform(0.5, 1.5)
            self._changed.notify()
