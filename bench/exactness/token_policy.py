"""Memory, seconds and errors of the policy loss of tokens: ``python -m bench.exactness.token_policy --json FILE``.

Beside it the same loss with all logits at once, as the released trainer writes it; that a sequence at a time, its
gradients added up; both compiled; and, of the policy term alone, which is what it has, Liger-Kernel's where that is
installed. Forward and backward passes, gradients of hidden states and head among the memory. On a CPU seconds are those
of the processor on one thread, which other work on the machine lengthens little; errors are relative to float64, where
the plain formula goes through a sequence at a time. ``--device cuda --dtype bfloat16`` is a head as GPUs train it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.bench.harness import report
from advflow_ext.bench.harness.memory import peak_extra_bytes
from advflow_ext.testing import relative_error

TERMS = {"all": {"kl_weight": 3.0, "entropy_weight": 2.2e-3}, "policy": {"kl_weight": 0.0, "entropy_weight": 0.0}}
ROUNDS = 2
Step = Callable[[], list[Tensor]]  # the loss and its gradients


class Case:
    """Random sequences whose ratios are within and beyond the clip, and every way to their loss."""

    def __init__(
        self, shape: tuple[int, int, int], vocabulary: int, terms: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        sequences, tokens, width = shape
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device)

        self.hidden = normal(sequences, tokens, width).to(dtype)
        self.weight = (normal(vocabulary, width) / width**0.5).to(dtype)
        self.tokens = torch.randint(vocabulary, (sequences, tokens), generator=random).to(device)
        scored = af.token_log_prob(self.hidden, self.weight, self.tokens)
        self.old = scored + 0.15 * normal(sequences, 1) + 0.1 * normal(sequences, tokens)
        self.ref = scored + 0.1 * normal(sequences, tokens)
        self.advantages = (normal(sequences), 2 * normal(sequences))[: 2 if terms == "all" else 1]
        self.terms, self.weights = terms, TERMS[terms]

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return tuple(each.detach().to(dtype or each.dtype).requires_grad_() for each in (self.hidden, self.weight))  # type: ignore[return-value]

    def loss(self, hidden: Tensor, weight: Tensor, rows: slice = slice(None), space: Any = af) -> Tensor:
        """``advflow_ext``'s of some sequences, their share of the mean."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        out = space.token_policy_loss(
            hidden[rows], weight, self.tokens[rows], self.old[rows].to(dtype),
            tuple(A[rows].to(dtype) for A in self.advantages), log_prob_ref=self.ref[rows].to(dtype), **self.weights,
            reduction="sum",
        )  # fmt: skip
        total: Tensor = out.loss / len(self.tokens)
        return total

    def naive(self, hidden: Tensor, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        logits = (hidden[rows] @ weight.T).float()
        log_prob = logits.log_softmax(-1).gather(-1, self.tokens[rows][..., None])[..., 0].mean(1)
        ratio = (log_prob - self.old[rows].mean(1)).exp()
        terms = [torch.max(-ratio * A[rows], -ratio.clamp(0.8, 1.2) * A[rows]) for A in self.advantages]
        losses = torch.stack(terms).sum(0)
        if self.terms == "all":
            log_p = logits.log_softmax(-1)
            entropy = (-log_p.exp() * log_p).sum(-1).mean(1)
            delta = self.ref[rows].mean(1) - log_prob
            kl = delta.exp() - delta - 1
            losses = losses + self.weights["kl_weight"] * kl - self.weights["entropy_weight"] * entropy
        return losses.sum() / len(self.tokens)

    def liger(self, hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo", importance_sampling_level="sequence"
        )
        mask = torch.ones_like(self.tokens, dtype=torch.float32)
        found: Tensor = loss(hidden, weight, self.tokens, mask, self.advantages[0], old_per_token_logps=self.old)[0]
        return found

    def steps(self) -> Iterator[tuple[str, Step]]:
        compiled = torch.compile(self.naive, dynamic=False)
        rows = [slice(b, b + 1) for b in range(len(self.tokens))]
        yield "ours", lambda: together(self.loss, self.leaves())
        yield "all logits", lambda: together(self.naive, self.leaves())
        yield "all logits, compiled", lambda: together(compiled, self.leaves())
        yield "a sequence at a time", lambda: in_turn(self.naive, self.leaves(), rows)
        if self.terms == "policy" and importlib.util.find_spec("liger_kernel"):
            yield "Liger", lambda: together(self.liger, self.leaves())

    def truth(self) -> list[Tensor]:
        def loss(hidden: Tensor, weight: Tensor, rows: slice) -> Tensor:
            return self.loss(hidden, weight, rows, af.reference)

        return in_turn(loss, self.leaves(torch.float64), [slice(b, b + 1) for b in range(len(self.tokens))])


def together(loss: Callable[..., Tensor], leaves: tuple[Tensor, Tensor]) -> list[Tensor]:
    total = loss(*leaves)
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def in_turn(loss: Callable[..., Tensor], leaves: tuple[Tensor, Tensor], rows: list[slice]) -> list[Tensor]:
    """As gradient accumulation has it."""
    losses = []
    for each in rows:
        part = loss(*leaves, each)
        part.backward()
        losses.append(part.detach())
    return [torch.stack(losses).sum(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def measure(case: Case) -> Iterator[dict[str, Any]]:
    device, truth = case.hidden.device, case.truth()
    for name, step in case.steps():
        errors = [relative_error(ours, right) for ours, right in zip(step(), truth, strict=True)]
        peak = peak_extra_bytes(step, device)
        seconds = min(seconds_of(step, device) for _ in range(ROUNDS))
        batch, tokens, width = case.hidden.shape
        yield {
            "terms": case.terms, "implementation": name, "sequences": batch, "tokens": tokens, "width": width,
            "vocabulary": len(case.weight), "dtype": str(case.hidden.dtype).removeprefix("torch."),
            "peak_bytes": peak, "seconds": seconds, "error_of_loss": errors[0],
            "error_of_hidden": errors[1], "error_of_weight": errors[2],
        }  # fmt: skip


def seconds_of(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", default="16x256x1024", help="sequences x tokens x width")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sequences, tokens, width = map(int, arguments.shape.split("x"))
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    result: dict[str, Any] = {"environment": report.environment(device), "results": []}
    for terms in TERMS:
        for row in measure(Case((sequences, tokens, width), arguments.vocabulary, terms, device, dtype)):
            print(row, flush=True)
            result["results"].append(row)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
