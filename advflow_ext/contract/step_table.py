"""The coefficients of every sampler step of a rectified-flow model, fixed once in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from advflow_ext.contract.checks import require_choice
from advflow_ext.contract.numbers import require_number

SAMPLERS = ("flow_sde", "dance_sde", "cps", "ode", "flash_sde")
CONVENTIONS = ("next_sigma", "clamp_0.99")

# Schedulers hold 1 and 0 only up to this: float32 makes 0.99999988 or 1.0000001 of 1, and diffusers' UniPC takes 1e-6
# off, which float32 makes 1.013e-6.
_ROUNDING = 1e-6 + 2**-24
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
            values = _checked_sigmas(sigmas)
            ends = (values[1], float(values[-1]))
            self._set_steps(values[:-1], values[1:], sampler, noise_level, *ends, convention, stochastic_steps)
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
        sigma_min=sigmas[-1], ...)``. The values are read here, which waits for the device they are on.

        Arguments:
            s, s_end: ``[T]`` numbers, where each step begins and ends: 0 <= s_end < s <= 1, either up to 1e-6. With one
                step a sample the index of a loss is ``torch.arange(T)``.
            noise_level: one number of at least 0, or ``[T]``; a step of level 0 is an Euler step.
            sigma_1: the second sigma of the schedule that the steps are taken from, or ``[T]`` of them: what Flow-SDE
                takes for s at s = 1, and where Flash-SDE's std ends. None where no stochastic step needs it.
            sigma_min: the last sigma of that schedule, for Flash-SDE.

        The others, attributes and errors as in :class:`StepTable`, without the attribute ``sigmas``.
        """
        table = cls.__new__(cls)
        with _real_tensors():
            start, end = _checked_steps(s, s_end)
            require_number("sigma_min", sigma_min, low=0.0)
            second = None if sigma_1 is None else _per_step("sigma_1", sigma_1, len(start), below=1.0)
            table._set_steps(start, end, sampler, noise_level, second, float(sigma_min), convention, stochastic_steps)
        return table

    def _set_steps(
        self,
        s: Tensor,
        s_end: Tensor,
        sampler: str,
        noise_level: float | Sequence[float] | Tensor,
        sigma_1: Tensor | None,
        sigma_min: float,
        convention: str,
        stochastic_steps: Sequence[int] | None,
    ) -> None:
        require_choice("sampler", sampler, SAMPLERS)
        require_choice("convention", convention, CONVENTIONS)
        self.sampler, self.steps, self.s, self.s_end = sampler, len(s), s, s_end
        level = _checked_level(sampler, noise_level, self.steps)
        self.noise_level = level if level.unique().numel() > 1 else float(level[0])
        window = _checked_window(stochastic_steps, self.steps)
        if sigma_1 is None:
            _require_no_sigma_1(sampler, convention, window & (level > 0), s)
            sigma_1 = torch.zeros_like(s)

        level = level.clamp(max=_LARGEST)
        self._repeats = s.unique().numel() < self.steps
        self.dt = s_end - s
        h = -self.dt
        if sampler == "cps":
            theta = [value * math.pi / 2 for value in level.tolist()]
            noise_kept = s_end * _doubles([math.cos(angle) for angle in theta])
            c_x, c_v = 1 - s_end + noise_kept, -s * (1 - s_end) + (1 - s) * noise_kept
            sigma = s_end * _doubles([math.sin(angle) for angle in theta])
        elif sampler == "ode":
            c_x, c_v, sigma = torch.ones_like(s), -h, torch.zeros_like(s)
        else:
            if sampler == "flash_sde":
                level = level * (sigma_min + (sigma_1 - sigma_min) * s)
            if sampler != "flow_sde":
                denominator = s
            elif convention == "clamp_0.99":
                denominator = 1 - s.clamp(max=0.99)
            else:
                denominator = 1 - torch.where(s == 1, sigma_1, s)
            w = _doubles([value**2 for value in level.tolist()]) * denominator.reciprocal()
            c_x, c_v, sigma = 1 - w * h / 2, -h * (1 + w * (1 - s) / 2), (w * s * h).sqrt()

        random = window & (sigma > 0)
        self.c_x = torch.where(random, c_x, 1)
        self.c_v = torch.where(random, c_v, -h)
        self.sigma = torch.where(random, sigma, 0)
        self.kappa = self.c_v / self.sigma
        self.stochastic_steps: tuple[int, ...] = tuple(random.nonzero().flatten().tolist())
        self._require_carried_noise(convention)

        columns = torch.stack([self.c_x, self.c_v, self.sigma, self.kappa, self.dt], 1)
        # The outer rows answer for every step that is not in the table: nothing computed from them can pass for a
        # number.
        outside = torch.full_like(columns[:1], torch.nan)
        self._rows = torch.cat([outside, columns, outside])
        cpu = self._rows.device
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {
            ("_rows", cpu, dtype): self._rows.to(dtype) for dtype in (torch.float32, torch.float64)
        }

    def _require_carried_noise(self, convention: str) -> None:
        given = torch.as_tensor(self.noise_level, dtype=torch.float64, device="cpu").expand(self.steps)
        level, flow = given.clamp(max=_LARGEST), self.sampler == "flow_sde"
        carried = self.c_x
        if flow and convention == "clamp_0.99":
            carried = torch.where((self.s == 1) & (self.sigma > 0), 1 - level**2 / 2, carried)
        # sqrt(2) as a level makes its c_x 0 but for rounding.
        if not (wrong := carried < -1e-9).any():
            return
        steps = wrong.nonzero().flatten()
        step = int(steps[0])
        s, s_end, sigma, c_x = (float(x[step]) for x in (self.s, self.s_end, self.sigma, self.c_x))
        limit = float((level / (1 - carried).sqrt())[wrong].min())
        near_1 = flow and convention == "next_sigma" and 0.99 < s < 1
        clamp = near_1 and len(steps) == 1 and level[step] ** 2 * (s - s_end) < 0.02  # 0.01 for 1 - s is enough
        remedy = "convention 'clamp_0.99', " if clamp else ""
        raise ValueError(
            f"noise_level is {float(given[step])!r}, which gives step {step}, from s = {s!r} to {s_end!r}, a sigma of "
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
        if self._repeats:
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


def _doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _numbers(name: str, value: object, accepted: str) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} is {value!r}; accepted are {accepted}.") from error
    if isinstance(numbers, FakeTensor):
        raise ValueError(f"{name} is {value!r}, which holds no numbers; accepted are {accepted}.")
    return numbers


