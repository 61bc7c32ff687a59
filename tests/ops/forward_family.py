"""The forward-process losses under test: deterministic batches, float64 truth, and the coefficients in closed form.

Closed form: loss_i = a <(v-u)^2> + b <(v-v_old)^2> + c <(v-v_ref)^2> + z <(v_old-u)^2> and the gradient
(2/D) [a (v-u) + b (v-v_old) + c (v-v_ref)], the coefficients held fixed (AWM's value is not of this form).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.testing.strategies import Batch
from tests.ops.helpers import draw_batch, value_and_grad

NAMES = ("diffusion_nft_loss", "awm_loss", "flow_awr_loss", "reward_weighted_loss")
ANCHOR = {"awm_loss": "v_ema", "reward_weighted_loss": None}  # every other loss has v_old

NATIVE = {name: getattr(af, name) for name in NAMES}
REFERENCE = {name: getattr(af.reference, name) for name in NAMES}

# One line for every path through the coefficients. "off_policy" is drawn as a log_prob_old around the policy's own.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("diffusion_nft_loss", {}),
    ("diffusion_nft_loss", {"beta": 0.1, "kl_weight": 0.5}),
    ("diffusion_nft_loss", {"adaptive": False, "beta": 2.0}),
    *[("diffusion_nft_loss", {"mode": mode}) for mode in ("positive", "negative", "one", "binary")],
    *[("awm_loss", {"weighting": weighting}) for weighting in ("uniform", "t", "t2", "huber", "ghuber")],
    ("awm_loss", {"off_policy": True, "clip": 0.2, "kl_weight": 0.5}),
    ("awm_loss", {"off_policy": True, "weighting": "uniform"}),
    ("flow_awr_loss", {"kl_weight": 0.5}),
    *[("flow_awr_loss", {"weighting": weighting}) for weighting in ("prediction", "velocity")],
    ("reward_weighted_loss", {}),
    ("reward_weighted_loss", {"method": "linear"}),
    ("reward_weighted_loss", {"method": "best", "group_size": 2}),
]
IDS = ["-".join([name.removesuffix("_loss"), *(f"{k}={v}" for k, v in options.items())]) for name, options in VARIANTS]


def draw(name: str, options: dict[str, Any], *args: Any, off_policy: bool = False, **kwargs: Any) -> Batch:
    """A batch for the loss ``name``; further arguments as in ``draw_batch``."""
    options = dict(options)
    off_policy = options.pop("off_policy", off_policy)
    batch = draw_batch(*args, **kwargs)
    anchor, wanted = batch.options.pop("v_old"), ANCHOR.get(name, "v_old")
    batch.options = {"v_ref": batch.options.pop("v_ref"), **options, **batch.options}
    if wanted:
        batch.options[wanted] = anchor
    if batch.options["v_ref"] is None and name in ("awm_loss", "flow_awr_loss"):
        batch.options.pop("kl_weight", None)  # refused without the policy it pulls to
    if name == "diffusion_nft_loss":
        batch.advantages.mul_(6)  # some beyond the clip
    if name == "reward_weighted_loss":
        batch.advantages.copy_(batch.advantages.abs().sort(descending=True).values)  # no negative weights
    if off_policy:
        weighting = {key: batch.options[key] for key in ("weighting", "power") if key in batch.options}
        spread = torch.linspace(-0.9, 0.9, len(batch.t), device=batch.t.device)
        batch.options["log_prob_old"] = af.awm_log_prob(*batch.arguments()[:4], **weighting).float() + spread
    return batch


def truth(name: str, batch: Batch) -> tuple[af.LossOutput, Tensor]:
    return value_and_grad(batch.to(torch.float64), REFERENCE[name])


class ClosedForm(NamedTuple):
    coef: Tensor  # [B, 4]: a, b, c, z
    value: Tensor  # [B]
    value_size: Tensor  # [B], the sum of the magnitudes of what is added up
    grad: Tensor
    grad_size: Tensor  # per element


def closed_form(name: str, batch: Batch) -> ClosedForm:
    batch = batch.to(torch.float64)
    v, x0, noise = (x.detach().flatten(1) for x in batch.arguments()[:3])
    options, t, A, u = batch.options, batch.t, batch.advantages, noise - x0
    zero = torch.zeros_like(v)

    def residual(left: Tensor | None, right: Tensor | None) -> Tensor:
        return zero if left is None or right is None else left.flatten(1) - right.flatten(1)

    def mean(x: Tensor) -> Tensor:
        return x.sum(1) / max(x.shape[1], 1)

    old, ref = options.get(ANCHOR.get(name, "v_old")), options["v_ref"]
    residuals = [residual(v, u), residual(v, old), residual(v, ref), residual(old, u)]
    squares = torch.stack([mean(r.square()) for r in residuals], 1)
    extra, amplification = torch.zeros_like(t), torch.ones_like(t)
    b: Tensor | float
    c: Tensor | float
    z: Tensor | float
    if name == "diffusion_nft_loss":
        a, b, z = nft_coefficients(t, A, residuals[1], residuals[3], options)
        c = options.get("kl_weight", 1e-4)
    elif name == "awm_loss":
        a, extra, amplification = awm_coefficients(t, A, squares[:, 0], options)
        b, c, z = options.get("ema_weight", 1.0), options.get("kl_weight", 0.0), 0.0
        b = 0.0 if old is None else b
    elif name == "flow_awr_loss":
        weighting = options.get("weighting", "adaptive")
        m = torch.ones_like(t) if weighting == "velocity" else t**2
        m = m / (t * mean(residuals[0].abs())).clamp(min=1e-5) if weighting == "adaptive" else m
        a, b, c, z = m * A, m * (1 - A), options.get("kl_weight", 0.0), -m * A * (1 - A)
    else:
        a, b, c, z = reward_weight(A, options), 0.0, options.get("kl_weight", 1.0), 0.0
    c = 0.0 if ref is None else c
    coef = torch.stack([x if isinstance(x, Tensor) else torch.full_like(t, x) for x in (a, b, c, z)], 1)

    terms = (coef * squares)[:, 1:] if name == "awm_loss" else coef * squares
    pulls = torch.stack([coef[:, k, None] * residuals[k] for k in range(3)]) * 2 / max(v.shape[1], 1)
    return ClosedForm(
        coef,
        terms.sum(1) + extra,
        (terms.abs().sum(1) + extra.abs()) * amplification,
        pulls.sum(0).view(batch.v.shape),
        (pulls.abs().sum(0) * amplification[:, None]).view(batch.v.shape),
    )


def nft_coefficients(t: Tensor, A: Tensor, vo: Tensor, ou: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    beta, clip = options.get("beta", 1.0), options.get("adv_clip_max", 5.0)
    A = A.clamp(-clip, clip)
    A = {
        "all": A,
        "positive": A.clamp(min=0),
        "negative": A.clamp(max=0),
        "one": (A > 0).double(),
        "binary": A.sign(),
    }[options.get("mode", "all")]
    r = (A / clip / 2 + 0.5).clamp(0, 1)
    plus, minus = r, 1 - r
    if options.get("adaptive", True):
        plus = plus / (t * (ou + beta * vo).abs().mean(1)).clamp(min=1e-5)
        minus = minus / (t * (ou - beta * vo).abs().mean(1)).clamp(min=1e-5)
    m, total, difference = clip * t**2, plus + minus, plus - minus
    return m * difference, m * (beta * total - difference), m * (total / beta - difference)


def awm_coefficients(t: Tensor, A: Tensor, L: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """a, the clipped objective, and how much larger the ratio's relative error is than the log-probability's."""
    q, k = options.get("power", 0.25), options.get("clip", 1.0)
    weighting = options.get("weighting", "ghuber")
    L = L.requires_grad_()
    lp = {
        "uniform": lambda: -L,
        "t": lambda: -t * L,
        "t2": lambda: -(t**2) * L,
        "huber": lambda: -t * ((L + 1e-10).sqrt() - 1e-5),
        "ghuber": lambda: -t / q * ((L + 1e-10) ** q - 1e-10**q),
    }[weighting]()
    (omega,) = torch.autograd.grad(-lp.sum(), L)
    lp, old = lp.detach(), options.get("log_prob_old")
    ratio = torch.ones_like(lp) if old is None else (lp - old).exp()
    active = ~(((A > 0) & (ratio > 1 + k)) | ((A < 0) & (ratio < 1 - k)))
    value = torch.maximum(-A * ratio, -A * ratio.clamp(1 - k, 1 + k))
    amplification = torch.ones_like(lp) if old is None else 1 + lp.abs() + old.abs()
    return A * omega * ratio * active, value, amplification


def reward_weight(R: Tensor, options: dict[str, Any]) -> Tensor:
    method = options.get("method", "exp")
    if method == "exp":
        return (options.get("tau", 0.5) * R).exp()
    if method == "linear":
        return R
    groups = R.view(-1, options["group_size"])
    return torch.stack([(group == max(group.tolist())).double() for group in groups]).flatten()


BOTH = {"native": NATIVE, "reference": REFERENCE}
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
both = pytest.mark.parametrize("losses", BOTH.values(), ids=BOTH)
