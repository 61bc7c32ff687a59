"""Every public loss as a :class:`torch.nn.Module`: options when it is made, tensors when it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, cast

from torch import nn

from advflow_ext.contract.outputs import LossOutput
from advflow_ext.ops.advantage_flow import advantage_flow_loss
from advflow_ext.ops.awm import awm_loss
from advflow_ext.ops.diffusion_nft import diffusion_nft_loss
from advflow_ext.ops.distillation import distillation_loss
from advflow_ext.ops.flow_awr import flow_awr_loss
from advflow_ext.ops.flow_cps import flow_cps_loss
from advflow_ext.ops.flow_dppo import flow_dppo_loss
from advflow_ext.ops.flow_grpo import flow_grpo_loss
from advflow_ext.ops.grpo_guard import grpo_guard_loss
from advflow_ext.ops.reward_weighted import reward_weighted_loss
from advflow_ext.ops.token_policy import token_policy_loss

P = ParamSpec("P")


class LossModule(nn.Module, Generic[P]):
    """What the losses of this file have in common. ``P``: the parameters of the loss, which a call takes."""

    loss: ClassVar[Callable[..., LossOutput]]
    options: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        accepted = inspect.signature(type(self)).parameters
        for name in options:
            if name not in accepted:
                raise ValueError(
                    f"{name} is no option of {type(self).__name__}; accepted are {', '.join(accepted)}, and what else "
                    f"{self.loss.__name__} takes when the module is called."
                )
        self.options = options

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> LossOutput:
        return self.loss(*args, **{**self.options, **kwargs})

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _module(name: str, loss: Callable[P, LossOutput]) -> type[LossModule[P]]:
    """The class called ``name``, whose constructor takes what of the loss is neither a tensor nor a table."""
    of_call = ("Tensor", "Tensor | None")
    options = [
        parameter
        for parameter in inspect.signature(loss).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.annotation not in of_call
    ]
    members = {
        "loss": staticmethod(loss),
        "__doc__": f":func:`advflow_ext.{loss.__name__}` with its options fixed; the call takes its tensors.",
        "__module__": __name__,
        "__signature__": inspect.Signature(options),
    }
    return cast(type[LossModule[P]], type(name, (LossModule,), members))


AdvantageFlowLoss = _module("AdvantageFlowLoss", advantage_flow_loss)
AWMLoss = _module("AWMLoss", awm_loss)
DiffusionNFTLoss = _module("DiffusionNFTLoss", diffusion_nft_loss)
DistillationLoss = _module("DistillationLoss", distillation_loss)
FlowAWRLoss = _module("FlowAWRLoss", flow_awr_loss)
FlowCPSLoss = _module("FlowCPSLoss", flow_cps_loss)
FlowDPPOLoss = _module("FlowDPPOLoss", flow_dppo_loss)
FlowGRPOLoss = _module("FlowGRPOLoss", flow_grpo_loss)
GRPOGuardLoss = _module("GRPOGuardLoss", grpo_guard_loss)
RewardWeightedLoss = _module("RewardWeightedLoss", reward_weighted_loss)
TokenPolicyLoss = _module("TokenPolicyLoss", token_policy_loss)
