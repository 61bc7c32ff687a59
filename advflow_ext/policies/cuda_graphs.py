"""A model's forward and backward passes as CUDA graphs, one for each policy and shape: the device waits for no host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from advflow_ext.nn import modulation_cache

_WARM_UP = 2  # calls before a recording: the first compiles and verifies kernels, the second is as all that follow


class CudaGraphs:
    """Calls of ``function`` that are recorded once and from then on replayed, forward and backward::

        def run(x, tokens, pooled, timestep):
            return transformer(x, tokens, pooled, timestep, return_dict=False)[0]

        graphs = CudaGraphs(run, transformer)
        with torch.no_grad(), policies.use("rollout"):
            v_old = graphs("rollout", x, tokens, pooled, timestep)
        policies.activate("learner")
        v = graphs("learner", x, tokens, pooled, timestep)
        loss(v, v_old).backward()  # into .grad of the learner's parameters, as without

    A step of SD3.5 Medium is some thousand launches, and a host that launches them from Python takes longer than a fast
    GPU takes to run them. A replay is one launch. The kernels are those of the call itself, on the same numbers.

    A policy, with gradients or without, is recorded anew for each combination of the tensors' shapes and dtypes, the
    model's training mode and autocast; and where the model has other weights than it was recorded with, by their
    memory: weights that are updated in place, as optimisers and :meth:`PolicySet.follow` do, stay the same. What is no
    tensor, such as an adapter's scale, is taken as it was recorded, until :meth:`forget`.

    A recording with gradients keeps the activations of its forward pass for good; those without share one pool. So it
    is for runs of few shapes, whose activations fit. Its backward pass has to come before its next forward pass, and
    once, for both write where the last one did: anything else is refused.

    Where nothing can be recorded, on a CPU and inside what torch.compile compiles, ``function`` is called.

    Arguments:
        function: tensors in, one tensor out; it must not wait for the device, draw from another generator than the
            default one, or keep what it makes.
        model: whose parameters it reads, and may have gradients.
        most: recordings that are kept, the least recently used dropped first.

    Raises ValueError for a ``most`` that is no positive integer. A call raises ValueError for a tensor that asks for a
    gradient, since only the model's parameters get one, and RuntimeError, before anything is recorded, while a
    :class:`~advflow_ext.nn.ModulationCache` is on, whose tensors a recording would go on to read, and for sharded
    parameters; and where the call cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor], model: nn.Module, *, most: int = 16) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"most is {most!r}; accepted is a positive integer.")
        self._function, self._model, self._most = function, model, most
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pool: Any = None  # of all recordings without gradients: what they return is copied before the next

    def __call__(self, policy: Hashable, *tensors: Tensor) -> Tensor:
        """``function(*tensors)``, replayed. ``policy`` names the weights that are in force in the model."""
        if not tensors or not can_record(tensors):
            return self._function(*tensors)
        for k, tensor in enumerate(tensors):
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"tensor {k} requires a gradient; accepted are tensors that do not.")
        weights = list(_weights_of(self._model))
        key = self._key(policy, tensors)
        found = self._recordings.pop(key, None)
        if found is None or not found.reads(weights):
            found = None  # and with it its memory, before the next one takes as much
            found = self._record(tensors, weights)
        self._recordings[key] = found  # as the last, the most recently used
        while len(self._recordings) > self._most:
            self._recordings.popitem(last=False)
        return found(tensors)

    def forget(self) -> None:
        """Drops all recordings, after a change that is none of a tensor."""
        self._recordings.clear()

    def _key(self, policy: Hashable, tensors: Sequence[Tensor]) -> Hashable:
        shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        return policy, torch.is_grad_enabled(), self._model.training, _autocast_dtype(tensors), shapes

    def _record(self, tensors: Sequence[Tensor], weights: list[Tensor]) -> _Recording:
        if modulation_cache.is_on():
            raise RuntimeError("a ModulationCache is on; accepted is a recording outside its with block.")
        for weight in weights:
            if is_traceable_wrapper_subclass(weight):
                raise RuntimeError(f"the model has a {type(weight).__name__} parameter; accepted are plain ones.")
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        pool = torch.cuda.graph_pool_handle() if torch.is_grad_enabled() else self._pool
        try:
            return _Recording(self._function, tensors, weights, pool)
        except torch.AcceleratorError as error:
            raise RuntimeError(
                f"the call cannot be recorded as a CUDA graph: {str(error).splitlines()[0]}; accepted is one that does "
                "not wait for the device and runs on the current stream."
            ) from error


