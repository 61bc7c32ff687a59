"""`advflow reward-server`, from its settings to its end."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from advflow.core.provenance import version
from advflow.rewards import CheckedReward, load_reward
from advflow.rewards.loading import needed
from advflow.rewards.service import TOKEN, ServiceError, Token
from advflow.settings.registry import REWARDS
from advflow.settings.rewards import RewardConfig
from advflow.settings.serve import ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(settings: ServeConfig) -> None:
    """Serves until it is told to stop, by SIGINT or SIGTERM; what has begun is then answered.

    Raises ValueError, before anything is loaded, for settings with which it would not or should not.
    """
    for module in ("fastapi", "uvicorn"):
        needed(module, "advflow reward-server", "serve")
    token = read_token(settings)
    listening = listen(settings)
    import uvicorn

    app = application(settings, token)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=math.ceil(settings.grace), server_header=False
    )
    listening.listen(1024)  # so that who reads the next line may connect
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"serving {', '.join(settings.rewards)} at {address}{'' if token else ', without a token'}", flush=True)
    server = uvicorn.Server(config)
    # uvicorn raises the signal again that has ended it; who was told to stop and did has not failed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    print("stopped", flush=True)


def application(settings: ServeConfig, token: str | None) -> FastAPI:
    """The rewards, loaded for each worker, behind the routes that serve them."""
    from advflow.serve.app import Service, make_app
    from advflow.serve.metrics import Metrics
    from advflow.serve.work import Workers

    metrics = Metrics()
    served = [load(settings.rewards) for _ in range(settings.workers)]
    workers = Workers([*served], settings.batch, settings.wait, metrics)
    service = Service(settings, served[0], identity(settings), workers, metrics)
    return make_app(settings, service, token, workers, metrics)


def read_token(settings: ServeConfig) -> str | None:
    """The token that requests must bring. Raises ValueError where there is none and others can reach the server."""
    try:
        token = Token(settings.token_file).read()
    except ServiceError as error:
        raise ValueError(f"token_file is {settings.token_file!r}: {error}") from error
    if token is None and not settings.is_local:
        raise ValueError(
            f"host is {settings.host!r}, which other machines reach, and there is no token; accepted: --token_file, or "
            f"{TOKEN} in the environment, or a host of this machine's own such as 127.0.0.1"
        )
    return token


def listen(settings: ServeConfig) -> socket.socket:
    """Raises ValueError where the address is taken, or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ValueError(f"host and port are {settings.host!r} and {settings.port}: {error.strerror}") from error
    listening.set_inheritable(True)
    return listening


def load(rewards: dict[str, RewardConfig]) -> dict[str, CheckedReward]:
    """The rewards by name. A plugin's that has a section of a run's settings is given that as its arguments."""
    return {name: _load(each) for name, each in rewards.items()}


def _load(each: RewardConfig) -> CheckedReward:
    section = REWARDS[each.reward].settings if each.reward in REWARDS else None
    arguments, settings = (each.args, None) if section is None else (None, section(**each.args))
    return load_reward(
        each.reward, arguments, settings, batch=each.batch, place=each.place, arguments_place=each.arguments
    )


def identity(settings: ServeConfig) -> str:
    """The same for the same rewards with the same arguments, in the same version: what a run goes on with."""
    rewards: dict[str, Any] = {name: [each.reward, dict(each.args)] for name, each in settings.rewards.items()}
    text = json.dumps([version("advflow"), rewards], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
