"""How fast weights get from processes that train to readers, by either carrier; one JSON line per run.

    python benchmarks/push.py                          two processes that share each layer, 0.3 GB in float32, a reader for each
    python benchmarks/push.py --ranks 1 --layers 64    one process with 4 GB; on a device its reader is on the same one

A reader copies every tensor whole into memory of its own, as a rollout engine of one process does. Times are from the call of all ranks
until the last reader is done, medians after the first push, which makes files and maps them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from mindspeed_mm_rl.models.rank_pieces import Grid
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.weights.device import CHUNK_BYTES, Address, DevicePush, Inbox
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.weights.push import WeightPush
from tests.rank_pool import RankPool
from tests.spread_weights import CONFIGS, Spread

CARRIERS = ("host", "device")
HANDLES = TypeAdapter(WeightHandle)
_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 4096}


def spread_of(ranks: int, layers: int) -> Spread:
    CONFIGS["benchmark"] = CONFIGS["text"] | _SIZES | {"num_hidden_layers": layers}
    return Spread("benchmark", ranks, Grid(((layers,),), tensor=ranks))


def process(number: int, processes: int, address: str, layers: int, pushes: int, chunk_bytes: int) -> dict[str, float]:
    """The first half are ranks, the others their readers."""
    torch.set_num_threads(1)
    ranks, (host, port) = processes // 2, address.split(":")
    store = dist.TCPStore(host, int(port), is_master=number == 0, wait_for_workers=False)
    spread = spread_of(ranks, layers)
    if number >= ranks:
        read(store, number - ranks, pushes)
        return {}
    dist.init_process_group(device.collective_backend(), store=dist.PrefixStore("ranks", store), rank=number, world_size=ranks)
    try:
        return train(store, spread, number, pushes, chunk_bytes)
    finally:
        dist.destroy_process_group()


def train(store: dist.Store, spread: Spread, rank: int, pushes: int, chunk_bytes: int) -> dict[str, float]:
    """Seconds by carrier."""
    where, pieces = device.current(), spread.pieces(rank)
    weights = [{name: tensor.to(where) for name, tensor in part.items()} for part in spread.held(rank, spread.whole(0))]
    push, files = DevicePush(pieces, weights, spread.shapes(), chunk_bytes), WeightPush(pieces, weights, spread.shapes(), ())

    def through_device(number: int) -> None:
        name, key = json.loads(store.get(f"address/{number}/{rank}"))
        push.send(weights, Address(name, bytes.fromhex(key)))

    def through_host(number: int) -> None:
        handle = files.publish(weights)
        dist.barrier()
        if handle:
            store.set(f"handle/{number}", HANDLES.dump_json(handle))
        store.wait([f"done/{number}/{rank}"])

    return {carrier: seconds(work, pushes) for carrier, work in zip(CARRIERS, (through_host, through_device), strict=True)}


def seconds(work: Callable[[int], None], pushes: int) -> float:
    """Of all ranks together."""
    took = []
    for number in range(pushes):
        dist.barrier()
        device.synchronize()
        start = time.perf_counter()
        work(number)
        dist.barrier()
        device.synchronize()
        took.append(time.perf_counter() - start)
    return median(took[1:])


def read(store: dist.Store, rank: int, pushes: int) -> None:
    own: dict[str, torch.Tensor] = {}

    def copy(views: list[tuple[str, torch.Tensor]]) -> None:
        for name, view in views:
            own.setdefault(name, torch.empty_like(view, device=device.current())).copy_(view)

    for number in range(pushes):
        for views in HANDLES.validate_json(store.get(f"handle/{number}")).chunks():
            copy(views)
        device.synchronize()
        store.set(f"done/{number}/{rank}", b"")
    for number in range(pushes):
        inbox = Inbox()
        store.set(f"address/{number}/{rank}", json.dumps([inbox.address.name, inbox.address.key.hex()]))
        with inbox.accepted(1) as arrivals:
            for views in arrivals.chunks():
                copy(views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes that train, each with a part of every layer: 1, 2 or 4")
    parser.add_argument("--layers", type=int, default=4, help="of some 60 MB")
    parser.add_argument("--pushes", type=int, default=6)
    parser.add_argument("--chunk-mib", type=int, default=CHUNK_BYTES >> 20)
    arguments = parser.parse_args()
    spread = spread_of(arguments.ranks, arguments.layers)
    gigabytes = sum(torch.Size(shape).numel() * 4 for shape in spread.shapes().values()) / 1e9
    with RankPool(seconds=1800.0) as pool:
        found = pool.run(2 * arguments.ranks, process, arguments.layers, arguments.pushes, arguments.chunk_mib << 20)[0]
    result = {"device": device.kind(), "ranks": arguments.ranks, "gigabytes": gigabytes, "chunk_mib": arguments.chunk_mib}
    result |= {f"{carrier}_seconds_per_gb": took / gigabytes for carrier, took in found.items()}
    result["device_over_host"] = found["device"] / found["host"]
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    main()
