"""The processes that train one model together, each with its share of every batch; mostly there is one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from advflow.core.sharding import is_sharded

_BUCKET_BYTES = 32 * 2**20


class Ranks:
    """One process of a run alone. Whatever all of several processes call, they call in the same order.

    `rank` of `size`; `first` is the one that writes; `local` numbers the processes of one machine. Where each holds a
    part of every weight, they are `sharded`, and a forward pass too is something that all call.
    """

    rank = local = 0
    size = 1
    sharded = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's of `count` things in a row; the shares differ by at most one in length."""
        return self._share_of(self.rank, count)

    def in_step(self, count: int) -> list[slice]:
        """The shares of those processes that make as many forward passes as this one: of all, or its own alone."""
        ranks = range(self.size) if self.sharded else [self.rank]
        return [self._share_of(rank, count) for rank in ranks]

    def _share_of(self, rank: int, count: int) -> slice:
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def everyone(self, value: Any) -> list[Any]:
        """What each process gives, in their order; anything that JSON holds."""
        return [value]

    def any(self, here: bool) -> bool:
        """Whether it is so in some process."""
        return any(self.everyone(here))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in their order: [sum of N, ...] of their [N, ...]."""
        return rows

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Makes every process's gradients the sum of all processes', which those of sharded parameters are already."""

    def wait(self) -> None:
        """Returns when all processes are here."""

    def close(self) -> None:
        """Ends what connects the processes."""


class SeveralRanks(Ranks):
    """One of the processes that torchrun or `accelerate launch` has started."""

    def __init__(self, rank: int, size: int, local: int, *, cuda: bool, sharded: bool) -> None:
        self.rank, self.size, self.local, self.sharded = rank, size, local, sharded
        if cuda:
            torch.cuda.set_device(local)
        # Small numbers travel between CPUs, gradients between GPUs.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=size)

    def everyone(self, value: Any) -> list[Any]:
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._gathered(torch.tensor([len(text)]))
        texts = self._padded(text, max(int(length) for length in lengths))
        return [json.loads(bytes(each[: int(n)].tolist())) for each, n in zip(texts, lengths, strict=True)]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        counts = self.everyone(len(rows))
        parts = self._padded(rows.contiguous(), max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _padded(self, rows: torch.Tensor, length: int) -> list[torch.Tensor]:
        missing = rows.new_zeros(length - len(rows), *rows.shape[1:])
        return self._gathered(torch.cat([rows, missing]))

    def _gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor)
        return parts

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        distributed.all_reduce(present, distributed.ReduceOp.MAX)
        gradients = []
        for parameter in (parameter for parameter, there in zip(parameters, present.tolist(), strict=True) if there):
            if parameter.grad is None:  # this process had no image of this update
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = _flatten_dense_tensors(bucket)
            distributed.all_reduce(flat)
            for gradient, total in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(total)

    def wait(self) -> None:
        self.everyone(None)

    def close(self) -> None:
        distributed.destroy_process_group()


def longest(shares: Iterable[slice]) -> int:
    return max(len(range(share.stop)[share]) for share in shares)


def within(things: torch.Tensor, share: slice) -> torch.Tensor:
    """Those of the numbers `things` that lie in `share`."""
    return things[(things >= share.start) & (things < share.stop)]


def batches(count: int, size: int, most: int) -> Iterator[tuple[slice, bool]]:
    """`count` things, `size` at a time, each batch with whether it is one to use.

    Then, until there are as many batches as of `most` things, the first thing again, for the passes of the others.
    """
    for start in range(0, count, size):
        yield slice(start, min(start + size, count)), True
    for _ in range(-(-count // size), -(-most // size)):
        yield slice(0, 1), False


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype together, up to a size at which a transfer is no longer bound by its latency."""
    buckets: list[list[torch.Tensor]] = []
    for tensor in tensors:
        last = buckets[-1] if buckets else None
        if last and last[0].dtype == tensor.dtype and sum(each.nbytes for each in last) < _BUCKET_BYTES:
            last.append(tensor)
        else:
            buckets.append([tensor])
    return buckets


def processes_asked_for() -> tuple[int, int]:
    """The rank of this process and how many there are to be, as the environment says."""
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def join_ranks(device: str, sharded: bool = False) -> Ranks:
    """The processes that the environment names, as torchrun and `accelerate launch` set it; else this one alone.

    `device` and `sharded` are the settings device and runtime.shard. Raises ValueError where several processes are to
    share what one names.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return Ranks()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device is {device!r}, with {size} processes; accepted is "auto", "cpu" or "cuda" for all')
    cuda = device != "cpu" and torch.cuda.is_available()
    local = _number("LOCAL_RANK", 0)
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU of its own: torch finds {torch.cuda.device_count()}; "
            "accepted are as many processes as GPUs, or --device cpu"
        )
    return SeveralRanks(_number("RANK", 0), size, local, cuda=cuda, sharded=sharded)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"{name} in the environment is {value!r}; accepted is a number, as torchrun sets it")
    return int(value)
