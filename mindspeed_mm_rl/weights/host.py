"""Weights from the trainer to rollout processes on the same node: one anonymous memory file that every reader maps.

    trainer: HostBuffer.write(...)  --handle-->  rollout: read_views(handle) -> copied into the engine's own memory -> returns
       ^------------------------- waits for every reader before it writes again -----------------------------------'

The file has no name, so nothing is left behind whoever is killed, and the size of /dev/shm does not bound it (64 MB in a default
container). The parameters exist once per node in it, however many readers there are.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
    """The writer's open file, seen through /proc: the reader must share its PID namespace and user."""
    size: int
    """Bytes of the whole file."""
    table: tuple[TensorSlot, ...]


NodeHandles = Mapping[str, WeightHandle]
"""By the address of the node whose processes can open it."""


class HostBuffer:
    """The writer's side: kept for the whole run and rewritten in place.

    Nothing guards a reader against a rewrite: `write` may be called again only when every reader of the handle has returned.
    """

    def __init__(self, specs: Iterable[tuple[str, Iterable[int], torch.dtype]]) -> None:
        """specs: (name, shape, dtype) of every tensor; raises ValueError on a name that comes twice."""
        self._slots: dict[str, TensorSlot] = {}
        end = 0
        for name, shape, dtype in specs:
            if name in self._slots:
                raise ValueError(f"weight buffer: {name} is listed twice")
            slot = TensorSlot(name, end, tuple(shape), str(dtype).removeprefix("torch."))
            self._slots[name] = slot
            end += -(-slot.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if end == 0:
            raise ValueError("weight buffer: there is nothing to publish (no tensor, or only empty ones)")
        self._fd = os.memfd_create("mindspeed_mm_rl_weights", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, end)
        self._map = mmap.mmap(self._fd, end)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightHandle:
        """Copies every tensor to its place (from any device) and returns the handle for readers.

        Raises ValueError when a tensor is unknown, has another shape or dtype, or is missing.
        """
        missing = set(self._slots)
        for name, tensor in named_tensors:
            slot = self._slots.get(name)
            if slot is None:
                raise ValueError(f"weight buffer: {name} was not announced when the buffer was made")
            if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.torch_dtype:
                raise ValueError(
                    f"weight buffer: {name} was announced as {slot.dtype} {slot.shape} but is written as "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
            _view(self._bytes, slot).copy_(tensor.detach())
            missing.discard(name)
        if missing:
            raise ValueError(f"weight buffer: {len(missing)} tensors were not written, such as {sorted(missing)[:3]}")
        return self.handle()

    def handle(self) -> WeightHandle:
        return WeightHandle(f"/proc/{os.getpid()}/fd/{self._fd}", self._bytes.numel(), tuple(self._slots.values()))

    def close(self) -> None:
        """Gives up the file; readers that have mapped it keep reading."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._bytes = torch.empty(0, dtype=torch.uint8)


def read_views(handle: WeightHandle) -> list[tuple[str, torch.Tensor]]:
    """The reader's side: (name, tensor) views of the shared file, no copy; the views keep the mapping alive. They must not be written.

    Raises ValueError when the file cannot be opened (writer gone, or another node, container or user).
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
    return [(slot.name, _view(raw, slot)) for slot in handle.table]


def _view(raw: torch.Tensor, slot: TensorSlot) -> torch.Tensor:
    return raw[slot.offset : slot.offset + slot.num_bytes].view(slot.torch_dtype).view(slot.shape)
