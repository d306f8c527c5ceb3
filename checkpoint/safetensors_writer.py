"""Safetensors files laid out before any tensor is made, and the index beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from checkpoint.tensor_files import Pending, write_at, write_file
from mindspeed_mm_rl.models.weight_files import INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class SafetensorsFile:
    """A TensorFile."""

    def __init__(self, path: Path, tensors: Sequence[Pending]) -> None:
        self.path = path
        # Wide types first, so that every tensor is aligned to its own width.
        self.tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._starts: list[int] = []
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.nbytes
            self._starts.append(start)
            header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text

    def begin(self, descriptor: int) -> None:
        write_at(descriptor, 0, self._header)

    def offset(self, index: int) -> int:
        return len(self._header) + self._starts[index]

    def written(self, index: int, content: memoryview) -> None:
        """Nothing of a tensor's bytes is in the header."""

    def end(self, descriptor: int) -> None:
        """The header was whole from the beginning."""


def write_safetensors(folder: Path, tensors: Sequence[Pending], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """One model.safetensors, or numbered files of at most max_bytes with an index."""
    files = plan_shards(tensors, {}, max_bytes)
    for name, shard in files.items():
        write_file(SafetensorsFile(folder / name, shard))
    write_index(folder, files)


def plan_shards(tensors: Sequence[Pending], known: Mapping[str, str], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[Pending]]:
    """File name -> its tensors: by `known` (an index's weight_map) where it names all, else in order, each up to max_bytes."""
    if tensors and all(tensor.name in known for tensor in tensors):
        files: dict[str, list[Pending]] = {}
        for tensor in tensors:
            files.setdefault(known[tensor.name], []).append(tensor)
        return dict(sorted(files.items()))
    shards: list[list[Pending]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Sequence[Pending]]) -> None:
    """Nothing for a single file: there is nothing to look up."""
    if set(files) == {SINGLE_FILE}:
        return
    total = sum(tensor.nbytes for shard in files.values() for tensor in shard)
    weight_map = {tensor.name: name for name, shard in files.items() for tensor in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n")
