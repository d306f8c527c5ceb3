"""Groups take turns on the devices: who has state there, and what is said of each phase."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mindspeed_mm_rl.engines.megatron.offload import OffloadedState
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import PhaseReport
from mindspeed_mm_rl.workers.turns import Turns

MIB = 1 << 20


class Weights:
    """Some numbers that leave, in this process, where a run has a group of workers."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.weight = turns, torch.ones(4)
        self.state = OffloadedState(("param",), {"param": lambda: [self.weight]})

    def total(self, phase: str, *others: Weights) -> float:
        self.turns.take(phase, self, *others)
        for group in (self, *others):
            group.state.hold("param")
        return float(self.weight.sum())

    @property
    def is_there(self) -> bool:
        return self.weight.untyped_storage().nbytes() > 0

    def rest(self) -> None:
        self.state.hold()

    def phase_reports(self) -> list[PhaseReport]:
        report = PhaseReport(device.peak_memory_bytes(), self.state.take_seconds())
        device.reset_peak_memory()
        return [report]


def test_whoever_works_has_the_devices_alone_or_with_those_it_names() -> None:
    turns = Turns()
    actor, critic, vision = (Weights(turns) for _ in range(3))
    there = []
    for work in (
        lambda: actor.total("update"),
        lambda: critic.total("update_critic"),
        lambda: critic.total("critic_model"),
        lambda: actor.total("update", vision),
        lambda: vision.total("image_embeds"),
    ):
        assert work() == 4.0
        there.append((actor.is_there, critic.is_there, vision.is_there))
    # The critic and the encoder have not worked before their turn, and until then stay where they were built.
    assert there == [(True, True, True), (False, True, True), (False, True, True), (True, False, True), (False, False, True)]


def test_each_phase_has_its_own_peak_and_one_that_is_not_named_has_none() -> None:
    turns = Turns()
    group = Weights(turns)
    device.reset_peak_memory()
    for phase, size in (("small", 8), ("large", 64), ("", 128), ("small again", 8)):
        group.total(phase)
        np.ones(size * MIB, dtype=np.uint8)
    metrics = turns.take_metrics()
    peaks = {name.split("/")[1]: metrics[name] * 1024 for name in metrics if name.startswith("memory/")}
    assert peaks.keys() == {"small", "large", "small again"}
    assert peaks["large"] - peaks["small"] == pytest.approx(56, abs=16)
    assert peaks["small again"] - peaks["small"] == pytest.approx(0, abs=16)
    assert turns.take_metrics() == {}
    group.total("small again")
    assert turns.take_metrics().keys() == {"memory/small again/peak_gb"}


def test_seconds_of_coming_and_leaving_add_up() -> None:
    turns = Turns()
    actor, critic = Weights(turns), Weights(turns)
    for _ in range(2):
        actor.total("update")
        critic.total("update_critic")
    metrics = turns.take_metrics()
    assert metrics["timing/offload"] > 0 and metrics["timing/onload"] > 0
    assert not [name for name in turns.take_metrics() if name.startswith("timing/")]


def test_those_who_start_later_wait_where_memory_does_not_hold_all() -> None:
    together, apart = Turns(), Turns(start_together=False)
    for turns in (together, apart):
        turns.starting(["actor"])
        turns.starting(["critic"])
    assert together.earlier() == [] and apart.earlier() == ["actor", "critic"]
