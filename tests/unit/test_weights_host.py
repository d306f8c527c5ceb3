"""The shared-memory carrier: what the writer puts in is what another process reads, and mistakes are named."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import torch

from mindspeed_mm_rl.weights.host import HostBuffer, WeightHandle, read_views

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "odd": torch.arange(5, dtype=torch.int64),
}


def _buffer() -> HostBuffer:
    return HostBuffer((name, tensor.shape, tensor.dtype) for name, tensor in TENSORS.items())


def _sums(handle: WeightHandle, answers: multiprocessing.Queue) -> None:
    answers.put({name: (str(tensor.dtype), tuple(tensor.shape), float(tensor.sum())) for name, tensor in read_views(handle)})


def test_another_process_reads_what_was_written() -> None:
    buffer = _buffer()
    handle = pickle.loads(pickle.dumps(buffer.write(TENSORS.items())))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    reader = context.Process(target=_sums, args=(handle, answers))
    reader.start()
    found = answers.get(timeout=60)
    reader.join()
    assert found == {
        "matrix": ("torch.float32", (2, 3), 15.0),
        "scalar": ("torch.bfloat16", (), 2.5),
        "empty": ("torch.float32", (0, 4), 0.0),
        "odd": ("torch.int64", (5,), 10.0),
    }


def test_rewriting_in_place_is_seen_through_the_same_handle() -> None:
    buffer = _buffer()
    views = dict(read_views(buffer.write(TENSORS.items())))
    second = buffer.write((name, tensor + 1) for name, tensor in TENSORS.items())
    assert second == buffer.handle()
    assert views["odd"].tolist() == [1, 2, 3, 4, 5]


def test_a_mapped_reader_outlives_the_writer() -> None:
    buffer = _buffer()
    views = dict(read_views(buffer.write(TENSORS.items())))
    buffer.close()
    assert views["matrix"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_reading_after_the_writer_has_closed_says_so() -> None:
    buffer = _buffer()
    handle = buffer.write(TENSORS.items())
    buffer.close()
    with pytest.raises(ValueError, match="the trainer must be alive"):
        read_views(handle)


def test_missing_unknown_and_misshaped_tensors_are_refused() -> None:
    buffer = _buffer()
    with pytest.raises(ValueError, match="1 tensors were not written, such as \\['odd'\\]"):
        buffer.write((name, tensor) for name, tensor in TENSORS.items() if name != "odd")
    with pytest.raises(ValueError, match="other was not announced"):
        buffer.write([("other", torch.zeros(1))])
    with pytest.raises(ValueError, match="matrix was announced as float32 \\(2, 3\\) but is written as torch.float32 \\(3, 2\\)"):
        buffer.write([("matrix", TENSORS["matrix"].T)])
    with pytest.raises(ValueError, match="written as torch.float64"):
        buffer.write([("matrix", TENSORS["matrix"].double())])
    with pytest.raises(ValueError, match="a is listed twice"):
        HostBuffer([("a", (1,), torch.float32), ("a", (1,), torch.float32)])
