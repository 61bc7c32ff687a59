"""The coefficients of every sampler step of a rectified-flow model, fixed once in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from advflow_ext.contract.checks import require_choice
from advflow_ext.contract.numbers import require_number
from advflow_ext.contract.step_checks import (
    checked_sigmas,
    checked_steps,
    checked_window,
    device_of_unread,
    in_order,
    one_up_to_rounding,
    per_step,
    require_level,
    require_no_sigma_1,
    require_range,
    zero_up_to_rounding,
)

SAMPLERS = ("flow_sde", "dance_sde", "cps", "ode", "flash_sde")
CONVENTIONS = ("next_sigma", "clamp_0.99")

_LARGEST = 1e150  # noise level that can be squared; what is above is refused by its c_x


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

    * ``"flow_sde"``, ``"dance_sde"``, ``"flash_sde"``: c_x = 1 - w h / 2, c_v = -h (1 + w (1 - s) / 2),
      sigma = sqrt(w s h), with w = a^2 / (1 - s) of noise level a (Flow-GRPO, arXiv 2505.05470 eq. 8-9); or
      w = eta^2 / s of noise level eta, so that sigma = eta sqrt(h) (XueZeyue/DanceGRPO); or w = std^2 / s with
      std = (s_min + (s_1 - s_min) s) eta, s_1 and s_min the second and the last sigma of the schedule, so that
      sigma = std sqrt(h) (Flash-GRPO, arXiv 2605.15980: Shredded-Pork/Flash-GRPO at 8cfc973, where eta is 1;
      Tencent-Hunyuan/UniRL at 2487630b).
    * ``"cps"``, noise level eta in [0, 1] (Flow-CPS, arXiv 2509.05952), theta = eta pi / 2:
      c_x = (1 - s') + s' cos theta, c_v = -s (1 - s') + s' (1 - s) cos theta, sigma = s' sin theta.
    * ``"ode"`` (Euler): c_x = 1, c_v = -h, sigma = 0; the noise level has no part in it.

    Arguments:
        sigmas: ``[T + 1]`` numbers, strictly decreasing within [0, 1], as the scheduler holds them: a first one within
            1e-6 of 1 is 1, a last one within 1e-6 of 0 is 0.
        noise_level: one number of at least 0, or ``[T]``, one a step.
        convention: what Flow-SDE divides by where 1 - s vanishes: "next_sigma" (yifan123/flow_grpo) takes sigmas[1] for
            s at s = 1, so that the first sigma is a exactly; "clamp_0.99" (Tencent-Hunyuan/UniRL at 1a7b501, in its KL)
            takes 0.99 for every s above it. Rollout and training must agree.
        stochastic_steps: the SDE window (Flow-GRPO-Fast, MixGRPO): every other step is an Euler step. None: no window.

    A step with sigma = 0 is deterministic: it can be sampled but not trained, and its kappa is -inf. CPS ends in one.
    A stochastic step with c_x < 0 is refused: its noise is more than x can carry. (Of "clamp_0.99" at s = 1, which is a
    convention of a KL and not of a sampler, a noise level above sqrt 2 is.)

    Attributes: ``s``, ``s_end`` (s'), ``c_x``, ``c_v``, ``sigma``, ``kappa``, ``dt``, ``[T]`` in float64 on the CPU,
    ``sigmas``, the number of ``steps`` T, and ``stochastic_steps``, the steps with sigma > 0. A device gets its copy on
    first use and keeps it, under torch.compile from the first use outside.

    Raises ValueError, naming argument, value and what is accepted.
    """

    def __init__(
        self,
        sigmas: Sequence[float] | Tensor,
        *,
        sampler: str = "flow_sde",
        noise_level: float | Sequence[float] | Tensor = 0.7,
        convention: str = "next_sigma",
        stochastic_steps: Sequence[int] | None = None,
    ) -> None:
        with _real_tensors():
            values = checked_sigmas(sigmas)
            s, s_end, second = values[:-1], values[1:], values[1].expand(len(values) - 1)
            level = per_step(None, {"noise_level": noise_level}, len(s))["noise_level"]
            last = float(values[-1])
            self._set_steps(s, s_end, sampler, level, second, last, convention, stochastic_steps, read=True)
        self.sigmas = values

    @classmethod
    def from_steps(
        cls,
        s: Sequence[float] | Tensor,
        s_end: Sequence[float] | Tensor,
        *,
        sampler: str = "flow_sde",
        noise_level: float | Sequence[float] | Tensor = 0.7,
        sigma_1: float | Sequence[float] | Tensor | None = None,
        sigma_min: float = 0.0,
        convention: str = "next_sigma",
        stochastic_steps: Sequence[int] | None = None,
    ) -> StepTable:
        """A table of steps that need not follow one another, such as one for each sample with its own noise level.

        ``StepTable(sigmas, ...)`` is ``StepTable.from_steps(sigmas[:-1], sigmas[1:], sigma_1=sigmas[1],
        sigma_min=sigmas[-1], ...)``.

        Arguments:
            s, s_end: ``[T]`` numbers, where each step begins and ends: 0 <= s_end < s <= 1, either up to 1e-6. With one
                step a sample the index of a loss is ``torch.arange(T)``.
            noise_level: one number of at least 0, or ``[T]``; a step of level 0 is an Euler step.
            sigma_1: the second sigma of the schedule that the steps are taken from, or ``[T]`` of them: what Flow-SDE
                takes for s at s = 1, and where Flash-SDE's std ends. None where no stochastic step needs it.
            sigma_min: the last sigma of that schedule, for Flash-SDE.

        Of s, s_end, noise_level and sigma_1 a number or a 0-dimensional tensor, as a scheduler holds it, stands for all
        steps, and a tensor may have dimensions of size 1 behind, ``[T, 1, 1, 1]``. Where one is on another device than
        the CPU the table is made there and nothing is waited for: a step that would be refused has NaN for every
        coefficient instead, the attributes are on that device, and there is no ``index_of``.

        The others, attributes and errors as in :class:`StepTable`, without the attribute ``sigmas``.
        """
        table = cls.__new__(cls)
        with _real_tensors():
            require_number("sigma_min", sigma_min, low=0.0)
            device = device_of_unread(s, s_end, noise_level, sigma_1)
            second = {} if sigma_1 is None else {"sigma_1": sigma_1}
            steps = per_step(device, {"s": s, "s_end": s_end, "noise_level": noise_level, **second})
            if device is None:
                steps["s"], steps["s_end"] = checked_steps(steps["s"], steps["s_end"])
                if sigma_1 is not None:
                    require_range("sigma_1", steps["sigma_1"], below=1.0)
            else:
                steps["s"], steps["s_end"] = one_up_to_rounding(steps["s"]), zero_up_to_rounding(steps["s_end"])
            table._set_steps(
                steps["s"], steps["s_end"], sampler, steps["noise_level"], steps.get("sigma_1"), float(sigma_min),
                convention, stochastic_steps, read=device is None,
            )  # fmt: skip
        return table

    def _set_steps(
        self,
        s: Tensor,
        s_end: Tensor,
        sampler: str,
        level: Tensor,
        sigma_1: Tensor | None,
        sigma_min: float,
        convention: str,
        stochastic_steps: Sequence[int] | None,
        read: bool,
    ) -> None:
        require_choice("sampler", sampler, SAMPLERS)
        require_choice("convention", convention, CONVENTIONS)
        self.sampler, self.steps, self.s, self.s_end = sampler, len(s), s, s_end
        window = checked_window(stochastic_steps, self.steps).to(s.device, non_blocking=True)
        if read:
            require_level(sampler, level)
            if sigma_1 is None:
                require_no_sigma_1(sampler, convention, window & (level > 0), s)
        self.noise_level = float(level[0]) if read and level.unique().numel() == 1 else level
        if sigma_1 is None:
            sigma_1 = torch.full_like(s, torch.nan)

        self.dt = s_end - s
        c_x, c_v, sigma = coefficients(sampler, convention, s, s_end, level, sigma_1, sigma_min, read)
        random = window & ~(sigma <= 0)
        self.c_x = torch.where(random, c_x, 1)
        self.c_v = torch.where(random, c_v, self.dt)
        self.sigma = torch.where(random, sigma, 0)
        self.kappa = self.c_v / self.sigma
        carried = self.c_x
        if sampler == "flow_sde" and convention == "clamp_0.99":
            carried = torch.where((s == 1) & random, 1 - level.clamp(max=_LARGEST) ** 2 / 2, carried)
        # sqrt(2) as a level makes its c_x 0 but for rounding.
        uncarried = carried < -1e-9
        if read:
            self._require_carried_noise(convention, level, carried, uncarried)
            self._starts: tuple[float, ...] | None = tuple(s.tolist())
            self._stochastic_steps: tuple[int, ...] | None = tuple((self.sigma > 0).nonzero().flatten().tolist())
        else:
            self._starts = self._stochastic_steps = None
            usable = in_order(s, s_end) & (level >= 0) & (level <= (1 if sampler == "cps" else _LARGEST)) & ~uncarried
            for name in StepRows._fields:
                setattr(self, name, torch.where(usable, getattr(self, name), torch.nan))

        columns = torch.stack([self.c_x, self.c_v, self.sigma, self.kappa, self.dt], 1)
        # The outer rows answer for every step that is not in the table: nothing computed from them can pass for a
        # number.
        outside = torch.full_like(columns[:1], torch.nan)
        self._rows = torch.cat([outside, columns, outside])
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {
            ("_rows", self._rows.device, dtype): self._rows.to(dtype) for dtype in (torch.float32, torch.float64)
        }

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """The steps with sigma > 0. Of a table made on another device than the CPU this waits for it."""
        if self._stochastic_steps is None:
            with _real_tensors():
                self._stochastic_steps = tuple((self.sigma > 0).nonzero().flatten().tolist())
        return self._stochastic_steps

    def _require_carried_noise(self, convention: str, level: Tensor, carried: Tensor, wrong: Tensor) -> None:
        if not wrong.any():
            return
        steps = wrong.nonzero().flatten()
        step = int(steps[0])
        s, s_end, sigma, c_x = (float(x[step]) for x in (self.s, self.s_end, self.sigma, self.c_x))
        limit = float((level.clamp(max=_LARGEST) / (1 - carried).sqrt())[wrong].min())
        near_1 = self.sampler == "flow_sde" and convention == "next_sigma" and 0.99 < s < 1
        clamp = near_1 and len(steps) == 1 and level[step] ** 2 * (s - s_end) < 0.02  # 0.01 for 1 - s is enough
        remedy = "convention 'clamp_0.99', " if clamp else ""
        raise ValueError(
            f"noise_level is {float(level[step])!r}, which gives step {step}, from s = {s!r} to {s_end!r}, a sigma of "
            f"{sigma:.6g} and a c_x of {c_x:.6g}, below 0: more noise than x can carry; accepted are a noise_level of "
            f"at most {limit:.6g}, {remedy}and stochastic_steps without "
            f"{listed_steps(steps.tolist())}."
        )

    def index_of(self, timesteps: Tensor, *, scale: float = 1000.0) -> Tensor:
        """The steps that begin at ``timesteps`` / ``scale``, int64 of their shape, not waiting for their device.

        The nearest beginning is taken, at most 1e-3 away: schedulers round, DanceGRPO cuts fractions off. Where none is
        within reach it is -1, which ops refuse on CPU, and drop and count, or show as NaN, on CUDA. The first use on a
        device copies the beginnings there.

        Arguments:
            timesteps: of any dtype but bool and complex, s times ``scale``.
            scale: a number above 0; 1 for sigmas themselves.

        Raises ValueError for other arguments, and for a table of several steps that begin at one s.
        """
        if not isinstance(timesteps, Tensor) or timesteps.dtype == torch.bool or timesteps.is_complex():
            kind = timesteps.dtype if isinstance(timesteps, Tensor) else f"a {type(timesteps).__name__}"
            raise ValueError(f"timesteps is {kind}; accepted is a tensor of real numbers.")
        require_number("scale", scale, low=0.0, exclusive=True)
        if self._starts is None:
            raise ValueError("table was made on a device and not read; accepted is one made of numbers for index_of.")
        if len(set(self._starts)) < self.steps:
            raise ValueError("table has several steps that begin at one s; accepted is one without for index_of.")
        given = (timesteps.detach().double() / scale).unsqueeze(-1)
        distance, index = (given - self._copy("s", given, given.dtype)).abs().min(-1)
        return torch.where(distance < 1e-3 + 1e-9, index, -1)

    def columns(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[N, 5]``, the columns of :class:`StepRows`, on the device of ``index``; never waits for that device but on
        first use. A step outside the table gives NaN."""
        return self.padded(index, dtype).index_select(0, index.clamp(-1, self.steps) + 1)

    def padded(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """``[steps + 2, 5]``, the columns of every step on the device of ``index``, between two rows of NaN."""
        return self._copy("_rows", index, dtype)

    def _copy(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An attribute on the device of ``like``."""
        values: Tensor = getattr(self, name)
        where = (name, like.device, dtype)
        if isinstance(like, FakeTensor):  # it takes none but its own kind
            with _real_tensors():
                numbers = values.tolist()
            with like.fake_mode:
                return torch.tensor(numbers, dtype=dtype, device=like.device)
        if where in self._copies:
            return self._copies[where]
        if torch.compiler.is_compiling():  # the graph owns what it makes, and a CUDA graph writes over it
            return values.to(dtype).to(like.device, non_blocking=True)
        with _real_tensors():
            self._copies[where] = values.to(dtype).to(like.device)
        return self._copies[where]

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> StepRows:
        """The coefficients of the steps ``index``, int64 ``[N]``, on its device; NaN for a step outside the table."""
        return StepRows(*self.columns(index, dtype).unbind(1))

    def __getstate__(self) -> dict[str, Any]:
        copies = {where: copy for where, copy in self._copies.items() if where[1].type == "cpu"}
        return {**self.__dict__, "_copies": copies}

    def __repr__(self) -> str:
        level = self.noise_level
        shown = f"{level:g}" if isinstance(level, float) else f"{float(level.min()):g} to {float(level.max()):g}"
        return (
            f"StepTable(sampler={self.sampler!r}, noise_level={shown}, steps={self.steps}, "
            f"stochastic_steps=[{listed_steps(self.stochastic_steps)}])"
        )


def listed_steps(steps: Sequence[int]) -> str:
    """All of them, or of many only the first and the last."""
    if len(steps) <= 16:
        return ", ".join(map(str, steps))
    between = " to " if steps[-1] - steps[0] == len(steps) - 1 else ", ..., "
    return f"{steps[0]}{between}{steps[-1]}"


@contextmanager
def _real_tensors() -> Iterator[None]:
    """A table outlives the mode in which it is made or first used: nothing fake, traced or of inference stays in it."""
    with _disable_current_modes(), torch.inference_mode(False):
        yield


def coefficients(
    sampler: str,
    convention: str,
    s: Tensor,
    s_end: Tensor,
    level: Tensor,
    sigma_1: Tensor,
    sigma_min: float,
    read: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(c_x, c_v, sigma) of every step, all ``[T]``."""

    def of_each(one: Callable[[float], float], together: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
        """One by one where they can be read: a vector register's cosine would depend on how many there are."""
        if not read:
            return together(numbers)
        return torch.tensor([one(number) for number in numbers.tolist()], dtype=torch.float64, device="cpu")

    level, h = level.clamp(max=_LARGEST), s - s_end
    if sampler == "ode":
        return torch.ones_like(s), -h, torch.zeros_like(s)
    if sampler == "cps":
        theta = level * math.pi / 2
        noise_kept = s_end * of_each(math.cos, torch.cos, theta)
        c_v = -s * (1 - s_end) + (1 - s) * noise_kept
        return 1 - s_end + noise_kept, c_v, s_end * of_each(math.sin, torch.sin, theta)
    if sampler == "flash_sde":
        level = level * (sigma_min + (sigma_1 - sigma_min) * s)
    if sampler != "flow_sde":
        denominator = s
    elif convention == "clamp_0.99":
        denominator = 1 - s.clamp(max=0.99)
    else:
        denominator = 1 - torch.where(s == 1, sigma_1, s)
    w = of_each(lambda number: number**2, torch.square, level) * denominator.reciprocal()
    return 1 - w * h / 2, -h * (1 + w * (1 - s) / 2), (w * s * h).sqrt()
