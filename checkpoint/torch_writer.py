"""model_optim_rng.pt written as a stream: torch.save takes one object and with it the whole model, this takes one tensor at a time."""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn comes."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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


def write_torch_file(path: Path, models: Mapping[str, Sequence[Pending]], others: Mapping[str, Any]) -> None:
    """What torch.save({**models, **others}, path) would write, with one tensor in memory.

    Raises ValueError for a type of number that torch's files have no name for, OSError when the disk is full.
    """
    keys: dict[tuple[str, str], str] = {}
    content: dict[str, Any] = {}
    for model, tensors in models.items():
        content[model] = {}
        for tensor in tensors:
            if tensor.dtype not in _STORAGES:
                raise ValueError(f"{tensor.name} is of type {tensor.dtype}, which is not offered; convert the model to bfloat16 first")
            key = keys[model, tensor.name] = str(len(keys))
            content[model][tensor.name] = _Record(_Storage(key, tensor.dtype, torch.Size(tensor.shape).numel()), tensor.shape)
    header = io.BytesIO()
    _Pickler(header, protocol=2).dump({**content, **others})
    try:
        _write(path, header.getvalue(), [(keys[model, each.name], each) for model, tensors in models.items() for each in tensors])
    except RuntimeError as error:
        # torch's writer knows no OSError.
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error


def _write(path: Path, header: bytes, tensors: Sequence[tuple[str, Pending]]) -> None:
    writer = torch._C.PyTorchFileWriter(str(path))
    try:
        writer.write_record("data.pkl", header, len(header))
        writer.write_record("byteorder", sys.byteorder.encode(), len(sys.byteorder))
        for key, pending in tensors:
            tensor = made(pending)
            writer.write_record(f"data/{key}", _storage(tensor) if tensor.numel() else b"", tensor.nbytes)
        writer.write_end_of_file()
    except BaseException:
        # Without an end its destructor would write one and take the process down; while the traceback holds it, its file is open.
        with suppress(RuntimeError):
            writer.write_end_of_file()
        del writer
        raise


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """A storage of exactly the tensor's bytes, without a copy, though the tensor be a part of another's."""
    return torch.frombuffer(tensor.flatten().view(torch.uint8).numpy(), dtype=torch.uint8).untyped_storage()


def made(pending: Pending) -> Tensor:
    """The tensor, contiguous and as it was announced."""
    tensor = pending.make().detach().contiguous()
    assert tuple(tensor.shape) == tuple(pending.shape) and tensor.dtype == pending.dtype, pending
    return tensor
