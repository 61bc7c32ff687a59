"""The number options of an op, each a Python number, a 0-dim tensor or one value a sample, checked and ready to use."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Number = float | Tensor


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether reading a value of ``tensor`` costs nothing and is possible.

    On another device the step would wait for it; while a graph is traced, or under a torch.func transform, there is
    none to read. There the same facts are counted in the metrics.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return (
        not is_fake(tensor) and get_proxy_mode() is None and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def made_in_inference_mode(tensor: Tensor | None) -> bool:
    """Autograd refuses to keep such a tensor. Dynamo knows no such question."""
    return tensor is not None and not torch.compiler.is_compiling() and tensor.is_inference()


def constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A few numbers a sample in ``dtype``, without gradient, as autograd can keep them."""
    tensor = tensor.detach().to(dtype)
    return tensor.clone() if made_in_inference_mode(tensor) else tensor


def is_number(value: object, dtype: torch.dtype = torch.float64) -> bool:
    """Whether ``value`` is a finite Python number of ``dtype``.

    By comparisons alone: a number that changes between calls of a compiled function is symbolic and knows no isfinite.
    """
    most = torch.finfo(dtype).max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -most <= value <= most


def require_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    exclusive: bool = False,
    dtype: torch.dtype = torch.float64,
    or_else: str = "",
) -> None:
    """Refuses what is not a number of ``dtype`` from ``low`` (itself not if ``exclusive``) to below ``high``."""
    if not is_number(value, dtype) or value < low or (exclusive and value == low):  # type: ignore[operator]
        kind = "finite number"
    elif value >= high:  # type: ignore[operator]
        kind = "number"
    else:
        return
    raise ValueError(f"{name} is {value!r}; accepted is a {kind}{_bounds(low, high, exclusive)}{or_else}.")


def _bounds(low: float, high: float, exclusive: bool) -> str:
    floor = "" if low == -math.inf else f" {'above' if exclusive else 'of at least'} {low:g}"
    ceiling = "" if high == math.inf else f"{' and' if floor else ''} below {high:g}"
    return floor + ceiling


