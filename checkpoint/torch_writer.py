"""model_optim_rng.pt as torch.save would write it: its zip entries are laid out before any tensor is made.

torch.save itself takes one object, and with it the whole model.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.tensor_files import Pending, write_at
from mindspeed_mm_rl.models.names import Shape

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
}
_ALIGNMENT = 64
"""Of every entry's content, so that it can be mapped."""
_PADDING_ID = 0x4246
_ZIP64_ID = 1
_LARGE = 0xFFFFFFFF
_MANY = 0xFFFF
_VERSION = b"3\n"
_ZIP_VERSION = 45
_1980 = 0x21


@dataclass(frozen=True)
class _Storage:
    """What persistent_id turns into torch's ("storage", class, key, device, length)."""

    key: str
    dtype: torch.dtype
    length: int


class _Record:
    """Pickled as torch pickles a contiguous tensor."""

    def __init__(self, storage: _Storage, shape: Shape) -> None:
        self.storage = storage
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(torch.Size(self.shape[axis + 1 :]).numel() for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, tuple(self.shape), stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.length)
        return None


@dataclass
class _Entry:
    name: bytes
    size: int
    header: int
    """Where its local header begins."""
    crc: int = 0

    @property
    def sizes(self) -> bytes:
        """The zip64 field of a content that is too large for the others."""
        return struct.pack("<HHQQ", _ZIP64_ID, 16, self.size, self.size) if self.size >= _LARGE else b""

    @property
    def content(self) -> int:
        """Where its content begins, behind a header that is padded to end there."""
        least = self.header + 30 + len(self.name) + len(self.sizes) + 4
        return -(-least // _ALIGNMENT) * _ALIGNMENT

    def local_header(self) -> bytes:
        shown = min(self.size, _LARGE)
        padding = self.content - self.header - 30 - len(self.name) - len(self.sizes) - 4
        extra = self.sizes + struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        fields = (_ZIP_VERSION, 0, 0, 0, _1980, self.crc, shown, shown, len(self.name), len(extra))
        return struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields) + self.name + extra

    def central_header(self) -> bytes:
        wide = [value for value in (self.size, self.size, self.header) if value >= _LARGE]
        extra = struct.pack(f"<HH{len(wide)}Q", _ZIP64_ID, 8 * len(wide), *wide) if wide else b""
        shown = min(self.size, _LARGE)
        fields = (_ZIP_VERSION, _ZIP_VERSION, 0, 0, 0, _1980, self.crc, shown, shown, len(self.name), len(extra), 0, 0, 0, 0)
        return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *fields, min(self.header, _LARGE)) + self.name + extra


class TorchFile:
    """What torch.save({**models, **others}, path) would write (a TensorFile).

    Raises ValueError for a type of number that torch's files have no name for.
    """

    def __init__(self, path: Path, models: Mapping[str, Sequence[Pending]], others: Mapping[str, Any]) -> None:
        self.path = path
        self.tensors = [tensor for tensors in models.values() for tensor in tensors]
        keys = iter(range(len(self.tensors)))
        content = {
            model: {tensor.name: _Record(_storage(str(next(keys)), tensor), tensor.shape) for tensor in tensors}
            for model, tensors in models.items()
        }
        header = io.BytesIO()
        _Pickler(header, protocol=2).dump({**content, **others})
        self._small = {"data.pkl": header.getvalue(), "byteorder": sys.byteorder.encode(), "version": _VERSION}
        self._entries: list[_Entry] = []
        self._end = 0
        for name, small in self._small.items():
            self._append(name, len(small))
        for index, tensor in enumerate(self.tensors):
            self._append(f"data/{index}", tensor.nbytes)

    def begin(self, descriptor: int) -> None:
        for entry, small in zip(self._entries, self._small.values(), strict=False):
            entry.crc = zlib.crc32(small)
            write_at(descriptor, entry.content, small)

    def offset(self, index: int) -> int:
        return self._entry(index).content

    def written(self, index: int, content: memoryview) -> None:
        entry = self._entry(index)
        entry.crc = zlib.crc32(content, entry.crc)

    def end(self, descriptor: int) -> None:
        for entry in self._entries:
            write_at(descriptor, entry.header, entry.local_header())
        directory = b"".join(entry.central_header() for entry in self._entries)
        write_at(descriptor, self._end, directory + _end_records(len(self._entries), len(directory), self._end))

    def _entry(self, index: int) -> _Entry:
        return self._entries[len(self._small) + index]

    def _append(self, name: str, size: int) -> None:
        entry = _Entry(f"{self.path.stem}/{name}".encode(), size, self._end)
        self._entries.append(entry)
        self._end = entry.content + size


def _storage(key: str, tensor: Pending) -> _Storage:
    if tensor.dtype not in _STORAGES:
        raise ValueError(f"{tensor.name} is of type {tensor.dtype}, which is not offered; convert the model to bfloat16 first")
    return _Storage(key, tensor.dtype, torch.Size(tensor.shape).numel())


def _end_records(count: int, size: int, start: int) -> bytes:
    """The zip64 records, which every reader takes, and the short one that points to them when its fields are too narrow."""
    fields = (44, _ZIP_VERSION, _ZIP_VERSION, 0, 0, count, count, size, start)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", *fields) + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    shown = min(count, _MANY)
    return wide + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, shown, shown, min(size, _LARGE), min(start, _LARGE), 0)
