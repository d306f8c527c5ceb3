"""One number for the weights of a folder, to tell whether two folders hold the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mindspeed_mm_rl.models.names import canonical_hf_name, entries, is_buffer
from mindspeed_mm_rl.models.rank_files import RankWeights
from mindspeed_mm_rl.models.saved_weights import shard_folders
from mindspeed_mm_rl.models.weight_files import WeightFolder, needs_layout, open_weights, read_config, recognise
from mindspeed_mm_rl.models.weight_layout import to_hf


def weight_digest(folder: str | Path, hf_path: str | Path) -> str:
    """sha256 over name, type and values of every weight: the same for a Hugging Face folder and for what mm-convert makes of it.

    Reads all weights, unless it has read these very files before. hf_path: the folder of config.json.
    Raises ValueError when the folder holds no weights, or those of another model.
    """
    found = recognise(folder)
    folders = shard_folders(found.weights) if found.kind == "training" else (found.weights,)
    files = [file for folder in folders for file in (sorted(folder.rglob("*")) if folder.is_dir() else [folder])]
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
    return _digest(found, str(hf_path), stamps)


@lru_cache(maxsize=8)
def _digest(found: WeightFolder, hf_path: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """stamps: what the cache tells changed files by."""
    config = read_config(hf_path)
    total = sum(len(entry.hf) for entry in entries(config))
    digest = hashlib.sha256()
    bar = tqdm(_in_hf_layout(found, config), total=total, desc="digest of the reference", unit="weight", disable=None, leave=False)
    for name, tensor in bar:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _in_hf_layout(found: WeightFolder, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """One weight at a time, in the order of the table of names."""
    if needs_layout(found):
        yield from RankWeights(found.ranks, config).items()
        return
    weights = open_weights(found)
    if found.kind != "hf":
        yield from to_hf(weights, config)
        return
    source = {canonical_hf_name(name): name for name in weights if not is_buffer(name)}
    for name in (name for entry in entries(config) for name in entry.hf):
        if name not in source:
            raise ValueError(f"{found.weights} has no {name}, which config.json asks for; take weights and config.json of one model")
        yield name, weights[source[name]]
