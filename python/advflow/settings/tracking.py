"""Where else the numbers of a run go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from advflow.settings.numbers import require

Service = Literal["wandb", "trackio"]


@dataclass
class TrackingConfig:
    """Services that are told what metrics.jsonl, evals.jsonl and the sample grids say. TensorBoard always is.

    Args:
        to: "wandb" or "trackio", or both; their packages are yours to install, and to log in to.
        project: under which the run stands there, by the name of its folder.
        args: what a service's `init` takes beside that, by its name: `{wandb: {entity: team, mode: offline}}`.
    """

    to: list[Service] = field(default_factory=list)
    project: str = "advflow"
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ", ".join(get_args(Service))
        require(all(name in get_args(Service) for name in self.to), "tracking.to", self.to, f"a list of {known}")
        require(len(set(self.to)) == len(self.to), "tracking.to", self.to, f"a list of {known}, each once")
        require(self.project != "", "tracking.project", self.project, "a name")
        fits = all(name in self.to and isinstance(value, Mapping) for name, value in self.args.items())
        require(fits, "tracking.args", self.args, "a mapping for each that tracking.to names, by its name")