class Numbers:
    """Reads the number options of one call on samples ``v``, whose sums are kept in ``dtype``.

    A Python number stays one, but becomes a 0-dim tensor under torch.compile, where a number that changes from call to
    call would otherwise compile the caller anew each time. A tensor ``[B]`` holds one value a sample.

    What is out of range is refused where it can be read. Where it cannot (:func:`values_are_at_hand`), and for a value
    of one sample that is not finite, :meth:`contain` drops the samples concerned.
    """

    def __init__(self, v: Tensor, dtype: torch.dtype, *, per_sample: bool = True, name: str = "v") -> None:
        self._v = v
        self._name = name
        self._per_sample = per_sample
        self._dtype = dtype
        self._most = torch.finfo(dtype).max
        self._unread: list[tuple[Tensor, float, float, bool]] = []  # with the bounds nobody has held them against

    def read(
        self,
        name: str,
        value: object,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        exclusive: bool = False,
    ) -> Number:
        if isinstance(value, Tensor):
            return self._tensor(name, value, low, high, exclusive)
        # By far the most calls; what follows says the same, with sentences and for a compiler.
        if (
            type(value) is float
            and not torch.compiler.is_compiling()
            and low <= value < high
            and -self._most <= value <= self._most
            and not (exclusive and value == low)
        ):
            return value
        or_else = f", or such a tensor of shape []{' or [B]' if self._per_sample else ''}"
        require_number(name, value, low=low, high=high, exclusive=exclusive, dtype=self._dtype, or_else=or_else)
        assert isinstance(value, (int, float))
        if torch.compiler.is_compiling():
            # An addition, because torch.full would keep the number itself in the graph.
            return torch.zeros((), dtype=torch.float64, device=self._v.device) + value
        return float(value)

    def weight_of(self, name: str, value: object, anchor: str, tensor: Tensor | None, *, default: float) -> Number:
        """The weight, at least 0, of a term that exists where its ``tensor`` is given; 0 without it.

        Without it, nothing but the default may be asked for.
        """
        weight = self.read(name, value, low=0.0)
        if tensor is not None:
            return weight
        if isinstance(value, Tensor) or (default == 0 and value != default):
            given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} is {given} without {anchor}; accepted are 0, or {anchor} beside it.")
        return 0.0

    def clip(self, name: str, value: object, *, most: float = math.inf, exclusive: bool = False) -> ClipRange:
        """How far a ratio may go below and above 1: one number for both sides, or a pair."""
        if isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ValueError(f"{name} is {value!r}; accepted are a number and a pair (below 1, above 1).")
            below = self.read(f"{name}[0]", value[0], low=0.0, high=most, exclusive=exclusive)
            return ClipRange(below, self.read(f"{name}[1]", value[1], low=0.0, exclusive=exclusive))
        both = self.read(name, value, low=0.0, high=most, exclusive=exclusive)
        return ClipRange(both, both)

    def contain(self, scores: Tensor) -> Tensor:
        """``scores`` ``[B]``, NaN for the samples that a number just read leaves without a meaning."""
        for number, low, high, exclusive in self._unread:
            scores = torch.where(self._in_range(number, low, high, exclusive), scores, torch.nan)
        return scores

    def _tensor(self, name: str, value: Tensor, low: float, high: float, exclusive: bool) -> Number:
        v, single = self._v, value.dim() == 0
        bounds = _bounds(low, high, exclusive)
        if not value.is_floating_point():
            raise ValueError(
                f"{name} has dtype {value.dtype}; accepted are a number{bounds} and a floating-point tensor."
            )
        if not single and not (self._per_sample and value.shape == v.shape[:1]):
            shapes = f"[] or [{v.shape[0]}], one value a sample" if self._per_sample else "[]"
            raise ValueError(
                f"{name} has shape {list(value.shape)}; accepted are a number{bounds} and a tensor of shape {shapes}."
            )
        if value.device != v.device and not (single and value.device.type == "cpu"):
            raise ValueError(f"{name} is on {value.device}; accepted is the device of {self._name}, {v.device}.")
        number = constant(value, torch.float64 if single else self._dtype)
        if values_are_at_hand(value):
            wrong = ~self._in_range(number, low, high, exclusive)
            if not single:
                wrong &= number.isfinite()
            if wrong.any():
                place = "" if single else f"[{int(wrong.nonzero()[0])}]"
                raise ValueError(f"{name}{place} is {value[wrong][0].item():.6g}; accepted is a finite number{bounds}.")
            if single:
                return number
        self._unread.append((number, low, high, exclusive))
        return number

    def _in_range(self, number: Tensor, low: float, high: float, exclusive: bool) -> Tensor:
        finite = number.abs() <= self._most
        return finite & (number > low if exclusive else number >= low) & (number < high)


class ClipRange:
    """The range 1 - below .. 1 + above of a ratio, and its logarithms, where float32 still tells 2e-6 from 0."""

    def __init__(self, below: Number, above: Number) -> None:
        self.below = below
        self.above = above

    @property
    def log_lowest(self) -> Number:
        if isinstance(self.below, Tensor):
            return torch.log1p(-self.below.clamp(max=1))
        return math.log1p(-self.below) if self.below < 1 else -math.inf

    @property
    def log_highest(self) -> Number:
        return log1p(self.above)


def log1p(number: Number) -> Number:
    return number.log1p() if isinstance(number, Tensor) else math.log1p(number)


def per_sample(number: Number, like: Tensor) -> Tensor:
    """One value a sample, shaped as ``like`` ``[B]`` and in its dtype."""
    if isinstance(number, Tensor):
        return number.to(like.dtype).expand_as(like)
    return torch.full_like(like, number)
