"""What `advflow reward-server` may be told."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from advflow.settings.numbers import require, require_numbers
from advflow.settings.rewards import RewardConfig, read_rewards


@dataclass
class ServeConfig:
    """Settings of a reward server.

    Args:
        reward: as data.reward of a run: a name, a dotted path "package.module:Class", or a mapping of several by names
            of their own; all are served, each under its name. Weights are the run's affair.
        reward_args: what the class of a reward that stands alone is made with, each as `--reward_args.NAME VALUE`.
        plugins: modules that add rewards, separated by commas on the command line.
        host: address to listen on. Any but this machine's own (127.0.0.1, ::1, localhost) needs a token.
        port: to listen on; 0 takes a free one and says which.
        token_file: a file with the token that requests must bring; else $ADVFLOW_REWARD_TOKEN, where there is one.
        workers: so many batches are scored at a time, each in a thread with rewards of its own.
        batch: at most so many images of several requests are scored together.
        wait: seconds that a request waits for others to be scored together with. With 0 each is scored by itself, and
            the rounding of a network does not depend on who else asks.
        max_request_mb: megabytes of the largest request.
        max_waiting_mb: of all requests that are here at a time; who comes then is told to come again.
        max_seconds: that a request may take to arrive.
        grace: seconds that requests are given to be answered when the server is told to stop.
    """

    reward: str | dict[str, Any] = "embedded"
    reward_args: dict[str, Any] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 8500
    token_file: str | None = None
    workers: int = 1
    batch: int = 128
    wait: float = 0.0
    max_request_mb: int = 256
    max_waiting_mb: int = 2048
    max_seconds: float = 60.0
    grace: float = 60.0

    def __post_init__(self) -> None:
        require_numbers(self)
        require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        for name in ("workers", "batch", "max_request_mb"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        enough = self.max_waiting_mb >= self.max_request_mb
        require(enough, "max_waiting_mb", self.max_waiting_mb, f"max_request_mb, {self.max_request_mb}, or more")
        require(self.wait >= 0, "wait", self.wait, "zero or a positive number of seconds")
        for name in ("max_seconds", "grace"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number of seconds")
        read_rewards(self.reward, self.reward_args, "reward")

    @property
    def rewards(self) -> dict[str, RewardConfig]:
        """The rewards by name."""
        return read_rewards(self.reward, self.reward_args, "reward")

    @property
    def is_local(self) -> bool:
        """Whether this machine alone can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
