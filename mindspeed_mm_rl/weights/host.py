"""Weights from the trainer to rollout processes on the same node: one anonymous memory file that every reader maps.

    trainer: open_views(handle) written  --handle-->  rollout: open_views(handle) -> copied into the engine's own memory -> returns
       ^--------------------------- waits for every reader before it writes again ----------------------------------------'

The file has no name, so nothing is left behind whoever is killed, and the size of /dev/shm does not bound it (64 MB in a default
container). The parameters exist once per node in it, however many readers there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mindspeed_mm_rl.platforms.shared_memory import FileHandle, MemoryFile, open_file

_ALIGNMENT_BYTES = 64
TensorSpec = tuple[str, Iterable[int], torch.dtype]
"""Name, shape and dtype."""
Views = list[tuple[str, torch.Tensor]]
"""Tensors by name, in memory that is not the reader's."""


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies. Example: TensorSlot(name="lm_head.weight", offset=0, shape=(512, 128), dtype="float32")."""

    name: str
    offset: int
    """Bytes from the start of the file."""
    shape: tuple[int, ...]
    dtype: str
    """Name of the torch dtype."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.offset + -(-self.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class WeightHandle:
    """What travels instead of the weights. Example: WeightHandle(path="/proc/812/fd/9", size=4096, table=(TensorSlot(...),))."""

    path: str
    """Its maker's open file, seen through /proc: the reader must share its PID namespace and user."""
    size: int
    """Bytes of the whole file."""
    table: tuple[TensorSlot, ...]
    others: tuple[WeightHandle, ...] = ()
    """Files with the rest of the model, from processes that train other parts of it."""

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        """Of all files."""
        return self.table + tuple(slot for other in self.others for slot in other.slots)

    def chunks(self) -> Iterator[Views]:
        """All at once."""
        yield open_views(self)


NodeHandles = Mapping[str, WeightHandle]
"""By the address of the node whose processes can open it."""


def joined(first: NodeHandles, *others: NodeHandles) -> NodeHandles:
    """Handles of whole models, from those of their parts on the same nodes."""
    return {node: replace(handle, others=tuple(other[node] for other in others)) for node, handle in first.items()}


class HostBuffer:
    """The file: made by one process, which keeps it for the whole run; written and read by whoever opens the handle on its node.

    Nothing guards a reader against a rewrite: it may begin only when every reader of the handle has returned.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        """Raises ValueError on a name that comes twice."""
        self._table = placed(specs)
        if num_bytes(self._table) == 0:
            raise ValueError("weight buffer: there is nothing to publish (no tensor, or only empty ones)")
        self._file = MemoryFile(num_bytes(self._table))

    def handle(self) -> WeightHandle:
        file = self._file.handle()
        return WeightHandle(file.path, file.size, self._table)

    def close(self) -> None:
        """Gives up the file; who has mapped it keeps it."""
        self._file.close()


def placed(specs: Iterable[TensorSpec]) -> tuple[TensorSlot, ...]:
    """One behind the other. Raises ValueError on a name that comes twice."""
    slots: dict[str, TensorSlot] = {}
    end = 0
    for name, shape, dtype in specs:
        if name in slots:
            raise ValueError(f"weight buffer: {name} is listed twice")
        slots[name] = TensorSlot(name, end, tuple(shape), str(dtype).removeprefix("torch."))
        end = slots[name].end
    return tuple(slots.values())


def num_bytes(table: Sequence[TensorSlot]) -> int:
    """Of the memory that it describes."""
    return table[-1].end if table else 0


def views(memory: torch.Tensor, table: Iterable[TensorSlot]) -> Views:
    """(name, tensor) by the table, no copy. memory: uint8."""
    return [(slot.name, memory[slot.offset : slot.offset + slot.num_bytes].view(slot.torch_dtype).view(slot.shape)) for slot in table]


def open_views(handle: WeightHandle) -> Views:
    """(name, tensor) views of the shared files, no copy; the views keep the mappings alive. Those who train write them, readers must not.

    Raises ValueError when a file cannot be opened (its maker gone, or another node, container or user).
    """
    own = views(open_file(FileHandle(handle.path, handle.size)), handle.table)
    return own + [view for other in handle.others for view in open_views(other)]
