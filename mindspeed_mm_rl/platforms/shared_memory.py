"""Memory of this process that others may open: on CPU a file without a name, so that nothing is left behind whoever is killed; on a device
memory of the allocator, by an ipc handle."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.multiprocessing import reductions


@dataclass(frozen=True)
class FileHandle:
    """Example: FileHandle(path="/proc/812/fd/9", size=4096)."""

    path: str
    """Its maker's open file, seen through /proc: the reader must share its PID namespace and user."""
    size: int


@dataclass(frozen=True)
class IpcHandle:
    """What torch says of memory on a device for a process that sees the same device (torch.multiprocessing.reductions)."""

    device: int
    memory: bytes
    """Names an allocation of the driver's, which the memory is a part of."""
    size: int
    offset: int
    counter: bytes
    """Names the count of those who have it open: it is not given back before they are done."""
    counter_offset: int
    event: bytes
    waits_for_event: bool


MemoryHandle = FileHandle | IpcHandle


class SharedMemory(Protocol):
    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes]; nobody keeps it."""

    def handle(self) -> MemoryHandle:
        """For one reader, who must open it: on a device the memory is kept until he has let it go."""

    def close(self) -> None:
        """Gives it back."""


class MemoryFile:
    """Whoever has opened it keeps it."""

    def __init__(self, num_bytes: int) -> None:
        self._fd = os.memfd_create("mindspeed_mm_rl", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, num_bytes)
        self._handle = FileHandle(f"/proc/{os.getpid()}/fd/{self._fd}", num_bytes)

    def tensor(self) -> torch.Tensor:
        return open_file(self._handle)

    def handle(self) -> FileHandle:
        return self._handle

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_file(handle: FileHandle) -> torch.Tensor:
    """uint8. Raises ValueError when it cannot be opened (its maker gone, or another node, container or user)."""
    try:
        fd = os.open(handle.path, os.O_RDWR)
    except OSError as error:
        raise ValueError(
            f"weights cannot be read from {handle.path} ({error.strerror}): the trainer must be alive, on this node and in this container"
        ) from error
    try:
        # torch.frombuffer asks for a writable buffer.
        return torch.frombuffer(mmap.mmap(fd, handle.size), dtype=torch.uint8)
    finally:
        os.close(fd)


class AllocatedMemory:
    """On a device."""

    def __init__(self, num_bytes: int, where: torch.device, give_back: Callable[[], None]) -> None:
        """give_back: what the allocator holds for nobody."""
        self._memory: torch.Tensor | None = torch.empty(num_bytes, dtype=torch.uint8, device=where)
        self._give_back = give_back

    def tensor(self) -> torch.Tensor:
        assert self._memory is not None
        return self._memory

    def handle(self) -> IpcHandle:
        _, arguments = reductions.reduce_tensor(self.tensor())
        return IpcHandle(*arguments[6:10], *arguments[11:15])

    def close(self) -> None:
        self._memory = None
        self._give_back()


def open_allocated(handle: IpcHandle, rebuild: Callable[..., torch.Tensor]) -> torch.Tensor:
    """uint8. rebuild: the other half of torch's reduce_tensor."""
    about: Any = (torch.Tensor, (handle.size,), (1,), 0, torch.storage.TypedStorage, torch.uint8)
    shared = (handle.device, handle.memory, handle.size, handle.offset)
    return rebuild(*about, *shared, False, handle.counter, handle.counter_offset, handle.event, handle.waits_for_event)
