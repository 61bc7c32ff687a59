"""Plain PyTorch statements of every op: the fallback where nothing is compiled, the oracle, the bench baseline."""

from advflow_ext.reference.advantage_flow import advantage_flow_loss

__all__ = ["advantage_flow_loss"]
