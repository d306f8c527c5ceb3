"""Files of tensors whose every byte has its place before one tensor is made, so that several threads write one file and none holds it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mindspeed_mm_rl.models.names import Shape

_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn comes, in parts: blocks of rows, one behind the other.

    A weight that is joined of others is written out of their pages as they lie; nothing has to be copied into one place first.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFile(Protocol):
    """begin, then put for every tensor in any order, then end."""

    path: Path
    tensors: Sequence[Pending]

    def begin(self, descriptor: int) -> None: ...

    def offset(self, index: int) -> int: ...

    def written(self, index: int, content: memoryview) -> None:
        """What the file must know of a tensor's bytes; called for each part in their order."""

    def end(self, descriptor: int) -> None: ...


def write_file(file: TensorFile) -> None:
    """The whole file, one tensor after the other."""
    descriptor = create(file)
    try:
        file.begin(descriptor)
        for index in range(len(file.tensors)):
            put(file, index, descriptor)
        file.end(descriptor)
    finally:
        os.close(descriptor)


def create(file: TensorFile) -> int:
    """The descriptor of a new file in a folder that is made if need be."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def put(file: TensorFile, index: int, descriptor: int) -> None:
    """Makes one tensor and writes it to its place; different tensors may be put at the same time."""
    pending = file.tensors[index]
    start = offset = file.offset(index)
    for part in pending.parts():
        assert part.dtype == pending.dtype, pending
        content = memoryview(part.detach().contiguous().flatten().view(torch.uint8).numpy())
        file.written(index, content)
        write_at(descriptor, offset, content)
        offset += len(content)
    assert offset - start == pending.nbytes, pending


def read_ahead(tensor: Tensor) -> None:
    """Asks the kernel for all pages of a tensor that lies in a mapped file: one large read instead of many small ones, a hint only."""
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.is_contiguous():
        length = tensor.data_ptr() + tensor.nbytes - start
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def write_at(descriptor: int, offset: int, content: memoryview | bytes) -> None:
    done = 0
    view = memoryview(content)
    while done < len(view):
        # A call writes 2 GiB at most.
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)
