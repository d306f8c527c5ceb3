"""One rank of weight pushes through memory of the device, or one of the readers; both are processes of their own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mindspeed_mm_rl.platforms import processes
from mindspeed_mm_rl.weights.device import Address, DevicePush, Inbox
from mindspeed_mm_rl.weights.host import WeightHandle, open_views
from mindspeed_mm_rl.weights.push import WeightPush
from tests.spread_weights import SPREADS, Spread

PUSHES = 2
Digests = dict[str, bytes]


def run(rank: int, world: int, address: str, spread: Spread | str, readers: Sequence[int], chunk_bytes: int, message_bytes: int) -> list:
    """Of a rank that trains: what the host carrier has after each push, and by how many bytes the process grew in the other one; of a
    reader what it got, and the largest chunk. readers: the ranks that have one; dying ones as -1 - rank."""
    torch.set_num_threads(1)
    spread = SPREADS[spread] if isinstance(spread, str) else spread
    host, port = address.split(":")
    store = dist.TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False)
    if rank >= spread.world:
        return _read(store, readers[rank - spread.world])
    dist.init_process_group("gloo", store=dist.PrefixStore("ranks", store), rank=rank, world_size=spread.world)
    try:
        return _train(rank, store, spread, readers, chunk_bytes, message_bytes)
    finally:
        dist.destroy_process_group()


def _train(rank: int, store: dist.Store, spread: Spread, readers: Sequence[int], chunk_bytes: int, message_bytes: int) -> list:
    pieces, models = spread.pieces(rank), [spread.held(rank, spread.whole(seed)) for seed in range(PUSHES)]
    push = DevicePush(pieces, models[0], spread.shapes(), chunk_bytes, message_bytes)
    host = WeightPush(pieces, models[0], spread.shapes(), ())
    found, grown = [], []
    for number, weights in enumerate(models):
        dies = -1 - rank in readers
        address = _address(store, number, rank) if rank in readers or dies and number == 0 else None
        processes.reset_peak_resident()
        before = processes.peak_resident_bytes()
        push.send(weights, address)
        grown.append(processes.peak_resident_bytes() - before)
        handles: list[WeightHandle | None] = [None] * spread.world
        dist.all_gather_object(handles, host.publish(weights))
        found.append(_digests(open_views(handles[0])))
        dist.barrier()
    return [found, max(grown)]


def _address(store: dist.Store, number: int, rank: int) -> Address:
    name, key = json.loads(store.get(f"{number}/{rank}"))
    return Address(name, bytes.fromhex(key))


def _read(store: dist.Store, reader: int) -> list:
    found, largest, rank, lists = [], 0, max(reader, -1 - reader), []
    for number in range(PUSHES):
        inbox, got = Inbox(), {}
        store.set(f"{number}/{rank}", json.dumps([inbox.address.name, inbox.address.key.hex()]))
        with inbox.accepted(1) as arrivals:
            for views in arrivals.chunks():
                assert not any(lists), "memory of a chunk that is over is still held"
                lists.append(views)
                got |= _digests(views)
                largest = max(largest, sum(view.nbytes for _, view in views))
                if reader < 0:
                    os._exit(9)
        assert [slot.name for slot in arrivals.slots] == list(got)
        found.append(got)
    return [found, largest]


def _digests(views: Sequence[tuple[str, torch.Tensor]]) -> Digests:
    return {name: hashlib.sha256(view.reshape(-1).view(torch.uint8).numpy()).digest() for name, view in views}
