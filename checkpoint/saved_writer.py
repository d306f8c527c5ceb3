"""A torch_dist folder (torch.distributed.checkpoint) written one tensor at a time: it is planned with shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from checkpoint.tensor_files import Pending

_PREFIX = "model."


class _LazyPlanner(DefaultSavePlanner):
    def __init__(self, tensors: Mapping[str, Pending]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        pending = self._tensors[write_item.index.fqn]
        parts = list(pending.parts())
        return parts[0] if len(parts) == 1 else torch.cat(parts).view(pending.shape)


def write_saved(folder: Path, tensors: list[Pending], version: float) -> None:
    """Weights under `model.` and the checkpoint's version, as MindSpeed-MM's hf_to_mm_dcp writes them.

    Raises what making a tensor raises, OSError when the disk is full.
    """
    folder.mkdir(parents=True)
    named = {_PREFIX + tensor.name: tensor for tensor in tensors}
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in named.items()}
    with warnings.catch_warnings():
        # One process is what is wanted here.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        try:
            distributed_checkpoint.save(
                {**empty, "checkpoint_version": version}, storage_writer=FileSystemWriter(folder), planner=_LazyPlanner(named)
            )
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise cause if isinstance(cause, ValueError) else OSError(f"{folder} could not be written: {cause}") from error
