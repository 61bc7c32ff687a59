"""Where the device's time goes in a part of a step, by site: kernels of torch's profiler, each put to what launched it.

Eager operators are told apart by :mod:`bench.roofline.sites`, as in the account of bytes: by module, source line
and, in the backward pass, the forward operator they belong to. What torch.compile has fused or a CUDA graph replays has
none of these; its kernels are told apart by their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.roofline.account import OTHER, Origin, Tracer
from bench.roofline.sites import ADALN, ATTENTION, GEMM, QK_NORM, SITES, site_of

LOSS = "loss"
UPDATE = "optimiser, merging"
COMPILED = "fused by torch.compile"
PROFILE_SITES = (*(site for site in SITES if site != OTHER), LOSS, UPDATE, COMPILED, OTHER)

_PREFIX = "site: "
_stages: list[str] = []

# The first that fits a kernel's name or that of an operator around it.
_NAMES = (
    (r"advflow::joint_qk_norm", QK_NORM),
    (r"advflow::adaln", ADALN),
    (r"advflow_ext::|residual_(stats|grad)|row_means|loss_summary|\bloss_kernel", LOSS),
    (r"flash|fmha|sdpa|scaled_dot_product|attention", ATTENTION),
    (r"^triton_", COMPILED),
    (r"gemm|cutlass|nvjet|cublas|xmma|aten::(mm|addmm|addmm_|bmm|baddbmm|mkldnn_convolution|cudnn_convolution)$", GEMM),
)


@contextmanager
def stage(site: str) -> Iterator[None]:
    """What is launched within it and belongs to no module is of that site."""
    _stages.append(site)
    try:
        with record_function(_PREFIX + site):
            yield
    finally:
        _stages.pop()


@dataclass
class Share:
    """Of a site: seconds of its kernels, and how many they are."""

    seconds: float = 0.0
    launches: int = 0

    def add(self, seconds: float, launches: int = 1) -> None:
        self.seconds += seconds
        self.launches += launches


def by_site(
    part: Callable[[Callable[[Tensor], None]], object], model: nn.Module, device: torch.device, closed: bool
) -> dict[str, Share]:
    """Runs `part`, whose argument is what its losses are to be differentiated by, and sums its kernels up by site.

    On a CPU, which has no kernels, operators stand for them.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    if closed:  # an operator's site would be sought inside of what is compiled or replayed, which is then neither
        with profile(activities=kinds) as profiler:
            part(Tensor.backward)
            _wait(device)
        return _summed(profiler.events(), device)
    tracer = Tracer(model, _site, lambda site: record_function(_PREFIX + site))

    def backward(loss: Tensor) -> None:
        tracer.phase = "backward"
        # One thread: the tracer's state belongs to the one that entered it.
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        tracer.phase = "forward"

    with profile(activities=kinds) as profiler:
        with tracer.watching():
            part(backward)
        _wait(device)
    return _summed(profiler.events(), device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _site(origin: Origin) -> str:
    site = site_of(origin)
    outside = origin.phase == "forward" and not origin.modules
    return _stages[-1] if outside and _stages else site


def _summed(events: Any, device: torch.device) -> dict[str, Share]:
    return _operators(events) if device.type == "cpu" else _kernels(events)


def _kernels(events: Any) -> dict[str, Share]:
    """Each kernel at the operator that launched it; by its name alone where the profiler links it to none."""
    # Ranges of the host appear on the device again, and are no kernels.
    unlinked: dict[str, Share] = defaultdict(Share)
    for event in events:
        if event.device_type != DeviceType.CPU and not event.is_user_annotation:
            unlinked[event.name].add(event.time_range.elapsed_us() / 1e6)
    sites: dict[str, Share] = defaultdict(Share)
    for event in events:
        for kernel in event.kernels:
            left = unlinked.get(kernel.name)
            if left is not None and left.launches:
                sites[site_of_kernel(kernel.name, _names_around(event))].add(kernel.duration / 1e6)
                left.add(-kernel.duration / 1e6, -1)
    for name, left in unlinked.items():
        if left.launches:
            sites[site_of_kernel(name, [])].add(left.seconds, left.launches)
    return dict(sites)


def _operators(events: Any) -> dict[str, Share]:
    """What a CPU has in the place of kernels: operators that call no other, by their own time."""
    sites: dict[str, Share] = defaultdict(Share)
    for event in events:
        if event.name.startswith("aten::") and not _calls_operator(event):
            sites[site_of_kernel(event.name, _names_around(event))].add(event.self_cpu_time_total / 1e6)
    return dict(sites)


def _calls_operator(event: FunctionEvent) -> bool:
    return any(child.name.startswith("aten::") or _calls_operator(child) for child in event.cpu_children)


def _names_around(event: FunctionEvent) -> list[str]:
    """Of the event and what it happened in, innermost first."""
    names = []
    around: FunctionEvent | None = event
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    return names


def site_of_kernel(name: str, around: list[str]) -> str:
    """By the innermost marked range that it was launched in; without one by names.

    A range says `other` where the operator's module and line said nothing.
    """
    marked = next((each.removeprefix(_PREFIX) for each in around if each.startswith(_PREFIX)), OTHER)
    if marked != OTHER:
        return marked
    for pattern, site in _NAMES:
        if any(re.search(pattern, each) for each in (name, *around)):
            return site
    return OTHER
