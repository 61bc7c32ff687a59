"""Exact, fused losses for reinforcement learning of rectified-flow models. Needs torch alone."""

from importlib.metadata import PackageNotFoundError, version

from advflow_ext import reference
from advflow_ext.ops._outputs import LossMetrics, LossOutput
from advflow_ext.ops.advantage_flow import advantage_flow_loss
from advflow_ext.ops.advantages import group_advantages

try:
    __version__ = version("advflow-ext")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"

__all__ = ["LossMetrics", "LossOutput", "advantage_flow_loss", "group_advantages", "reference"]
