"""The shared-memory carrier: what one process writes is what another one reads, and mistakes are named."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from mindspeed_mm_rl.platforms.shared_memory import FileHandle, IpcHandle, open_allocated
from mindspeed_mm_rl.weights.device import Address, Announcement, Arrivals, Inbox, chunks_of
from mindspeed_mm_rl.weights.host import HostBuffer, WeightHandle, joined, open_views
from tests.host_weights import fill, new_buffer

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "odd": torch.arange(5, dtype=torch.int64),
}


def _sums(handle: WeightHandle, answers: multiprocessing.Queue) -> None:
    views = dict(open_views(handle))
    answers.put({name: (str(tensor.dtype), tuple(tensor.shape), float(tensor.sum())) for name, tensor in views.items()})
    views["odd"][0] = 7


def test_another_process_reads_what_was_written_and_may_write_beside() -> None:
    buffer = new_buffer(TENSORS.items())
    handle = pickle.loads(pickle.dumps(fill(buffer, TENSORS.items())))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    other = context.Process(target=_sums, args=(handle, answers))
    other.start()
    found = answers.get(timeout=60)
    other.join()
    assert found == {
        "matrix": ("torch.float32", (2, 3), 15.0),
        "scalar": ("torch.bfloat16", (), 2.5),
        "empty": ("torch.float32", (0, 4), 0.0),
        "odd": ("torch.int64", (5,), 10.0),
    }
    assert dict(open_views(handle))["odd"].tolist() == [7, 1, 2, 3, 4]


def test_rewriting_in_place_is_seen_through_the_same_handle() -> None:
    buffer = new_buffer(TENSORS.items())
    views = dict(open_views(fill(buffer, TENSORS.items())))
    second = fill(buffer, [(name, tensor + 1) for name, tensor in TENSORS.items()])
    assert second == buffer.handle()
    assert views["odd"].tolist() == [1, 2, 3, 4, 5]


def test_who_has_mapped_it_outlives_its_maker() -> None:
    buffer = new_buffer(TENSORS.items())
    views = dict(open_views(fill(buffer, TENSORS.items())))
    buffer.close()
    assert views["matrix"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_opening_it_after_its_maker_has_closed_says_so() -> None:
    buffer = new_buffer(TENSORS.items())
    handle = buffer.handle()
    buffer.close()
    with pytest.raises(ValueError, match="the trainer must be alive"):
        open_views(handle)


def test_parts_of_a_model_are_read_as_one() -> None:
    text, vision = new_buffer([("matrix", TENSORS["matrix"])]), new_buffer([("odd", TENSORS["odd"])])
    handles = {"here": fill(text, [("matrix", TENSORS["matrix"])])}
    whole = joined(handles, {"here": fill(vision, [("odd", TENSORS["odd"])])})["here"]
    assert [slot.name for slot in whole.slots] == [name for name, _ in open_views(whole)] == ["matrix", "odd"]
    assert dict(open_views(whole))["odd"].tolist() == TENSORS["odd"].tolist()


def test_a_name_that_comes_twice_and_an_empty_buffer_are_refused() -> None:
    with pytest.raises(ValueError, match="a is listed twice"):
        HostBuffer([("a", (1,), torch.float32), ("a", (1,), torch.float32)])
    with pytest.raises(ValueError, match="there is nothing to publish"):
        HostBuffer([])


def test_torch_finds_every_field_of_an_ipc_handle_in_its_place() -> None:
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    handle = IpcHandle(0, b"memory", 4096, 512, b"counter", 64, b"event", True)
    asked = open_allocated(handle, lambda *arguments: dict(zip(names, arguments, strict=True)))
    assert {name: asked[name] for name in names[names.index("storage_device") :]} == {
        "storage_device": 0,
        "storage_handle": b"memory",
        "storage_size_bytes": 4096,
        "storage_offset_bytes": 512,
        "requires_grad": False,
        "ref_counter_handle": b"counter",
        "ref_counter_offset": 64,
        "event_handle": b"event",
        "event_sync_required": True,
    }
    assert (asked["tensor_size"], asked["tensor_stride"], asked["tensor_offset"], asked["dtype"]) == ((4096,), (1,), 0, torch.uint8)


def test_chunks_hold_whole_tensors_up_to_their_size_and_a_larger_one_alone() -> None:
    """Each place is a multiple of 64 bytes."""
    lengths = {"a": 60, "b": 64, "c": 1, "d": 300, "e": 64, "f": 64, "g": 1}
    chunks = chunks_of(((name, (length,), torch.uint8) for name, length in lengths.items()), max_bytes=128)
    assert [[(slot.name, slot.offset) for slot in chunk] for chunk in chunks] == [
        [("a", 0), ("b", 64)], [("c", 0)], [("d", 0)], [("e", 0), ("f", 64)], [("g", 0)]
    ]  # fmt: skip


def test_parts_of_a_model_are_taken_up_in_one_order_whoever_comes_first() -> None:
    """Two readers with different orders: each waits for the rank that sends to the other one."""

    def order(*names: str) -> list[str]:
        pipes = [multiprocessing.Pipe() for _ in names]
        for name, (_, rank) in zip(names, pipes, strict=True):
            rank.send(Announcement(FileHandle("", 0), chunks_of([(name, (1,), torch.uint8), ("z", (1,), torch.uint8)], 64)))
        return [slot.name for slot in Arrivals([reader for reader, _ in pipes]).slots]

    assert order("text", "vision") == order("vision", "text") == ["text", "z", "vision", "z"]


def _strangers_first(address: Address) -> list[type]:
    errors = []
    with Client(address.name) as rude:
        rude.send_bytes(b"x" * 1000)
    for key in (b"a guess", address.key):
        try:
            with Client(address.name, authkey=key) as rank:
                rank.send(Announcement(FileHandle("", 0), chunks_of([("odd", (1,), torch.uint8)], 64)))
                rank.recv_bytes()
        except (multiprocessing.AuthenticationError, EOFError) as error:
            errors.append(type(error))
    return errors


def test_who_does_not_know_the_key_of_an_inbox_is_sent_away_and_holds_up_nobody() -> None:
    """Its name can be read by every user of the machine."""
    inbox = Inbox()
    assert repr(inbox.address.key) not in repr(inbox.address)
    with ThreadPoolExecutor(1) as thread:
        told = thread.submit(_strangers_first, inbox.address)
        with inbox.accepted(1) as arrivals:
            assert [slot.name for slot in arrivals.slots] == ["odd"]
        assert told.result(10) == [multiprocessing.AuthenticationError, EOFError]
