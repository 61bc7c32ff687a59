"""The tensors of a checkpoint in safetensors: one file, or, of sharded ones, a file of each process with its rows.

Which rows those are stands in the file's header, as torch.distributed.checkpoint's HuggingFaceStorageWriter writes it,
whose reader loads these files too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from advflow.core.ranks import Ranks
from advflow.core.sharding import is_sharded, own_rows

TENSORS = "tensors.safetensors"
_OFFSETS, _OF_TENSOR = "DCP_SHARDING_INFO", "saved_offsets"


class Rows:
    """A tensor in `pieces` that lie one after the other in its rows; only rows that are asked for are put together."""

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        self.shape = torch.Size([sum(map(len, pieces)), *pieces[0].shape[1:]])

    def __getitem__(self, rows: slice) -> torch.Tensor:
        first, last, _ = rows.indices(self.shape[0])
        found, start = [self._pieces[0][:0]], 0
        for piece in self._pieces:
            found.append(piece[max(first - start, 0) : max(last - start, 0)])
            start += len(piece)
        return torch.cat(found)


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> Path | None:
    """Writes this process's rows of what is sharded, and of the rest all by the first process; None: it has nothing."""
    own, offsets = {}, {}
    for name, tensor in tensors.items():
        held, rows = own_rows(tensor)
        if held.numel() if is_sharded(tensor) else ranks.first:
            own[name] = held.detach().cpu().contiguous()
            offsets[name] = {_OF_TENSOR: [rows.start or 0, *[0] * held.dim()][: held.dim()]}
    if not own:
        return None
    path = folder / (TENSORS if ranks.first else f"tensors.{ranks.rank}.safetensors")
    sharded = any(map(is_sharded, tensors.values()))
    save_file(own, path, {_OFFSETS: json.dumps(offsets)} if sharded else None)
    return path


def read_tensors(folder: Path) -> dict[str, torch.Tensor | Rows]:
    """What `write_tensors` wrote, in memory only where it is read. Raises SafetensorError for a file that is none."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in folder.glob("tensors*.safetensors"):
        with safe_open(path, "pt") as opened:
            offsets = json.loads((opened.metadata() or {}).get(_OFFSETS, "{}"))
            for name in opened.keys():  # noqa: SIM118  # no mapping
                first = offsets[name][_OF_TENSOR][:1] if name in offsets else []
                pieces.setdefault(name, {})[sum(first)] = opened.get_tensor(name)
    in_order = {name: [found[first] for first in sorted(found)] for name, found in pieces.items()}
    return {name: found[0] if len(found) == 1 else Rows(found) for name, found in in_order.items()}