def _checked_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    values = _numbers("sigmas", sigmas, "[T + 1] numbers")
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"sigmas has shape {list(values.shape)}; accepted are [T + 1] numbers, T of at least 1.")
    given = values.tolist()
    values[:1], values[-1:] = _one_up_to_rounding(values[:1]), _zero_up_to_rounding(values[-1:])
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


def _checked_steps(s: Sequence[float] | Tensor, s_end: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    start, end = (_numbers(name, value, "[T] numbers") for name, value in (("s", s), ("s_end", s_end)))
    if start.dim() != 1 or not len(start):
        raise ValueError(f"s has shape {list(start.shape)}; accepted are [T] numbers, T of at least 1.")
    if end.shape != start.shape:
        raise ValueError(f"s_end has shape {list(end.shape)}; accepted is that of s, {list(start.shape)}.")
    given = start, end
    start, end = _one_up_to_rounding(start), _zero_up_to_rounding(end)
    if (wrong := ~((end >= 0) & (end < start) & (start <= 1))).any():
        step = int(wrong.nonzero()[0])
        raise ValueError(
            f"s[{step}] is {float(given[0][step])!r} and s_end[{step}] is {float(given[1][step])!r}; accepted are "
            "0 <= s_end < s <= 1."
        )
    return start, end


def _one_up_to_rounding(s: Tensor) -> Tensor:
    return torch.where((s - 1).abs() <= _ROUNDING, 1, s)


def _zero_up_to_rounding(s: Tensor) -> Tensor:
    return torch.where(s.abs() <= _ROUNDING, 0, s)


def _per_step(name: str, value: float | Sequence[float] | Tensor, steps: int, *, below: float = math.inf) -> Tensor:
    if not hasattr(value, "__len__"):
        require_number(name, value, low=0.0)
    numbers = _numbers(name, value, f"a number and [{steps}] numbers")
    if numbers.shape not in ((), (steps,)):
        raise ValueError(f"{name} has shape {list(numbers.shape)}; accepted are a number and [{steps}] numbers.")
    numbers = numbers.expand(steps).clone()
    if (wrong := ~((numbers >= 0) & (numbers < below))).any():
        step = int(wrong.nonzero()[0])
        bound = "finite numbers of at least 0" if below == math.inf else f"numbers of at least 0 and below {below:g}"
        raise ValueError(f"{name}[{step}] is {float(numbers[step])!r}; accepted are {bound}.")
    return numbers


def _checked_level(sampler: str, noise_level: float | Sequence[float] | Tensor, steps: int) -> Tensor:
    level = _per_step("noise_level", noise_level, steps)
    if sampler == "cps" and (wrong := level > 1).any():
        first = float(level[wrong][0])
        raise ValueError(f"noise_level is {first!r}; accepted for sampler 'cps' is a number within [0, 1].")
    return level


def _require_no_sigma_1(sampler: str, convention: str, stochastic: Tensor, s: Tensor) -> None:
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