class _Recording:
    """One call at one shape: where its inputs and results lie, and the graphs that compute these from those."""

    _output: Tensor
    _upstream: Tensor
    _gradients: tuple[Tensor | None, ...]

    def __init__(
        self, function: Callable[..., Tensor], tensors: Sequence[Tensor], weights: list[Tensor], pool: Any
    ) -> None:
        self._function = function
        self._weights = weights  # kept, so that no other tensor can come to lie where they do
        self._learns = torch.is_grad_enabled()
        self._addresses = self._addresses_of(weights)
        self._parameters = [w for w in weights if w.requires_grad] if self._learns else []
        self.turn = 0  # counts forward passes; the backward pass of the last one alone can be replayed
        # A weight cast by an earlier call must not be taken for one that the graph casts.
        with (
            torch.inference_mode(False),
            _without_autocast_cache(tensors),
            torch.set_grad_enabled(bool(self._parameters)),
        ):
            self._inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
            on_a_side_stream(self._warm_up)
            self._replay_forward = record(self._forward, pool)
            if self._output.requires_grad:
                self._upstream = torch.zeros_like(self._output, requires_grad=False)
                self._replay_backward = record(self._backward, pool)
            else:
                self._parameters = []
            # Without its graph, whose nodes would add up later gradients on the stream of the recording.
            self._output = self._output.detach()

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        torch._foreach_copy_(self._inputs, list(tensors))
        if not self._parameters:
            return self.forward()
        output: Tensor = _Replay.apply(self, *self._parameters)
        return output

    def reads(self, weights: list[Tensor]) -> bool:
        return self._addresses == self._addresses_of(weights)

    def _addresses_of(self, weights: list[Tensor]) -> list[tuple[int, bool]]:
        return [(weight.data_ptr(), self._learns and weight.requires_grad) for weight in weights]

    def forward(self) -> Tensor:
        self.turn += 1
        self._replay_forward()
        return self._output.detach().clone()

    def backward(self, turn: int, upstream: Tensor) -> list[Tensor | None]:
        """The gradients of the parameters, in memory of their own, since autograd keeps what it is given."""
        if turn != self.turn:
            raise RuntimeError(
                "the backward pass of a CUDA graph comes too late: its forward pass, or its backward pass itself, has "
                "been replayed since; accepted is one backward pass, before the next forward pass."
            )
        self.turn += 1
        self._upstream.copy_(upstream)
        self._replay_backward()
        there = [gradient for gradient in self._gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in there]
        if there:
            torch._foreach_copy_(copies, there)
        remaining = iter(copies)
        return [None if gradient is None else next(remaining) for gradient in self._gradients]

    def _warm_up(self) -> None:
        for _ in range(_WARM_UP):
            output = self._function(*self._inputs)
            if output.requires_grad:
                torch.autograd.grad(output, self._parameters, torch.zeros_like(output), allow_unused=True)

    def _forward(self) -> None:
        self._output = self._function(*self._inputs)

    def _backward(self) -> None:
        self._gradients = torch.autograd.grad(self._output, self._parameters, self._upstream, allow_unused=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *parameters: Tensor) -> Tensor:
        output = recording.forward()
        ctx.recording, ctx.turn = recording, recording.turn
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recording.backward(ctx.turn, upstream)


def can_record(tensors: Sequence[Tensor]) -> bool:
    return not torch.compiler.is_compiling() and all(tensor.is_cuda for tensor in tensors)


def on_a_side_stream(run: Callable[[], None]) -> None:
    """Where libraries make what they keep for a stream, which must not happen in a recording."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    current.wait_stream(side)


def record(run: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Records ``run`` in memory of ``pool``; returns what runs it again."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that compute rewards, may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay


def _weights_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers. Past nn.Module's own walks, at which merged weights give way to the base's."""
    for held in (model._parameters, model._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)
    for module in model._modules.values():
        if module is not None:
            yield from _weights_of(module)


def _autocast_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    device = tensors[0].device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _without_autocast_cache(tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
    dtype = _autocast_dtype(tensors)
    return nullcontext() if dtype is None else torch.autocast(tensors[0].device.type, dtype, cache_enabled=False)
