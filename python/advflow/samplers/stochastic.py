"""The steps of the reverse process: which coefficients, and so which noise, each of a schedule's steps has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import advflow_ext as af


class Steps(Protocol):
    def __call__(self, sigmas: Sequence[float], noise_level: float, stochastic_steps: Sequence[int]) -> af.StepTable:
        """The steps between `sigmas`, those numbered in `stochastic_steps` with noise, the others Euler's."""
        ...


class FlowSDE:
    def __call__(self, sigmas: Sequence[float], noise_level: float, stochastic_steps: Sequence[int]) -> af.StepTable:
        return af.StepTable(sigmas, sampler="flow_sde", noise_level=noise_level, stochastic_steps=stochastic_steps)


class DanceSDE:
    def __call__(self, sigmas: Sequence[float], noise_level: float, stochastic_steps: Sequence[int]) -> af.StepTable:
        return af.StepTable(sigmas, sampler="dance_sde", noise_level=noise_level, stochastic_steps=stochastic_steps)


class CPS:
    def __call__(self, sigmas: Sequence[float], noise_level: float, stochastic_steps: Sequence[int]) -> af.StepTable:
        return af.StepTable(sigmas, sampler="cps", noise_level=noise_level, stochastic_steps=stochastic_steps)
