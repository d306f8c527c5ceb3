"""Which process writes which part of every weight where, so that each node gets the whole model once: a pure function of what every
process holds and of the node that it runs on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mindspeed_mm_rl.models.names import Shape
from mindspeed_mm_rl.models.placement import Cut, Piece


@dataclass(frozen=True)
class Region:
    """A part of a Hugging Face tensor. Example: Region("lm_head.weight", Cut(0, 256, 512), (256, 128), "float32")."""

    name: str
    cut: Cut | None
    """None: the whole tensor."""
    shape: Shape
    """Of the part."""
    dtype: str
    """Name of the torch dtype."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def view_shape(self) -> Shape:
        """With blocks as a dimension of their own: what the part is in the whole tensor without a copy."""
        if self.cut is None or self.cut.blocks == 1:
            return self.shape
        dim, blocks = self.cut.dim, self.cut.blocks
        return (*self.shape[:dim], blocks, self.shape[dim] // blocks, *self.shape[dim + 1 :])

    def in_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of the whole tensor, in view_shape."""
        if self.cut is None:
            return tensor
        dim, blocks, start, length = self.cut.dim, self.cut.blocks, self.cut.start, self.cut.stop - self.cut.start
        return tensor.narrow(dim, start, length) if blocks == 1 else tensor.unflatten(dim, (blocks, -1)).narrow(dim + 1, start, length)


@dataclass(frozen=True)
class Transfer:
    """A region that no process of a node holds."""

    region: Region
    source: int
    """Rank that holds it."""
    target: int
    """Rank of that node that writes it."""


@dataclass(frozen=True)
class Deal:
    """Who does what, for all ranks the same."""

    writes: tuple[tuple[Region, ...], ...]
    """By rank: what it holds and writes into the buffer of its own node."""
    transfers: tuple[Transfer, ...]


def regions_of(piece: Piece, dtype: str) -> list[Region]:
    """In the order of piece.entry.hf."""
    entry = piece.entry
    return [Region(name, cut, shape, dtype) for name, cut, shape in zip(entry.hf, piece.cuts, entry.hf_shapes, strict=True)]


def deal(held: Sequence[Sequence[Region]], nodes: Sequence[str]) -> Deal:
    """Every region once into the buffer of every node, by a process of that node, from its own memory where one holds it there.

    held, nodes: by rank. Among those that could do as well the one with the fewest bytes to move so far is taken.
    """
    holders: dict[Region, list[int]] = defaultdict(list)
    for rank, regions in enumerate(held):
        for region in regions:
            holders[region].append(rank)
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        ranks_of[node].append(rank)
    load = [0] * len(held)

    def take(ranks: Iterable[int], region: Region) -> int:
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += region.num_bytes
        return rank

    writes: list[list[Region]] = [[] for _ in held]
    transfers: list[Transfer] = []
    for region, ranks in holders.items():
        on_node: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            on_node[nodes[rank]].append(rank)
        for node, others in ranks_of.items():
            if node in on_node:
                writes[take(on_node[node], region)].append(region)
            else:
                transfers.append(Transfer(region, take(ranks, region), take(others, region)))
    return Deal(tuple(map(tuple, writes)), tuple(transfers))


def senders(held: Sequence[Sequence[Region]]) -> dict[Region, int]:
    """Who sends a region to all others: of its holders the one with the fewest bytes so far. What all hold is sent by nobody.

    held: by rank.
    """
    holders: dict[Region, list[int]] = defaultdict(list)
    for rank, regions in enumerate(held):
        for region in regions:
            holders[region].append(rank)
    load, found = [0] * len(held), {}
    for region, ranks in holders.items():
        if len(ranks) < len(held):
            found[region] = min(ranks, key=lambda rank: (load[rank], rank))
            load[found[region]] += region.num_bytes
    return found


def check_whole(regions: Iterable[Region], shapes: Mapping[str, Shape]) -> None:
    """Raises ValueError unless the regions that somebody holds make up every tensor. shapes: of the whole tensors, by name."""
    found: dict[str, int] = defaultdict(int)
    for region in set(regions):
        found[region.name] += math.prod(region.shape)
    for name, shape in shapes.items():
        if found[name] != math.prod(shape):
            raise ValueError(f"weight push: the processes that train hold {found[name]} numbers of {name}, which has {math.prod(shape)}")
    if unknown := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"weight push: config.json has no {unknown[0]} ({len(unknown)} unknown tensors)")


@dataclass(frozen=True)
class Slice:
    """Some of a region. Example: Slice(region, axis=0, start=0, stop=1024)."""

    region: Region
    axis: int
    """Of Region.view_shape."""
    start: int
    stop: int

    @property
    def shape(self) -> Shape:
        shape = self.region.view_shape
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.region.dtype).itemsize

    def of(self, view: torch.Tensor) -> torch.Tensor:
        """view: the region, in view_shape."""
        return view.narrow(self.axis, self.start, self.stop - self.start)


def messages(regions: Iterable[Region], max_bytes: int) -> Iterator[list[Slice]]:
    """The regions, one behind the other, in messages of at most max_bytes; more only where one row of a tensor has more."""
    message: list[Slice] = []
    room = max_bytes
    for region in regions:
        shape = region.view_shape
        axis = max(range(len(shape)), key=lambda axis: shape[axis])
        row_bytes, start = region.num_bytes // shape[axis], 0
        while start < shape[axis]:
            if message and room < row_bytes:
                yield message
                message, room = [], max_bytes
            stop = min(shape[axis], start + max(1, room // row_bytes))
            message.append(Slice(region, axis, start, stop))
            room -= (stop - start) * row_bytes
            start = stop
    if message:
        yield message
