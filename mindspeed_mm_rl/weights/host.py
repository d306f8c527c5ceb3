"""Weights from the trainer to rollout processes on the same node: one anonymous memory file that every reader maps.

    trainer: open_views(handle) written  --handle-->  rollout: open_views(handle) -> copied into the engine's own memory -> returns
       ^--------------------------- waits for every reader before it writes again ----------------------------------------'

The file has no name, so nothing is left behind whoever is killed, and the size of /dev/shm does not bound it (64 MB in a default
container). The parameters exist once per node in it, however many readers there are.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

_ALIGNMENT_BYTES = 64


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


NodeHandles = Mapping[str, WeightHandle]
"""By the address of the node whose processes can open it."""


def joined(first: NodeHandles, *others: NodeHandles) -> NodeHandles:
    """Handles of whole models, from those of their parts on the same nodes."""
    return {node: replace(handle, others=tuple(other[node] for other in others)) for node, handle in first.items()}


class HostBuffer:
    """The file: made by one process, which keeps it for the whole run; written and read by whoever opens the handle on its node.

    Nothing guards a reader against a rewrite: it may begin only when every reader of the handle has returned.
    """

    def __init__(self, specs: Iterable[tuple[str, Iterable[int], torch.dtype]]) -> None:
        """specs: (name, shape, dtype) of every tensor; raises ValueError on a name that comes twice."""
        self._slots: dict[str, TensorSlot] = {}
        self._size = 0
        for name, shape, dtype in specs:
            if name in self._slots:
                raise ValueError(f"weight buffer: {name} is listed twice")
            slot = TensorSlot(name, self._size, tuple(shape), str(dtype).removeprefix("torch."))
            self._slots[name] = slot
            self._size += -(-slot.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if self._size == 0:
            raise ValueError("weight buffer: there is nothing to publish (no tensor, or only empty ones)")
        self._fd = os.memfd_create("mindspeed_mm_rl_weights", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, self._size)

    def handle(self) -> WeightHandle:
        return WeightHandle(f"/proc/{os.getpid()}/fd/{self._fd}", self._size, tuple(self._slots.values()))

    def close(self) -> None:
        """Gives up the file; who has mapped it keeps it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_views(handle: WeightHandle) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) views of the shared files, no copy; the views keep the mappings alive. Those who train write them, readers must not.

    Raises ValueError when a file cannot be opened (its maker gone, or another node, container or user).
    """
    try:
        fd = os.open(handle.path, os.O_RDWR)
    except OSError as error:
        raise ValueError(
            f"weights cannot be read from {handle.path} ({error.strerror}): the trainer must be alive, on this node and in this container"
        ) from error
    try:
        # torch.frombuffer asks for a writable buffer.
        raw = torch.frombuffer(mmap.mmap(fd, handle.size), dtype=torch.uint8)
    finally:
        os.close(fd)
    own = [(slot.name, raw[slot.offset : slot.offset + slot.num_bytes].view(slot.torch_dtype).view(slot.shape)) for slot in handle.table]
    return own + [view for other in handle.others for view in open_views(other)]
