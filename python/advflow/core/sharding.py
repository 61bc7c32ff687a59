"""Sharded weights (FSDP2): a process holds some rows of each, and all rows of a block while that runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, blocks: Iterable[nn.Module], whole: Sequence[nn.Parameter] = ()) -> None:
    """Leaves to each process its rows of every parameter of `model` but those that stay `whole`.

    `blocks` of it are put together one at a time, what is outside of them at once. Gradients become sums over the
    processes. The parameters are others afterwards: only then may they be listed for an optimiser.
    """
    # The velocity is a view of a block's output, which nobody writes to.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
    for module in (*blocks, model):
        # By default the outermost keeps its rows together after a pass, which then does not see them updated.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
        # By default they are means. A factor alone would be applied by a reduction that gloo does not know.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def own_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """What this process holds of `tensor`, in the memory that holds it, and which rows of it that is."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    first = min(mesh.get_local_rank() * -(-len(tensor) // mesh.size()), len(tensor))
    return local, slice(first, first + len(local))


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state of `model` on the CPU, put together one tensor at a time; of processes that do not `keep` it, nothing.

    All processes call it together.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        put_together = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            state[name] = put_together.cpu()
    return state


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scales gradients down to the norm `most` and returns what it was, of all rows of sharded ones: the same number
    in every process."""
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(map(is_sharded, gradients)):
        return nn.utils.clip_grad_norm_(parameters, most).item()
    own = [own_rows(gradient)[0] for gradient in gradients]
    squares = nn.utils.get_total_norm(own).double().square()
    distributed.all_reduce(squares)
    norm = squares.sqrt()
    torch._foreach_mul_(own, (most / (norm + 1e-6)).clamp(max=1.0).float())
    return norm.item()
