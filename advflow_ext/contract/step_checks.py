"""What a step table may be made of: schedules, noise levels and windows, each refused in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from advflow_ext.contract.numbers import require_number

# Schedulers hold 1 and 0 only up to this: float32 makes 0.99999988 or 1.0000001 of 1, and diffusers' UniPC takes 1e-6
# off, which float32 makes 1.013e-6.
_ROUNDING = 1e-6 + 2**-24


def _numbers(name: str, value: object, accepted: str) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is {value!r}; accepted are {accepted}.") from error
    if isinstance(numbers, FakeTensor):
        raise ValueError(f"{name} is {value!r}, which holds no numbers; accepted are {accepted}.")
    return numbers


def checked_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    values = _numbers("sigmas", sigmas, "[T + 1] numbers")
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"sigmas has shape {list(values.shape)}; accepted are [T + 1] numbers, T of at least 1.")
    given = values.tolist()
    values[:1], values[-1:] = one_up_to_rounding(values[:1]), zero_up_to_rounding(values[-1:])
    if not (values.diff() < 0).all() or not 0 <= values[-1] < values[0] <= 1:
        shown = ", ".join(repr(float(f"{value:.9g}")) for value in given[:16])
        more = f", ... of {len(given)}" if len(given) > 16 else ""
        raise ValueError(
            f"sigmas is [{shown}{more}]; accepted are numbers within [0, 1], strictly decreasing{_first_fault(values)}."
        )
    return values


def _first_fault(values: Tensor) -> str:
    wrong = (values.diff() >= 0).nonzero().flatten().tolist()
    return f" (sigmas[{wrong[0] + 1}] is not below sigmas[{wrong[0]}])" if wrong else ""


def checked_steps(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    given = start, end
    start, end = one_up_to_rounding(start), zero_up_to_rounding(end)
    if (wrong := ~in_order(start, end)).any():
        step = int(wrong.nonzero()[0])
        raise ValueError(
            f"s[{step}] is {float(given[0][step])!r} and s_end[{step}] is {float(given[1][step])!r}; accepted are "
            "0 <= s_end < s <= 1."
        )
    return start, end


def in_order(start: Tensor, end: Tensor) -> Tensor:
    return (end >= 0) & (end < start) & (start <= 1)


def one_up_to_rounding(s: Tensor) -> Tensor:
    return torch.where((s - 1).abs() <= _ROUNDING, 1, s)


def zero_up_to_rounding(s: Tensor) -> Tensor:
    return torch.where(s.abs() <= _ROUNDING, 0, s)


def device_of_unread(*values: object) -> torch.device | None:
    """Where a value would have to be waited for, if one would."""
    for value in values:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            continue
        if value.device.type not in ("cpu", "meta"):
            return value.device
    return None


def per_step(
    device: torch.device | None, values: dict[str, float | Sequence[float] | Tensor], steps: int = 1
) -> dict[str, Tensor]:
    """Every value as float64 ``[T]``, on the CPU or, unread, on ``device``; a number stands for all T steps.

    T is ``steps``, or what the longest has."""
    found = {name: _flat(name, value, device) for name, value in values.items()}
    most = max(steps, *(numbers.numel() for numbers in found.values())) if steps == 1 else steps
    for name, numbers in found.items():
        if numbers.dim() and len(numbers) != most:
            raise ValueError(f"{name} has shape [{len(numbers)}]; accepted are a number and [{most}] numbers.")
    return {name: numbers.expand(most).clone() for name, numbers in found.items()}


def _flat(name: str, value: float | Sequence[float] | Tensor, device: torch.device | None) -> Tensor:
    if not hasattr(value, "__len__"):
        require_number(name, value, low=0.0, or_else=", or [T] of them")
    accepted = "a number and [T] numbers"
    numbers = _numbers(name, value, accepted) if device is None else _unread(name, value, device, accepted)
    if not numbers.numel() or numbers.numel() != max(numbers.shape[:1], default=1):
        raise ValueError(
            f"{name} has shape {list(numbers.shape)}; accepted are a number and [T] numbers, T of at least 1."
        )
    return numbers.flatten() if numbers.dim() else numbers


def _unread(name: str, value: float | Sequence[float] | Tensor, device: torch.device, accepted: str) -> Tensor:
    if isinstance(value, Tensor) and value.device == device:
        if value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{name} has dtype {value.dtype}; accepted are {accepted}.")
        return value.detach().double().clone()
    return _numbers(name, value, accepted).to(device, non_blocking=True)


def require_range(name: str, numbers: Tensor, below: float = math.inf) -> None:
    if (wrong := ~((numbers >= 0) & (numbers < below))).any():
        step = int(wrong.nonzero()[0])
        bound = "finite numbers of at least 0" if below == math.inf else f"numbers of at least 0 and below {below:g}"
        raise ValueError(f"{name}[{step}] is {float(numbers[step])!r}; accepted are {bound}.")


def require_level(sampler: str, level: Tensor) -> None:
    require_range("noise_level", level)
    if sampler == "cps" and (wrong := level > 1).any():
        first = float(level[wrong][0])
        raise ValueError(f"noise_level is {first!r}; accepted for sampler 'cps' is a number within [0, 1].")


def require_no_sigma_1(sampler: str, convention: str, stochastic: Tensor, s: Tensor) -> None:
    if sampler == "flash_sde":
        needed = stochastic
    elif sampler == "flow_sde" and convention == "next_sigma":
        needed = stochastic & (s == 1)
    else:
        return
    if needed.any():
        step = int(needed.nonzero()[0])
        raise ValueError(
            f"sigma_1 is None; accepted for sampler {sampler!r} and step {step}, which starts at s = "
            f"{float(s[step]):.9g}, is the second sigma of its schedule."
        )


def checked_window(stochastic_steps: Sequence[int] | None, steps: int) -> Tensor:
    if stochastic_steps is None:
        return torch.ones(steps, dtype=torch.bool, device="cpu")
    window = torch.zeros(steps, dtype=torch.bool, device="cpu")
    if not isinstance(stochastic_steps, Sequence):
        raise ValueError(f"stochastic_steps is {stochastic_steps!r}; accepted are the steps 0 to {steps - 1}, or None.")
    for step in stochastic_steps:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < steps:
            raise ValueError(f"stochastic_steps has {step!r}; accepted are the steps 0 to {steps - 1}, or None.")
        window[step] = True
    return window
