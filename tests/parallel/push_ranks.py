"""One rank of weight pushes of a small model, on nodes that are only names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mindspeed_mm_rl.weights.host import WeightHandle, open_views
from mindspeed_mm_rl.weights.push import WeightPush
from tests.spread_weights import SPREADS

PUSHES = 2
_MESSAGE_BYTES = 200
"""A few rows of the larger tensors: most of them travel in several messages."""


def run(rank: int, world: int, address: str, name: str, nodes: Sequence[str]) -> list[bool]:
    """Whether what a reader of this rank's node finds after each push is the whole model as it is then."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=world)
    try:
        spread, pieces = SPREADS[name], SPREADS[name].pieces(rank)
        models = [spread.whole(seed) for seed in range(PUSHES)]
        push = WeightPush(pieces, spread.held(rank, models[0]), spread.shapes(), nodes, _MESSAGE_BYTES)
        found = []
        for whole in models:
            handles: list[WeightHandle | None] = [None] * world
            dist.all_gather_object(handles, push.publish(spread.held(rank, whole)))
            handle = handles[list(nodes).index(nodes[rank])]
            read = dict(open_views(handle))
            found.append(read.keys() == whole.keys() and all(torch.equal(read[key], whole[key]) for key in whole))
            assert {node for node, given in zip(nodes, handles, strict=True) if given} == set(nodes)
            assert len({given.path for given in handles if given}) == len(set(nodes))
            # Readers are done before the next push begins.
            dist.barrier()
        return found
    finally:
        dist.destroy_process_group()
