"""Weights that are spread over the processes that train, whole into one buffer on every node.

rank --writes what it holds--> its places in the buffer of its node (one rank made it, the others have mapped it)
rank --sends what no process of another node holds, in bounded messages--> rank there --writes it--> buffer of that node
------------------------------ when every rank has returned: readers may be told ------------------------------
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm_rl.models.names import Shape
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.models.weight_layout import separate_one
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.weights.host import HostBuffer, TensorSpec, WeightHandle, open_views
from mindspeed_mm_rl.weights.regions import Region, Slice, Transfer, check_whole, deal, messages, regions_of

Weights = Sequence[Mapping[str, torch.Tensor]]
"""Of a rank's networks, by the names of their pieces."""
MESSAGE_BYTES = 256 << 20
"""The most memory that a rank takes beside the buffer."""
_ALIGNMENT_BYTES = 16


class OwnRegions:
    """What this rank holds."""

    def __init__(self, pieces: Sequence[Sequence[Piece]], weights: Weights) -> None:
        """By network."""
        self._sources = {
            region: (network, piece, index)
            for network, own in enumerate(pieces)
            for piece in own
            for index, region in enumerate(regions_of(piece, str(weights[network][piece.name].dtype).removeprefix("torch.")))
        }
        """The network, its piece, and which of the piece's Hugging Face tensors."""

    def __iter__(self) -> Iterator[Region]:
        return iter(self._sources)

    def read(self, region: Region, weights: Weights) -> torch.Tensor:
        """In its view_shape."""
        network, piece, index = self._sources[region]
        return separate_one(piece.entry, weights[network][piece.name].detach(), index).reshape(region.view_shape)

    def of_all(self, shapes: Mapping[str, Shape]) -> list[list[Region]]:
        """By rank. On all ranks at once; raises ValueError, on all alike, when together they don't hold the whole of every tensor."""
        held = gathered(list(self))
        check_whole((region for regions in held for region in regions), shapes)
        return held


class WeightPush:
    """One rank's part of it, kept for the whole run. Every call is made by all ranks at the same time."""

    def __init__(
        self,
        pieces: Sequence[Sequence[Piece]],
        weights: Weights,
        shapes: Mapping[str, Shape],
        nodes: Sequence[str],
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        """pieces: what this rank holds, by network; shapes: of all whole Hugging Face tensors, by name; nodes: of all ranks, () = one.

        Raises ValueError, on all ranks alike, when they don't hold the whole of every tensor together.
        """
        nodes = nodes or [""] * dist.get_world_size()
        self._rank, self._message_bytes = dist.get_rank(), message_bytes
        self._own = OwnRegions(pieces, weights)
        held = self._own.of_all(shapes)
        dealt = deal(held, nodes)
        self._writes, self._streams = dealt.writes[self._rank], _streams(dealt.transfers, self._rank)
        leader = nodes.index(nodes[self._rank])
        self._buffer = HostBuffer(specs(shapes, held)) if leader == self._rank else None
        self._views = dict(open_views(gathered(self._buffer and self._buffer.handle())[leader]))

    def publish(self, weights: Weights) -> WeightHandle | None:
        """Rewrites the buffers. Returns the handle for readers of this node, on one rank of each node.

        Every reader of the last handle must have returned, and the buffers are whole when all ranks have returned.
        """
        for region in self._writes:
            region.in_whole(self._views[region.name]).copy_(self._own.read(region, weights))
        for (source, target), regions in self._streams:
            for message in messages(regions, self._message_bytes):
                packed, places = room_for(message)
                if source == self._rank:
                    for piece, place in zip(message, places, strict=True):
                        place.copy_(piece.of(self._own.read(piece.region, weights)))
                    dist.send(packed, target)
                else:
                    dist.recv(packed, source)
                    for piece, place in zip(message, places, strict=True):
                        piece.of(piece.region.in_whole(self._views[piece.region.name])).copy_(place)
        return self._buffer.handle() if self._buffer else None


def specs(shapes: Mapping[str, Shape], held: Sequence[Sequence[Region]]) -> list[TensorSpec]:
    """Of the whole tensors, with the dtypes in which they are held."""
    dtype_of = {region.name: getattr(torch, region.dtype) for regions in held for region in regions}
    return [(name, shape, dtype_of[name]) for name, shape in shapes.items()]


def gathered(own: Any) -> list[Any]:
    """By rank."""
    everybodys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, own)
    return everybodys


def _streams(transfers: Iterable[Transfer], rank: int) -> list[tuple[tuple[int, int], list[Region]]]:
    """What goes from whom to whom, as far as `rank` takes part in it. All ranks have one order, so that none waits for another that waits
    for it."""
    by_pair: dict[tuple[int, int], list[Region]] = defaultdict(list)
    for transfer in transfers:
        if rank in (transfer.source, transfer.target):
            by_pair[transfer.source, transfer.target].append(transfer.region)
    return sorted(by_pair.items(), key=itemgetter(0))


def room_for(message: Sequence[Slice]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Memory for a message, and the place of each slice in it."""
    starts, end = [], 0
    for piece in message:
        starts.append(end)
        end += -(-piece.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    memory = torch.empty(end, dtype=torch.uint8, device=device.current())
    places = [
        memory[start : start + piece.num_bytes].view(getattr(torch, piece.region.dtype)).view(piece.shape)
        for start, piece in zip(starts, message, strict=True)
    ]
    return memory, places
