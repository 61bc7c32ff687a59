"""The policies of the tests here, and what PEFT's own switching makes of them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("peft", reason="the trainer's dependencies are not installed")


from tests.nn.lora_models import inputs

ROLES = {"learner": "one", "rollout": "two", "reference": None}
PLENTY = 2**30


def run(model: Any, arguments: tuple[Tensor, ...] | None = None) -> Tensor:
    out: Tensor = model(*(arguments or inputs()), return_dict=False)[0]
    return out.detach()


def stock_outputs(model: Any) -> dict[str, Tensor]:
    found = {}
    for role, adapter in ROLES.items():
        if adapter is None:
            model.disable_adapters()
        else:
            model.enable_adapters()
            model.set_adapter(adapter)
        found[role] = run(model)
    model.enable_adapters()
    return found
