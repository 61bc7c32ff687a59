"""Counters of a reward server, as Prometheus reads them."""

from __future__ import annotations

import threading
from collections import defaultdict

_HELP = {
    "requests_total": ("counter", "Requests answered, by status."),
    "images_total": ("counter", "Images scored, by reward."),
    "failed_images_total": ("counter", "Images that a reward could not score, by reward."),
    "batches_total": ("counter", "Batches scored, by reward."),
    "scoring_seconds_total": ("counter", "Seconds that a reward has scored, by reward."),
    "waiting_seconds_total": ("counter", "Seconds that requests have waited for a worker."),
    "waiting_requests": ("gauge", "Requests that wait for a worker."),
    "held_bytes": ("gauge", "Bytes of the requests that are here."),
}


class Metrics:
    """Numbers by name and labels; any thread may change them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[tuple[str, str], float] = defaultdict(float)
        for name in ("waiting_requests", "held_bytes", "waiting_seconds_total"):
            self._values[name, ""] = 0.0

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        text = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
        with self._lock:
            self._values[name, text] += amount

    def text(self) -> str:
        with self._lock:
            values = dict(self._values)
        lines = []
        for name, (kind, meaning) in _HELP.items():
            lines += [f"# HELP advflow_reward_{name} {meaning}", f"# TYPE advflow_reward_{name} {kind}"]
            for (each, labels), value in sorted(values.items()):
                if each == name:
                    lines.append(f"advflow_reward_{name}{f'{{{labels}}}' if labels else ''} {value:.16g}")
        return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
