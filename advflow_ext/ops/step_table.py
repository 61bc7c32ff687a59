"""The coefficients of every sampler step of a rectified-flow model, fixed once in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advflow_ext.ops._checks import require_choice
from advflow_ext.ops._numbers import require_number

SAMPLERS = ("flow_sde", "dance_sde", "cps", "ode")
CONVENTIONS = ("next_sigma", "clamp_0.99")


class StepRows(NamedTuple):
    """The coefficients of N transitions, all ``[N]``: see :class:`StepTable`."""

    c_x: Tensor
    c_v: Tensor
    sigma: Tensor
    kappa: Tensor
    dt: Tensor


class StepTable:
    """A sigma schedule and a sampler as one Gaussian per step, x' = c_x x + c_v v + sigma eps.

    Time runs from noise (s = 1) to data (s = 0). A step goes from s to s' with dt = s' - s < 0 and h = -dt; the
    sensitivity kappa = c_v / sigma turns velocity differences into log-ratios and KL divergences:

    * ``"flow_sde"`` and ``"dance_sde"``: c_x = 1 - w h / 2, c_v = -h (1 + w (1 - s) / 2), sigma = sqrt(w s h), with
      w = a^2 / (1 - s) of noise level a (Flow-GRPO, arXiv 2505.05470 eq. 8-9), or w = eta^2 / s of noise level eta, so
      that sigma = eta sqrt(h) (XueZeyue/DanceGRPO).
    * ``"cps"``, noise level eta in [0, 1] (Flow-CPS, arXiv 2509.05952), theta = eta pi / 2:
      c_x = (1 - s') + s' cos theta, c_v = -s (1 - s') + s' (1 - s) cos theta, sigma = s' sin theta.
    * ``"ode"`` (Euler): c_x = 1, c_v = -h, sigma = 0; the noise level has no part in it.

    Arguments:
        sigmas: ``[T + 1]`` numbers, strictly decreasing within [0, 1], as the scheduler holds them.
        convention: what Flow-SDE divides by where 1 - s vanishes: "next_sigma" (yifan123/flow_grpo) takes sigmas[1] for
            s at s = 1, so that the first sigma is a exactly; "clamp_0.99" (Tencent-Hunyuan/UniRL at 1a7b501, in its KL)
            takes 0.99 for every s above it. Rollout and training must agree.
        stochastic_steps: the SDE window (Flow-GRPO-Fast, MixGRPO): every other step is an Euler step. None: no window.

    A step with sigma = 0 is deterministic: it can be sampled but not trained, and its kappa is -inf. CPS ends in one.

    Attributes: ``sigmas``, ``c_x``, ``c_v``, ``sigma``, ``kappa``, ``dt`` in float64 on the CPU, the number of
    ``steps`` T, and ``stochastic_steps``, the steps with sigma > 0. A device gets its copy on first use and keeps it.

    Raises ValueError, naming argument, value and what is accepted.
    """

    def __init__(
        self,
        sigmas: Sequence[float] | Tensor,
        *,
        sampler: str = "flow_sde",
        noise_level: float = 0.7,
        convention: str = "next_sigma",
        stochastic_steps: Sequence[int] | None = None,
    ) -> None:
        require_choice("sampler", sampler, SAMPLERS)
        require_choice("convention", convention, CONVENTIONS)
        require_number("noise_level", noise_level, low=0.0)
        if sampler == "cps" and noise_level > 1:
            raise ValueError(f"noise_level is {noise_level!r}; accepted for sampler 'cps' is a number within [0, 1].")
        self.sampler = sampler
        self.noise_level = float(noise_level)
        self.sigmas = _checked_sigmas(sigmas)
        self.steps = len(self.sigmas) - 1
        window = _checked_window(stochastic_steps, self.steps)

        s, following = self.sigmas[:-1], self.sigmas[1:]
        self.dt = following - s
        h = -self.dt
        if sampler in ("flow_sde", "dance_sde"):
            if sampler == "dance_sde":
                denominator = s
            elif convention == "clamp_0.99":
                denominator = 1 - s.clamp(max=0.99)
            else:
                denominator = 1 - torch.where(s == 1, following, s)
            w = self.noise_level**2 / denominator
            c_x, c_v, sigma = 1 - w * h / 2, -h * (1 + w * (1 - s) / 2), (w * s * h).sqrt()
        elif sampler == "cps":
            theta = self.noise_level * math.pi / 2
            noise_kept = following * math.cos(theta)
            c_x, c_v = 1 - following + noise_kept, -s * (1 - following) + (1 - s) * noise_kept
            sigma = following * math.sin(theta)
        else:
            c_x, c_v, sigma = torch.ones_like(s), -h, torch.zeros_like(s)

        random = window & (sigma > 0)
        self.c_x = torch.where(random, c_x, 1)
        self.c_v = torch.where(random, c_v, -h)
        self.sigma = torch.where(random, sigma, 0)
        self.kappa = self.c_v / self.sigma
        self.stochastic_steps: tuple[int, ...] = tuple(random.nonzero().flatten().tolist())

        columns = torch.stack([self.c_x, self.c_v, self.sigma, self.kappa, self.dt], 1)
        # The outer rows answer for every step that is not in the table: nothing computed from them can pass for a
        # number.
        outside = torch.full_like(columns[:1], torch.nan)
        self._rows = torch.cat([outside, columns, outside])
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def columns(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[N, 5]``, the columns of :class:`StepRows`, on the device of ``index``; never waits for that device but on
        first use. A step outside the table gives NaN."""
        where = (index.device, dtype)
        if where not in self._copies:
            self._copies[where] = self._rows.to(dtype).to(index.device)
        return self._copies[where].index_select(0, index.clamp(-1, self.steps) + 1)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> StepRows:
        """The coefficients of the steps ``index``, int64 ``[N]``, on its device; NaN for a step outside the table."""
        return StepRows(*self.columns(index, dtype).unbind(1))

    def __repr__(self) -> str:
        return (
            f"StepTable(sampler={self.sampler!r}, noise_level={self.noise_level:g}, steps={self.steps}, "
            f"stochastic_steps={list(self.stochastic_steps)})"
        )


def _checked_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    try:
        values = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sigmas is {sigmas!r}; accepted are [T + 1] numbers.") from error
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"sigmas has shape {list(values.shape)}; accepted are [T + 1] numbers, T of at least 1.")
    if not (values.diff() < 0).all() or not 0 <= values[-1] < values[0] <= 1:
        raise ValueError(
            f"sigmas is {[float(f'{value:.6g}') for value in values.tolist()]}; accepted are numbers within [0, 1], "
            "strictly decreasing."
        )
    return values.clone()


def _checked_window(stochastic_steps: Sequence[int] | None, steps: int) -> Tensor:
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
