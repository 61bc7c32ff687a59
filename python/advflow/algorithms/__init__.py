"""Policy-improvement methods: one small file each, which turns a batch into a loss.

A method of the forward process learns from (t, noise) pairs put on the images of a rollout, one of the reverse process
from the sampler steps that made them, one of tokens from how likely those were. Each is a class, made with its own
section of the settings; the list of them is `advflow.settings.registry.METHODS`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Protocol

import torch

import advflow_ext as af
from advflow.algorithms.batch import ForwardBatch, Needs, ReverseBatch, TokenBatch
from advflow.algorithms.trust_region import Bound
from advflow.autoregressive.token_model import Hidden
from advflow.settings.registry import METHODS


class ForwardAlgorithm(Protocol):
    needs: Needs

    def loss(self, batch: ForwardBatch) -> af.LossOutput: ...


class ReverseAlgorithm(Protocol):
    needs: Needs
    bound: Bound

    def loss(self, batch: ReverseBatch) -> af.LossOutput: ...


class TokenAlgorithm(Protocol):
    needs: Needs

    def loss(self, batch: TokenBatch) -> af.LossOutput: ...


def make_algorithm(name: str, settings: object) -> Any:
    """The method called `name`, an algorithm of its process, with its own section of the settings."""
    return METHODS.make(name, settings)


def check_settings(name: str, settings: Any, group_size: int) -> None:
    """Lets the method's own op meet its settings, on a group of images of four elements, before anything exists.

    Raises ValueError with what the op has to say, its option by its place in the configuration.
    """
    try:
        _loss_of_ones(name, settings, group_size)
    except ValueError as error:
        options = {field.name for field in fields(settings)} if settings is not None else set()
        text = str(error).replace(", or such a tensor of shape [] or [B]", "")  # which no configuration holds
        named = text.split(" ")[0] in options
        raise ValueError(f"{METHODS.section_of(name)}.{text}" if named else f"{name}: {text}") from error


def require_proportional(name: str, settings: object) -> None:
    """Lets a method of the reverse process meet a ratio of 1 with two advantages, before anything exists.

    Raises ValueError where its gradients are not in their proportion.
    """
    table, index = af.StepTable([0.9, 0.6, 0.3, 0.0]), torch.ones(1, dtype=torch.int64)
    v_old, eps, v_ref = torch.tensor([[[0.5, -1.0, 2.0]], [[1.0, 1.5, -0.5]], [[-0.5, 0.25, 1.0]]])
    gradients = []
    for advantage in (1.0, -2.0):
        v = v_old.clone().requires_grad_()
        batch = ReverseBatch(v, v_old, v_ref, eps, table, index, torch.tensor([advantage]))
        gradients += torch.autograd.grad(make_algorithm(name, settings).loss(batch).loss, v)
    if not torch.allclose(gradients[1], -2 * gradients[0], rtol=1e-4, atol=1e-7):
        raise ValueError(
            f"sde.reweight is True; accepted is False with {METHODS.section_of(name)} as it is set: where the ratio is "
            "1 its gradient is not in proportion to the advantage, as with a kl_weight above 0"
        )


def _loss_of_ones(name: str, settings: object, count: int) -> None:
    algorithm = make_algorithm(name, settings)
    latent, ones = torch.ones(count, 4), torch.ones(count)
    if METHODS[name].process == "tokens":
        policy = Hidden(torch.ones(count, 1, 4), torch.ones(2, 4))
        tokens = torch.zeros(count, 1, dtype=torch.int64)
        reference = policy if algorithm.needs.reference else None
        algorithm.loss(TokenBatch(policy, reference, tokens, tokens.float(), (ones,), entropy_weight=0.0))
        return
    v = latent.clone().requires_grad_()
    v_ref = latent if algorithm.needs.reference else None
    if METHODS[name].process == "forward":
        algorithm.loss(ForwardBatch(v, latent, v_ref, latent, latent, ones, ones, ones, count, reference_scale=1.0))
    else:
        table, index = af.StepTable([0.9, 0.6, 0.3, 0.0]), torch.ones(count, dtype=torch.int64)
        algorithm.loss(ReverseBatch(v, latent, v_ref, latent, table, index, ones))
