"""Weights through memory of the device: the rollout engine samples the same, to the last bit, as with weights through the host's memory,
and whoever dies or stands still in the midst of a push is named or replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.platforms.processes import is_stopped
from mindspeed_mm_rl.types import Batch
from mindspeed_mm_rl.workers import group, placement, replicas
from mindspeed_mm_rl.workers.failure import Member, WorkerDied, WorkerFailed
from tests.e2e import planted
from tests.e2e.test_parity import make_prompts
from tests.e2e.test_parity_layouts import PIXELS, TP2, World, make_world
from tests.plans import whole_plan

SAMPLED = ("responses", "rollout_logprobs")


@pytest.fixture(scope="module")
def world(tiny_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Trainer and rollout engine share each layer otherwise than the other: both are of two processes."""
    plan = whole_plan(tiny_vl, tiny_vl, tmp_path_factory.mktemp("run"))
    train = replace(plan.train, optimizer=replace(plan.train.optimizer, lr=5e-3), pipeline_parallel_size=2)
    halt = tmp_path_factory.mktemp("halt") / "rank"
    plan = replace(plan, run=replace(plan.run, num_devices=2), train=train, runtime_env=((planted.HALT, str(halt)),))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(group, "ActorWorker", planted.SmallChunksActor)
        patched.setattr(replicas, "RolloutWorker", planted.HaltingRollout)
        try:
            yield make_world(placement.start(plan.run), plan, make_prompts(tiny_vl), {"TP2": (2, TP2 | PIXELS)})
        finally:
            placement.stop()


def sampled(world: World, carrier: str, version: int) -> Batch:
    world.actor.carrier = carrier
    world.publish(version)
    return world.sample(world.rollouts["TP2"])


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name).values, getattr(other, name).values) for name in SAMPLED)


@contextmanager
def push_in_the_midst(world: World, version: int, halted: Member, rank: int) -> Iterator[Future]:
    """The process of the rank stands still at its second chunk."""
    (halt,) = [Path(path) for name, path in world.rollouts["TP2"].plan.runtime_env if name == planted.HALT]
    halt.write_text(str(rank))
    world.actor.carrier = "device"
    with ThreadPoolExecutor(1) as thread:
        push = thread.submit(world.publish, version)
        end = time.monotonic() + 60
        while not is_stopped(halted.pid):
            assert not push.done() and time.monotonic() < end
            time.sleep(0.01)
        try:
            yield push
        finally:
            with suppress(ProcessLookupError):
                os.kill(halted.pid, signal.SIGCONT)


def test_tokens_and_logprobs_are_those_of_the_other_carrier_after_each_update(world: World) -> None:
    before = sampled(world, "host", 0)
    for version in (1, 2):
        world.update(before)
        through_device = sampled(world, "device", version)
        assert not same(through_device, before)
        assert same(through_device, sampled(world, "host", version))
        assert world.gap(through_device) <= 1e-4
        before = through_device


def test_a_replica_that_died_while_idle_or_in_a_push_is_replaced_and_gets_the_weights_again(world: World) -> None:
    undisturbed, rollout = sampled(world, "device", 3), world.rollouts["TP2"]
    os.kill(rollout.members[1].pid, signal.SIGKILL)
    assert same(world.sample(rollout), undisturbed)

    victim = rollout.members[0]
    with push_in_the_midst(world, 3, victim, rank=0) as push:
        os.kill(victim.pid, signal.SIGKILL)
        push.result(60)
    assert same(world.sample(rollout), undisturbed)
    assert rollout.take_replaced() == 2


def test_a_reader_that_stands_still_is_named_and_so_is_a_trainer_that_dies(world: World) -> None:
    readers, trainer, patience = world.rollouts["TP2"].members, world.actor.members[1], world.actor.timeout
    world.actor.timeout = 3.0
    with push_in_the_midst(world, 4, readers[1], rank=1) as push:
        silent = rf"no answer within 3 s .* from rank 1 of rollout replica 0 \(pid {readers[1].pid} .*which is stopped"
        with pytest.raises(WorkerFailed, match=f"weight push waits in vain: {silent}"):
            push.result(60)
    world.actor.timeout, began = patience, time.monotonic()
    with push_in_the_midst(world, 5, readers[0], rank=0) as push:
        os.kill(trainer.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match=rf"trainer rank 1 \(pid {trainer.pid} .* died in weight push: killed by signal 9"):
            push.result(60)
    assert time.monotonic() - began < 30
