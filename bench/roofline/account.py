"""Counts what a model does, operator by operator, without doing it: launches, bytes, FLOPs, saved activations.

Works on fake tensors, shapes without data, so that any model is traced in seconds on a CPU; on real ones alike.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import advflow_ext

Phase = Literal["forward", "backward"]
Kind = Literal["gemm", "attention", "elementwise"]

GRADIENT_SUMS = "gradient sums"  # of tensors used more than once: autograd's own additions, which no module asks for
OTHER = "other"  # what was saved by a node that ran no operator

_GEMMS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_OVERWRITE = {"copy_", "fill_", "zero_"}  # their first argument is written, never read
_ZEROS_THEN_COPY = {"slice_backward", "select_backward"}  # two kernels behind one name
# Their CUDA kernels want contiguous inputs, and copy any that is not.
_CONTIGUOUS_ONLY = {"native_layer_norm", "native_layer_norm_backward", "rms_norm", "rms_norm_backward"}

# Neither torch, nor our ops, nor the tracing itself is where an operator comes from, but whoever calls them.
_SKIPPED_SOURCES = (
    str(Path(torch.__file__).parent),
    str(Path(advflow_ext.__file__).parent / "nn"),
    str(Path(__file__).parents[1]),
    "<frozen",
    "<string>",
)


@dataclass(frozen=True)
class Source:
    """A line of Python."""

    file: str
    function: str
    line: int

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True)
class Origin:
    """Where an operator comes from: all that a rule may look at to name its site.

    Args:
        op: the operator.
        phase: the pass it runs in.
        kind: what bounds it on a GPU.
        modules: the modules being called with their names, innermost last; empty in the backward pass.
        source: the innermost line of Python outside torch and bench; None where C++ issued it, as in most of a backward
            pass.
        frozen: an operand existed before the step and collects no gradient, as a frozen weight does.
        forward_site: in the backward pass, the site of the forward operator this one belongs to.
    """

    op: OpOverload
    phase: Phase
    kind: Kind
    modules: tuple[tuple[str, nn.Module], ...] = ()
    source: Source | None = None
    frozen: bool = False
    forward_site: str | None = None


SiteRule = Callable[[Origin], str]


@dataclass(frozen=True)
class Event:
    """One operator: the kernels it launches, the bytes they read and write, and its FLOPs (of GEMMs and attention)."""

    op: str
    phase: Phase
    site: str
    kind: Kind
    launches: int
    read: int
    written: int
    flops: int


@dataclass
class Account:
    """The operators of a step in order, and the bytes of distinct storages held for its backward pass, by site.

    A storage that several operators save counts once, at the first of them. Parameters and buffers do not count.
    """

    events: list[Event] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)


def trace(step: Callable[[], Tensor], model: nn.Module, site_of: SiteRule, *, backward: bool) -> Account:
    """Runs `step`, which returns a scalar, and with `backward` its backward pass, and accounts for both."""
    tracer = Tracer(model, site_of)
    with tracer.watching():
        loss = step()
        saved = tracer.held()
        if backward:
            tracer.phase = "backward"
            # One thread: the tracer's state belongs to the one that entered it.
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()
    return Account(tracer.events, saved)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a view; expanded dimensions are read once."""
    if tensor.numel() == 0:
        return 0
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.element_size()


def kind_of(op: OpOverload) -> Kind:
    name = _short_name(op)
    if name in _GEMMS:
        return "gemm"
    return "attention" if name.startswith("_scaled_dot_product") else "elementwise"


