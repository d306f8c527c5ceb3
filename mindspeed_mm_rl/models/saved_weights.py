"""Model weights out of a torch_dist folder (torch.distributed.checkpoint, as megatron writes it), without megatron and without pickle.

Tensors are read one by one; a layer that megatron stacked with its siblings under one key is read alone.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

METADATA_FILE = ".metadata"
VISION_FOLDER = "vision"
"""In a save, beside the folder of a network whose vision encoder has processes of its own."""
COMMON_FILE = "common.pt"
"""What megatron keeps beside the shards: parameter groups, schedule, random state."""
_MODEL_PREFIX = "model."
_MODEL_ROOTS = ("text_decoder.", "image_encoder.")
_STACKED = re.compile(r"^(?P<block>.+?\.layers)\.(?!\d+\.)(?P<rest>.+)$")

_OPEN_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_OPEN_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
# Megatron up to 0.15 pickles subclasses of its own; the fields that matter here are those of the torch classes.
_STAND_INS: dict[tuple[str, str], type] = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): SavePlan,
}


class _MetadataUnpickler(pickle.Unpickler):
    """`.metadata` is a pickle: only the data classes that torch.distributed.checkpoint itself puts there are built."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if "." not in name and module in (*_OPEN_MODULES, "torch", *(allowed for allowed, _ in _OPEN_NAMES)):
            value = getattr(importlib.import_module(module), name, None)
            if (module, name) in _OPEN_NAMES or isinstance(value, torch.dtype) or _is_data_class(value, module):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")


def _is_data_class(value: Any, module: str) -> bool:
    return (
        module in _OPEN_MODULES
        and isinstance(value, type)
        and value.__module__ == module
        and (issubclass(value, Enum) or "__dataclass_fields__" in vars(value))
    )


@dataclass(frozen=True)
class _Location:
    """Where a weight lies: the folder, the key in it, and its row when its block is stacked."""

    folder: Path
    key: str
    layer: int | None


class _TargetPlanner(DefaultLoadPlanner):
    """Copies every chunk that is read into its place in one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self.target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dim, offset, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: resolve_tensor gave a view of the target."""


class SavedWeights(Mapping[str, Tensor]):
    """The model of a torch_dist folder by megatron name (no `model.` prefix, layer numbers in place); reads a tensor when it is asked for.

    A vision encoder that the network itself doesn't have is that of the folder `vision` beside it.
    Raises ValueError when the folder's metadata cannot be read, or a tensor's file is missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = {part: _read_metadata(part) for part in shard_folders(folder)}
        found = [dict(_locations(part, metadata)) for part, metadata in self._metadata.items()]
        self._locations = {name: location for locations in reversed(found) for name, location in locations.items()}
        if not self._locations:
            raise ValueError(f"{folder} holds no model weights (keys that start with {_MODEL_PREFIX}{_MODEL_ROOTS[0]})")
        self.shapes = {name: self._shape(location) for name, location in self._locations.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, name: str) -> Tensor:
        location = self._locations[name]
        stored = self._stored(location)
        first = () if location.layer is None else (location.layer,)
        size = (*(1 for _ in first), *self.shapes[name])
        target = torch.empty(size, dtype=stored.properties.dtype)
        offsets = (*first, *(0 for _ in self.shapes[name]))
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(size))
        self._read(name, location.folder, create_read_items_for_chunk_list(location.key, stored, [chunk]), target)
        return target if location.layer is None else target[0]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(self._locations[name]).properties.dtype

    def _read(self, name: str, folder: Path, items: list[ReadItem], target: Tensor) -> None:
        if sum(_count(item.lengths) for item in items) != target.numel():
            raise ValueError(f"{folder}: {name} is not whole; the save lacks the shards of some rank")
        reader = FileSystemReader(folder)
        reader.set_up_storage_reader(self._metadata[folder], is_coordinator=True)
        try:
            reader.read_data(LoadPlan(items), _TargetPlanner(target)).wait()
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder}: {name} cannot be read, the save is damaged or incomplete ({error})") from error

    def _shape(self, location: _Location) -> tuple[int, ...]:
        size = tuple(self._stored(location).size)
        return size if location.layer is None else size[1:]

    def _stored(self, location: _Location) -> TensorStorageMetadata:
        return self._metadata[location.folder].state_dict_metadata[location.key]


def shard_folders(folder: Path) -> tuple[Path, ...]:
    """The torch_dist folders that hold one network: its own, and that of vision processes where there were any."""
    vision = folder.parent / VISION_FOLDER
    return (folder, vision) if folder.name != VISION_FOLDER and (vision / METADATA_FILE).is_file() else (folder,)


def refuse_code(folder: Path) -> None:
    """Raises ValueError when anything in a torch_dist folder that megatron's loader would unpickle holds more than data.

    megatron and torch read `.metadata` and the objects among the shards with an unrestricted unpickler, which runs whatever a save
    from elsewhere asks for; bytes that the restricted one accepts build the same harmless values in both.
    """
    metadata = _read_metadata(folder)
    if (folder / COMMON_FILE).is_file():
        _check_object(folder / COMMON_FILE, (folder / COMMON_FILE).read_bytes())
    for index, place in metadata.storage_data.items():
        path = folder / place.relative_path
        if path.parent != folder:
            raise ValueError(f"{folder / METADATA_FILE} points outside of its folder ({place.relative_path}): the save is not one of ours")
        # Tensors are read with weights_only=True by torch itself.
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            _check_object(path, _piece(path, place.offset, place.length))


def _piece(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read, the save is damaged or incomplete ({error})") from error


def _check_object(path: Path, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path} is damaged, or holds code that loading it would run ({reason}); nothing of it was run. Use another save, or give "
            "the weights alone as a Hugging Face folder (mm-convert mm_to_hf)"
        ) from error


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # unpickling damaged bytes may raise anything
        raise ValueError(f"{path} is not the metadata of a training save ({error})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} is not the metadata of a training save (it holds {type(metadata).__name__})")
    return metadata


def _locations(folder: Path, metadata: Metadata) -> Iterator[tuple[str, _Location]]:
    for key, stored in metadata.state_dict_metadata.items():
        name = key.removeprefix(_MODEL_PREFIX)
        if not name.startswith(_MODEL_ROOTS) or not isinstance(stored, TensorStorageMetadata):
            continue
        stacked = _STACKED.match(name)
        if stacked is None:
            yield name, _Location(folder, key, None)
            continue
        for layer in range(stored.size[0]):
            yield f"{stacked['block']}.{layer}.{stacked['rest']}", _Location(folder, key, layer)


def _count(lengths: torch.Size) -> int:
    return torch.Size(lengths).numel()
