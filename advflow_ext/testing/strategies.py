"""Hypothesis strategies for training batches: any rank, shape, layout and mixture of dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from advflow_ext.reference import awm_log_prob
from advflow_ext.testing.layouts import LAYOUTS, arrange

HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)

# One element, odd sizes, the lane (16), tile (512) and chunk (4096) of the CPU kernels and their neighbours.
SAMPLE_SIZES = (1, 2, 7, 15, 16, 17, 33, 511, 512, 513, 1031, 4095, 4096, 4097, 12291)


@dataclass
class Batch:
    """Arguments of a forward-process loss; ``v`` is a leaf that requires a gradient."""

    v: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    advantages: Tensor  # the rewards of a reward-weighted loss
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[Tensor, ...]:
        return self.v, self.x0, self.noise, self.t, self.advantages

    def to(self, dtype: torch.dtype) -> Batch:
        """The same rounded numbers in another dtype, as a new leaf."""

        def convert(value: Any) -> Any:
            return value.detach().to(dtype) if isinstance(value, Tensor) else value

        options = {name: convert(value) for name, value in self.options.items()}
        v, x0, noise, t, advantages = (convert(value) for value in self.arguments())
        return Batch(v.requires_grad_(), x0, noise, t, advantages, options)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """[B, ...] of rank 2 to 5: either a deliberate sample size, or small dimensions of any rank."""
    batch = st.integers(1, 5)
    flat = st.tuples(batch, st.sampled_from(SAMPLE_SIZES))
    ranks = [st.tuples(batch, *[st.integers(1, 9)] * rank) for rank in (2, 3, 4)]
    return st.one_of(flat, *ranks)


@st.composite
def batches(
    draw: st.DrawFn,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = HALVES_AND_FLOAT,
    loss: str = "advantage_flow_loss",
) -> Batch:
    """Arguments of any forward-process loss, all of its options drawn."""
    shape = draw(shapes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def latent() -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return arrange(values.to(device, draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS)))

    def per_sample(low: float, high: float) -> Tensor:
        uniform = torch.rand(shape[0], generator=generator, dtype=torch.float64)
        # float32 first: the truth must see the same numbers.
        return (low + (high - low) * uniform).float().to(device)

    def choice(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    v, x0, noise, t = latent().detach().requires_grad_(), latent(), latent(), per_sample(0.01, 1.0)
    options: dict[str, Any] = {"v_ref": latent() if choice(True, False) else None}
    advantages = per_sample(-1.0, 1.0)
    if loss == "advantage_flow_loss":
        gamma = choice("number", "tensor", "1-A", "beta(beta-A)")
        options |= {
            "v_old": latent(),
            "gamma": {"number": 1.1, "tensor": per_sample(1.01, 2.0)}.get(gamma, gamma),
            "lam": choice(0.0, 1e-3, 0.7),
            "beta": choice(1.0, 0.1),
            "weighting": choice("prediction", "velocity", "adaptive"),
        }
    elif loss == "diffusion_nft_loss":
        advantages = per_sample(-7.0, 7.0)
        options |= {
            "v_old": latent(),
            "beta": choice(1.0, 0.1, 2.0),
            "adv_clip_max": choice(5.0, 1.0, 0.5),
            "kl_weight": choice(0.0, 1e-4, 0.7),
            "adaptive": choice(True, False),
            "mode": choice("all", "positive", "negative", "one", "binary"),
        }
    elif loss == "awm_loss":
        weighting = {"weighting": choice("uniform", "t", "t2", "huber", "ghuber"), "power": choice(0.25, 0.7)}
        off_policy = awm_log_prob(v, x0, noise, t, **weighting) + per_sample(-1.0, 1.0)
        options |= {
            "v_ema": choice(None, latent()),
            "log_prob_old": choice(None, off_policy),
            "clip": choice(1.0, 0.2, 2.0),
            "ema_weight": choice(0.0, 1.0),
            "kl_weight": choice(0.0, 0.7) if options["v_ref"] is not None else 0.0,
            **weighting,
        }
    elif loss == "flow_awr_loss":
        advantages = per_sample(-1.0, 7.0)
        options |= {
            "v_old": latent(),
            "kl_weight": choice(0.0, 0.7) if options["v_ref"] is not None else 0.0,
            "weighting": choice("adaptive", "prediction", "velocity"),
        }
    else:
        method = choice("exp", "linear", "best") if shape[0] > 1 else choice("exp", "linear")
        options |= {
            "method": method,
            "tau": choice(0.5, 2.0),
            "group_size": shape[0] if method == "best" else None,
            "kl_weight": choice(1.0, 0.0),
        }
    return Batch(v, x0, noise, t, advantages, options | {"reduction": choice("mean", "sum", "none")})
