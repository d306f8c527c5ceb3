"""Pictures dealt out to the processes that hold a vision encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mindspeed_mm_rl.config.plan import TrainPlan
from mindspeed_mm_rl.data.packing import balanced_shares
from mindspeed_mm_rl.types import ImageInput
from mindspeed_mm_rl.workers.calls import Call, answers
from mindspeed_mm_rl.workers.failure import Member


@dataclass(frozen=True)
class EncodedTables:
    """Finished tables {key: ImageFeatures} in the object store, which the driver never holds."""

    table_of: dict[str, Any]
    """Picture's key -> object ref of the table that it is in."""
    num_encoded: int
    """Pictures that went through an encoder, as the encoders count them."""

    def tables(self) -> list[Any]:
        return list(dict.fromkeys(self.table_of.values()))


class Encoder(Protocol):
    def encode(self, images: dict[str, ImageInput]) -> EncodedTables: ...


def replicas(members: Sequence[Member], train: TrainPlan) -> list[list[Member]]:
    """The processes that hold a whole encoder together, for each copy of it: those of one tensor-parallel group of the first stage.

    Ranks count tensor parallel fastest and pipeline stages slowest. Example: two lists of two for tensor 2, pipeline 2 and 8 members.
    """
    size = train.tensor_parallel_size
    return [list(members[first : first + size]) for first in range(0, len(members) // train.pipeline_parallel_size, size)]


def dealt(images: dict[str, ImageInput], count: int) -> list[list[str]]:
    """Keys for each of `count` encoders, balanced by patches."""
    keys = list(images)
    shares = balanced_shares([math.prod(images[key].grid_thw) for key in keys], count)
    return [[keys[i] for i in share] for share in shares]


def encode(
    members: Sequence[Member], train: TrainPlan, images: dict[str, ImageInput], timeout_seconds: float, verb: str = "encode"
) -> EncodedTables:
    """Every picture once. verb: of the workers. Raises as workers/calls.py says."""
    import ray

    table_of: dict[str, Any] = {}
    counted: list[Call] = []
    copies = replicas(members, train)
    for copy, keys in zip(copies, dealt(images, len(copies)), strict=True):
        if not keys:
            continue
        share = ray.put({key: images[key] for key in keys})
        for member in copy:
            is_first = member is copy[0]
            table, count = getattr(member.actor, verb).options(num_returns=2).remote(share, is_first)
            # The count says that the table is there, or why not, without bringing it here.
            counted.append(Call(member, count, f"{len(keys)} pictures"))
            if is_first:
                table_of |= dict.fromkeys(keys, table)
    return EncodedTables(table_of, sum(answers(counted, timeout_seconds, "vision encoder")))
