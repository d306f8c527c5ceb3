"""The reference's log-probs of pairs, kept on disk: the reference never changes, so one forward pass per pair is enough.

folder/<weights, model and type>/<random name>.safetensors    a block of pairs: keys [P, 32], lengths [P, 2], values, the chosen one's first

A block appears whole or not at all; what a killed run had not written yet is computed again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mindspeed_mm_rl.config.plan import TrainPlan

_BLOCK_PAIRS = 512
_FOLDER_MODE, _FILE_MODE = 0o750, 0o640
_PARTIAL = ".partial"
_MODEL_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")

PairLogprobs = tuple[torch.Tensor, torch.Tensor]
"""Of the tokens of the chosen and of the rejected response, float32."""


@dataclass(frozen=True)
class _Place:
    block: Path
    start: int
    lengths: tuple[int, int]


class ReferenceCache:
    """Example: cache.add(pair.key, (chosen, rejected)); cache.flush(); ReferenceCache(same folder).get(pair.key)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[bytes, _Place] = {}
        self._pending: dict[bytes, PairLogprobs] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=_FOLDER_MODE)
        for unfinished in folder.glob(f"*{_PARTIAL}"):
            unfinished.unlink()
        for block in sorted(folder.glob("*.safetensors")):
            # A block that a power cut has damaged is missing, and filled again.
            with suppress(SafetensorError, OSError):
                self._places |= _places_in(block)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places or bytes.fromhex(key) in self._pending

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def get(self, key: str) -> PairLogprobs:
        """Raises KeyError for a pair that isn't here."""
        digest = bytes.fromhex(key)
        if digest in self._pending:
            return self._pending[digest]
        place = self._places[digest]
        with safe_open(place.block, framework="pt") as block:
            values = block.get_slice("values")[place.start : place.start + sum(place.lengths)]
        chosen, rejected = values.split(place.lengths)
        return chosen, rejected

    def add(self, key: str, logprobs: PairLogprobs) -> None:
        self._pending[bytes.fromhex(key)] = logprobs
        if len(self._pending) >= _BLOCK_PAIRS:
            self.flush()

    def flush(self) -> None:
        """Writes what is new."""
        if not self._pending:
            return
        lengths = torch.tensor([[len(part) for part in pair] for pair in self._pending.values()], dtype=torch.int32)
        keys = torch.frombuffer(bytearray(b"".join(self._pending)), dtype=torch.uint8).view(len(self._pending), -1)
        block = self.folder / f"{secrets.token_hex(8)}.safetensors"
        unfinished = block.with_suffix(_PARTIAL)
        values = torch.cat([part for pair in self._pending.values() for part in pair])
        save_file({"keys": keys, "lengths": lengths, "values": values}, unfinished)
        unfinished.chmod(_FILE_MODE)
        _sync(unfinished)
        unfinished.rename(block)
        self._places |= _places_in(block)
        self._pending.clear()


def cache_folder(output: Path, plan: TrainPlan, weights_digest: str) -> Path:
    """Another one for other weights, another model, another type, or another normalisation of pixels, by which pictures have their keys.

    weights_digest: of the reference (models/weight_digest.py).
    """
    model = b"".join(file.read_bytes() for name in _MODEL_FILES if (file := Path(plan.hf_path) / name).is_file())
    name = hashlib.sha256(f"{weights_digest} {plan.dtype} ".encode() + model).hexdigest()[:16]
    return output / "reference_logprobs" / name


def _places_in(block: Path) -> dict[bytes, _Place]:
    with safe_open(block, framework="pt") as stored:
        keys, lengths = stored.get_tensor("keys"), stored.get_tensor("lengths")
    ends = lengths.sum(-1).cumsum(0).tolist()
    places = zip(keys, [0, *ends], lengths.tolist(), strict=False)
    return {bytes(key.tolist()): _Place(block, start, (chosen, rejected)) for key, start, (chosen, rejected) in places}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
