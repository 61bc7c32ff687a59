"""What every reverse-process loss ends with: the native core's loss, its gradient and metrics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from advflow_ext.contract.numbers import Number
from advflow_ext.contract.outputs import TRANSITION_METRICS, LossMetrics, LossOutput
from advflow_ext.contract.transitions import TIME_WEIGHTS, TransitionArguments
from advflow_ext.kernels.loss import reverse_loss

RATIOS = ("flow_grpo", "flow_cps", "grpo_guard")  # of csrc/math/flow_grpo.h


def reverse_output(
    name: str,
    latents: tuple[Tensor, Tensor, Tensor, Tensor | None],  # v, eps, v_old, v_ref
    given: TransitionArguments,
    numbers: Sequence[Number],  # after kl_weight and policy_weight
    choices: Sequence[int],  # after time_weight
    reduction: str,
) -> LossOutput:
    steps = given.table.padded(given.step_index, given.dtype)
    loss, metrics = reverse_loss(
        name, latents, given.step_index, steps, given.advantages, (given.kl_weight, given.policy_weight, *numbers),
        (TIME_WEIGHTS.index(given.time_weight), *choices), reduction,
    )  # fmt: skip
    return LossOutput(loss, LossMetrics(metrics, TRANSITION_METRICS))
