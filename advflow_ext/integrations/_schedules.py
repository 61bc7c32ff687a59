"""The tables of the schedules that trainers hand to their step functions as tensors."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from advflow_ext.contract.numbers import made_in_inference_mode
from advflow_ext.contract.step_table import StepTable

_KEPT = (
    64  # tables; a trainer has a schedule or two at a time, each with the noise levels of its window and of evaluation
)
_tables: OrderedDict[tuple[object, ...], tuple[Tensor, StepTable]] = OrderedDict()


def table_of(sigmas: Tensor, sampler: str, noise_level: float) -> StepTable:
    """The table of a schedule ``[T + 1]``, made once for each tensor and noise level.

    The first call on a tensor reads its values, which waits for the device they are on; later ones wait for nothing.
    """
    version = None if made_in_inference_mode(sigmas) else sigmas._version
    key = (id(sigmas), version, sampler, noise_level)
    if key not in _tables:
        # With the tensor, whose id would be another's once it is gone.
        _tables[key] = sigmas, StepTable(sigmas.detach(), sampler=sampler, noise_level=noise_level)
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key][1]
