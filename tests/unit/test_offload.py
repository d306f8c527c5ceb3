"""Parts of an engine's state leave and come back: what is freed, what is copied, and who still sees it."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm_rl.engines.megatron import offload
from mindspeed_mm_rl.engines.megatron.offload import HostMemory, OffloadedState

PARTS = ("param", "grad", "optimizer")


def num_bytes(*tensors: torch.Tensor) -> list[int]:
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def test_memory_is_freed_and_every_view_sees_it_come_back() -> None:
    buffer = torch.arange(6.0)
    weight, shard, moment = buffer[2:].view(2, 2), buffer[:3], torch.tensor([7.0, 8.0])
    state = OffloadedState(PARTS, {"param": lambda: [weight], "grad": list, "optimizer": lambda: [shard, moment]})
    state.hold()
    assert num_bytes(weight, shard, moment) == [0, 0, 0]
    # The shard is a view of the parameters, so it comes with them.
    state.hold("param")
    assert num_bytes(buffer, moment) == [24, 0]
    assert weight.tolist() == [[2.0, 3.0], [4.0, 5.0]] and shard.tolist() == [0.0, 1.0, 2.0]
    state.hold("param", "optimizer")
    assert moment.tolist() == [7.0, 8.0]


def test_what_may_not_leave_stays() -> None:
    weight, moment = torch.ones(2), torch.ones(3)
    state = OffloadedState(("optimizer",), {"param": lambda: [weight], "optimizer": lambda: [weight, moment]})
    state.hold()
    assert num_bytes(weight, moment) == [8, 0]
    nothing = OffloadedState((), {"param": lambda: [weight], "optimizer": lambda: [moment]})
    nothing.hold()
    assert num_bytes(weight) == [8]


def test_gradients_are_freed_and_not_kept() -> None:
    gradient = torch.ones(4)
    state = OffloadedState(PARTS, {"param": list, "grad": lambda: [gradient], "optimizer": list})
    for _ in range(2):
        state.hold()
        assert num_bytes(gradient) == [0]
        state.hold("grad")
        gradient.fill_(2.0)
    assert gradient.tolist() == [2.0] * 4


def test_parameters_are_copied_again_only_after_the_optimizer_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, whole = torch.ones(4), []
    state = OffloadedState(PARTS, {"param": lambda: [weight], "optimizer": list}, before_leaving=lambda: whole.append(weight.tolist()))
    for held in (("param",), ("param",), ("param", "optimizer"), ("param",)):
        state.hold()
        state.hold(*held)
        if "optimizer" in held:
            weight.add_(1.0)
    # Before each copy: at first, and after the step.
    assert whole == [[1.0] * 4, [2.0] * 4]
    assert weight.tolist() == [2.0] * 4


def test_an_optimizer_that_got_its_moments_leaves_with_them() -> None:
    moments: list[torch.Tensor] = []
    state = OffloadedState(PARTS, {"param": list, "optimizer": lambda: moments})
    state.hold()
    state.hold("optimizer")
    moments.append(torch.full((3,), 5.0))
    state.hold()
    assert num_bytes(*moments) == [0]
    state.hold("optimizer")
    assert moments[0].tolist() == [5.0] * 3


def test_host_memory_is_one_range_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_BLOCK_BYTES", 1024)
    memory = HostMemory(2500)
    assert [(offset, len(view)) for offset, view in memory.pieces(512, 1700)] == [(0, 512), (512, 1024), (1536, 164)]
    for start, length in ((0, 600), (600, 1900)):
        for offset, view in memory.pieces(start, length):
            view.copy_(torch.arange(start + offset, start + offset + len(view)) % 251)
    flat = torch.cat([view for _, view in memory.pieces(0, 2500)])
    assert torch.equal(flat.long(), torch.arange(2500) % 251)
    tensors = [torch.randn(100 + 300 * i) for i in range(4)]
    expected = [tensor.clone() for tensor in tensors]
    state = OffloadedState(PARTS, {"param": lambda: tensors})
    state.hold()
    state.hold("param")
    assert all(torch.equal(one, other) for one, other in zip(tensors, expected, strict=True))


def test_seconds_are_told_once_and_those_of_the_reference_apart() -> None:
    weight, reference = torch.ones(2), torch.ones(2)
    state = OffloadedState(("param", "reference"), {"param": lambda: [weight], "reference": lambda: [reference]})
    state.hold("param")
    assert state.take_seconds().keys() == {"ref_offload"}
    state.hold("reference")
    seconds = state.take_seconds()
    assert seconds.keys() == {"offload", "ref_onload"} and min(seconds.values()) > 0
    assert state.take_seconds() == {}
