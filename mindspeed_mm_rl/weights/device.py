"""Weights from the processes that train to the rollout processes on the same devices, chunk by chunk, in memory that both have open.

    reader: next ---------------------------> rank on its device: writes what it holds and what the other ranks send it, all at once
    reader: loads, waits for the device <---- there it is
    reader: next ---------------------------> ...
    reader: next (the last one is loaded) --> gives the memory back

Nobody waits for a reader that is gone: its rank goes on for the sake of the others. Who hangs is seen by whoever asked for all this.
"""

from __future__ import annotations

import errno
import secrets
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import torch.distributed as dist

from mindspeed_mm_rl.models.names import Shape
from mindspeed_mm_rl.models.placement import Piece
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.platforms.shared_memory import MemoryHandle, SharedMemory
from mindspeed_mm_rl.weights.host import TensorSlot, TensorSpec, Views, num_bytes, placed, views
from mindspeed_mm_rl.weights.push import MESSAGE_BYTES, OwnRegions, Weights, room_for, specs
from mindspeed_mm_rl.weights.regions import Region, messages, senders

CHUNK_BYTES = 512 << 20
"""Whole tensors of so many bytes are on the device twice; more only where one tensor has more."""
_NEXT, _THERE = b"next", b"there"


@dataclass(frozen=True)
class Address:
    """Where a reader waits for those who train. Example: Address("\\0mindspeed_mm_rl-1f0c...", b"...")."""

    name: str
    """Of a socket of this machine, without a file."""
    key: bytes = field(repr=False)
    """Both sides prove that they know it."""


@dataclass(frozen=True)
class Announcement:
    """What a rank tells its reader first."""

    memory: MemoryHandle
    chunks: tuple[tuple[TensorSlot, ...], ...]
    """What will lie there, one after the other."""


def chunks_of(tensors: Iterable[TensorSpec], max_bytes: int) -> tuple[tuple[TensorSlot, ...], ...]:
    """In their order, of at most max_bytes where no tensor alone has more."""
    chunks: list[list[TensorSpec]] = []
    room = 0
    for tensor in tensors:
        size = num_bytes(placed([tensor]))
        if not chunks or size > room:
            chunks.append([])
            room = max_bytes
        chunks[-1].append(tensor)
        room -= size
    return tuple(placed(chunk) for chunk in chunks)


class DevicePush:
    """One rank's part, kept for the whole run. Every call is made by all ranks at the same time."""

    def __init__(
        self,
        pieces: Sequence[Sequence[Piece]],
        weights: Weights,
        shapes: Mapping[str, Shape],
        chunk_bytes: int = CHUNK_BYTES,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        """As WeightPush."""
        self._rank, self._message_bytes = dist.get_rank(), message_bytes
        self._own = OwnRegions(pieces, weights)
        held = self._own.of_all(shapes)
        self.chunks = chunks_of(specs(shapes, held), chunk_bytes)
        chunk_of = {slot.name: number for number, chunk in enumerate(self.chunks) for slot in chunk}
        self._writes: list[list[Region]] = [[] for _ in self.chunks]
        for region in self._own:
            self._writes[chunk_of[region.name]].append(region)
        self._streams: list[dict[int, list[Region]]] = [defaultdict(list) for _ in self.chunks]
        """By chunk and rank: what that one sends to all others."""
        for region, rank in senders(held).items():
            self._streams[chunk_of[region.name]][rank].append(region)

    def send(self, weights: Weights, address: Address | None) -> None:
        """Returns when the reader at the address has loaded everything, or is gone; None: no one reads here, but elsewhere."""
        memory = device.shared_memory(max(map(num_bytes, self.chunks))) if address else None
        try:
            reader = _Reader(address, memory, self.chunks)
            for number in range(len(self.chunks)):
                reader.wait()
                self._gather(number, weights, memory)
                device.synchronize()
                reader.tell()
            reader.wait()
        finally:
            if memory:
                memory.close()

    def _gather(self, number: int, weights: Weights, memory: SharedMemory | None) -> None:
        """A chunk, from all ranks; into no memory for a rank that only sends."""
        whole = dict(views(memory.tensor(), self.chunks[number])) if memory else {}
        if memory:
            for region in self._writes[number]:
                region.in_whole(whole[region.name]).copy_(self._own.read(region, weights))
        for source, regions in sorted(self._streams[number].items()):
            for message in messages(regions, self._message_bytes):
                packed, places = room_for(message)
                if source == self._rank:
                    for piece, place in zip(message, places, strict=True):
                        place.copy_(piece.of(self._own.read(piece.region, weights)))
                dist.broadcast(packed, source)
                if source != self._rank and memory:
                    for piece, place in zip(message, places, strict=True):
                        piece.of(piece.region.in_whole(whole[piece.region.name])).copy_(place)


class _Reader:
    """As a rank sees it. There may be none, and it may die at any time."""

    def __init__(self, address: Address | None, memory: SharedMemory | None, chunks: tuple[tuple[TensorSlot, ...], ...]) -> None:
        self._connection: Connection | None = None
        if address and memory:
            try:
                self._connection = Client(address.name, authkey=address.key)
                self._connection.send(Announcement(memory.handle(), chunks))
            except (OSError, EOFError):
                self._connection = None

    def wait(self) -> None:
        """Until it asks for the next chunk."""
        try:
            if self._connection:
                self._connection.recv_bytes()
        except (OSError, EOFError):
            self._connection = None

    def tell(self) -> None:
        try:
            if self._connection:
                self._connection.send_bytes(_THERE)
        except OSError:
            self._connection = None


class Inbox:
    """Where one push arrives."""

    def __init__(self) -> None:
        self.address = Address(f"\0mindspeed_mm_rl-{uuid.uuid4()}", secrets.token_bytes())
        self._listener = Listener(self.address.name, backlog=8, authkey=self.address.key)

    @contextmanager
    def accepted(self, senders: int) -> Iterator[Arrivals]:
        """What comes from so many ranks that train, each with a part of the model. Where it ends, they are told."""
        with self._listener, ExitStack() as connections:
            yield Arrivals([connections.enter_context(self._accept()) for _ in range(senders)])

    def _accept(self) -> Connection:
        """The next one that knows the key: every user of the machine may knock."""
        while True:
            try:
                return self._listener.accept()
            except (AuthenticationError, EOFError):
                continue
            except OSError as error:
                # Without a number: what was said is no answer to a challenge.
                if error.errno not in (None, errno.EPIPE, errno.ECONNRESET):
                    raise


class Arrivals:
    """Weights that come chunk by chunk; what one chunk holds is only there until the next is asked for."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        sources: list[tuple[Connection, Announcement]] = [(connection, connection.recv()) for connection in connections]
        # The ranks of one part wait for each other: readers that began with different parts would wait for ever.
        self._sources = sorted(sources, key=lambda source: source[1].chunks[0][0].name)

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        """Of all chunks."""
        return tuple(slot for _, announcement in self._sources for chunk in announcement.chunks for slot in chunk)

    def chunks(self) -> Iterator[Views]:
        """The list is emptied when the next one is asked for: on a device memory is given back when nobody has it."""
        for connection, announcement in self._sources:
            memory = device.open_shared(announcement.memory)
            for table in announcement.chunks:
                connection.send_bytes(_NEXT)
                connection.recv_bytes()
                arrived = views(memory, table)
                yield arrived
                arrived.clear()
                device.synchronize()
            del memory
            connection.send_bytes(_NEXT)