def _short_name(op: OpOverload) -> str:
    return op._schema.name.split("::")[1]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Iterable[object]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same view given twice, as in x * x, is read once."""
    return list({(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


def cost(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> tuple[int, int, int]:
    """Launches, bytes read and bytes written of a call.

    Every tensor argument is read once and every result written once. Views and allocations are free.
    """
    name = _short_name(op)
    by_argument = list(zip(op._schema.arguments, args, strict=False))
    by_argument += [(argument, kwargs[argument.name]) for argument in op._schema.arguments if argument.name in kwargs]
    inputs = _tensors(value for _, value in by_argument)
    mutated = _tensors(value for a, value in by_argument if a.alias_info is not None and a.alias_info.is_write)
    known = {_storage(tensor) for tensor in inputs}
    results = _distinct(tensor for tensor in _tensors([result]) if _storage(tensor) not in known)
    if name in _ALLOCATIONS or not (results or mutated):
        return 0, 0, 0
    if name.endswith("_like") or name.startswith("new_"):  # they ask for a shape, not for values
        inputs = []
    if name in _OVERWRITE:
        inputs = _tensors(args[1:])
    launches, read = 1, sum(map(tensor_bytes, _distinct(inputs)))
    written = sum(map(tensor_bytes, results + _distinct(mutated)))
    if name in _ZEROS_THEN_COPY:
        launches, written = launches + 1, written + read
    if name in _CONTIGUOUS_ONLY:
        copied = [tensor for tensor in _distinct(inputs) if not tensor.is_contiguous()]
        launches += len(copied)
        read += sum(map(tensor_bytes, copied))
        written += sum(map(tensor_bytes, copied))
    return launches, read, written


def _flops(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> int:
    in_place = _short_name(op) == "addmm_"  # torch's registry knows the out-of-place form alone
    formula = flop_registry.get(torch.ops.aten.addmm if in_place else op._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _source() -> Source | None:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if not frame.f_code.co_filename.startswith(_SKIPPED_SOURCES):
            return Source(frame.f_code.co_filename, frame.f_code.co_qualname, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]  # the outermost frame has none
    return None


class Tracer(TorchDispatchMode):
    """Accounts for the operators called while it is :meth:`watching`.

    ``phase`` is the caller's to set. Each operator is called inside ``mark(its site)``.
    """

    def __init__(
        self, model: nn.Module, site_of: SiteRule, mark: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.phase: Phase = "forward"
        self._site_of, self._mark = site_of, mark
        self._names = {module: name for name, module in model.named_modules()}
        self._calling: list[tuple[str, nn.Module]] = []
        self._resident = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self._trainable = {_storage(parameter) for parameter in model.parameters() if parameter.requires_grad}
        self._produced: set[int] = set()
        self._node_sites: dict[int, str] = {}
        self._saved: dict[int, tuple[StorageWeakRef, int, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(nn.modules.module.register_module_forward_pre_hook(self._entered).remove)
            stack.callback(nn.modules.module.register_module_forward_hook(self._left, always_call=True).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    def held(self) -> dict[str, int]:
        """Bytes saved so far and still alive, by site."""
        by_site: dict[str, int] = defaultdict(int)
        for storage, size, node in self._saved.values():
            if not storage.expired():
                by_site[self._node_sites.get(node, OTHER)] += size
        return dict(by_site)

    def _entered(self, module: nn.Module, _inputs: object) -> None:
        self._calling.append((self._names.get(module, ""), module))

    def _left(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._calling.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self._resident and key not in self._saved:
            storage = tensor.untyped_storage()
            # The weak reference also keeps the key from being given to another storage.
            self._saved[key] = (StorageWeakRef(storage), storage.nbytes(), _newest_node())
        return tensor

    def __torch_dispatch__(
        self, op: OpOverload, _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        # Before the call: in-place operators change what they were given.
        operands = {_storage(tensor) for tensor in _tensors([*args, *kwargs.values()])}
        if op.namespace == "prim":  # questions about a tensor
            return op(*args, **kwargs)
        kind = kind_of(op)
        site = self._site(op, kind, frozen=not operands <= self._produced | self._trainable)
        if self.phase == "forward":
            # Autograd made the node of this operator just before; later operators without one must not claim it.
            self._node_sites.setdefault(_newest_node(), site)
        with self._mark(site):
            result = op(*args, **kwargs)
        self._produced |= {_storage(tensor) for tensor in _tensors([result])} - operands
        launches, read, written = cost(op, args, kwargs, result)
        if launches:
            flops = _flops(op, args, kwargs, result)
            self.events.append(Event(str(op), self.phase, site, kind, launches, read, written, flops))
        return result

    def _site(self, op: OpOverload, kind: Kind, frozen: bool) -> str:
        source = _source()
        if self.phase == "forward":
            return self._site_of(Origin(op, "forward", kind, tuple(self._calling), source, frozen))
        node = torch._C._current_autograd_node()
        forward_site = None if node is None else self._node_sites.get(node._sequence_nr())
        if source is None and _short_name(op) in ("add", "add_"):  # no formula of a C++ node adds
            return GRADIENT_SUMS
        return self._site_of(Origin(op, "backward", kind, (), source, frozen, forward_site))


def _newest_node() -> int:
    return int(torch._C._autograd._get_sequence_nr()) - 1
