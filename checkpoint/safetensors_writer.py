"""Safetensors files written as a stream, and the index beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from checkpoint.torch_writer import Pending, made
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


def write_safetensors_file(path: Path, tensors: Iterable[Pending]) -> None:
    """One file; holds one tensor in memory at a time."""
    # Wide types first, so that every tensor is aligned to its own width.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            file.write(memoryview(made(tensor).flatten().view(torch.uint8).numpy()))


def write_safetensors(folder: Path, tensors: Sequence[Pending], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """One model.safetensors, or numbered files of at most max_bytes with an index."""
    files = plan_shards(tensors, {}, max_bytes)
    for name, shard in files.items():
        write_safetensors_file(folder / name, shard)
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
