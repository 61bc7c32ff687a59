"""What a wheel promises, checked by wheels.py where nothing but torch and the wheel is installed.

python -I wheel_check.py serves 2.11.0      # built for the torch that is here
python -I wheel_check.py refuses 2.13.0     # built for torch 2.13.0, beside another one
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def imported() -> tuple[ModuleType, list[str]]:
    """The package, and what importing it warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import advflow_ext
    assert (advflow_ext.__file__ or "").startswith(sys.prefix), f"imported from {advflow_ext.__file__}"
    return advflow_ext, [str(warning.message) for warning in said]


def loss_and_gradient(loss: Callable[..., Any], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    v, x0, noise, v_old = (torch.randn(4, 16, 8, 8, generator=draws).to(device, dtype) for _ in range(4))
    t, advantages = (torch.tensor(row, device=device, dtype=dtype) for row in ([0.2, 0.5, 0.7, 1], [1, -0.5, 0.3, -1]))
    output = loss(v.requires_grad_(), x0, noise, t, advantages, v_old=v_old)
    output.loss.backward()
    assert v.grad is not None
    return output.loss.detach().cpu().double(), v.grad.cpu().double()


def check_loss(package: ModuleType, device: str) -> None:
    ours = loss_and_gradient(package.advantage_flow_loss, device, torch.float32)
    right = loss_and_gradient(package.reference.advantage_flow_loss, "cpu", torch.float64)
    for found, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def check_serves(release: str) -> None:
    package, said = imported()
    native = package._native
    assert torch.__version__.split("+")[0] == release, f"torch {torch.__version__} is installed"
    assert not said, said
    assert native.module is not None
    assert f"+torch{release}." in package.__version__, package.__version__
    assert native.build_info()["torch"] == torch.__version__
    for device in sorted(native.DEVICES):
        if device == "cuda" and not torch.cuda.is_available():
            print("cuda: built, not run: torch sees no CUDA device")
            continue
        native.module.reset_launch_count()
        check_loss(package, device)
        assert native.module.launch_count() == 3, f"{native.module.launch_count()} launches; a loss has 3"
        print(f"{device}: loss and gradient are the reference's")


def check_refuses(built_for: str) -> None:
    package, said = imported()
    assert package._native.module is None
    assert len(said) == 1, said
    assert f"was built for torch {built_for}" in said[0], said
    assert f"but torch {torch.__version__} is installed; reinstall it" in said[0], said
    check_loss(package, "cpu")
    print(said[0])


if __name__ == "__main__":
    {"serves": check_serves, "refuses": check_refuses}[sys.argv[1]](sys.argv[2])
