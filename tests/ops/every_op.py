"""What tests ask of every op beside its results: waiting, recording, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from advflow_ext.doctor.every_op import Inputs, Outputs


def overwrite(inputs: Inputs, by: Inputs) -> None:
    with torch.no_grad():
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                value.copy_(by[key])


def same_bits(one: Outputs, other: Outputs) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key].to(other[key].device), other[key]) for key in one)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Where the device is a GPU, whatever makes the host wait for it is an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(call: Callable[[], Outputs], device: str) -> tuple[Outputs, Callable[[], None]]:
    """Outputs, and what computes them again from the inputs as they then are: on a GPU the replay of a graph."""
    if device == "cpu":
        outputs = call()

        def again() -> None:
            overwrite(outputs, call())

        return outputs, again
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay
