"""``python -m advflow_ext.conformance``: which call here computes what a public trainer computes, and whether it does.

Each trainer's formula is written the way that trainer computes it (means of the next x, log-probabilities with their
constants, x0-predictions), in float64, from its public code at the commit named or from its paper. It shares the random
inputs with the call beside it and nothing else. Where a trainer departs from its own paper or sampler, the row says
how, and which option gives its number if one does. The losses keep the trainers' casts, which change nothing
in float64: the bench times them as its "public" rows.
"""

from __future__ import annotations

from advflow_ext.conformance.ada_grpo import ada_grpo
from advflow_ext.conformance.advantage_flow import advantage_flow
from advflow_ext.conformance.awm import awm
from advflow_ext.conformance.dance_grpo import dance_grpo
from advflow_ext.conformance.diffusion_nft import diffusion_nft
from advflow_ext.conformance.flow_awr import flow_awr
from advflow_ext.conformance.flow_cps import flow_cps
from advflow_ext.conformance.flow_dppo import flow_dppo_paper
from advflow_ext.conformance.flow_factory import flow_factory
from advflow_ext.conformance.flow_grpo import flow_grpo
from advflow_ext.conformance.grpo_guard import grpo_guard
from advflow_ext.conformance.loo_fid import loo_fid
from advflow_ext.conformance.mix_grpo import mix_grpo
from advflow_ext.conformance.orw_cfm import orw_cfm
from advflow_ext.conformance.rows import Inputs, Row
from advflow_ext.conformance.unirl import earlier_unirl_flow_dppo, unirl_flow_dppo
from advflow_ext.conformance.verl_omni import verl_omni

TRAINERS = (
    flow_grpo, flow_cps, dance_grpo, mix_grpo, grpo_guard, flow_factory, unirl_flow_dppo,
    earlier_unirl_flow_dppo, flow_dppo_paper, verl_omni,
    diffusion_nft, awm, flow_awr, ada_grpo, orw_cfm, advantage_flow,
    loo_fid,
)  # fmt: skip


def rows(seed: int = 0) -> list[Row]:
    inputs = Inputs(seed)
    return [row for trainer in TRAINERS for row in trainer(inputs)]
