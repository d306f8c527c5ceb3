"""A rollout engine of two processes: the tokens of one, in step whatever happens, and replaced as a whole when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_mm_rl.types import RolloutGroup, RolloutRequest
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.failure import WorkerFailed
from mindspeed_mm_rl.workers.published import OnHosts
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from tests.addresses import free_address
from tests.e2e.rollout_process import RolloutProcess
from tests.host_weights import fill, new_buffer
from tests.plans import rollout_plan, whole_plan

SAMPLES = 16
"""Of 6 prompts for 64 places: the first group is done long before the last."""


def requests() -> list[RolloutRequest]:
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 20, 140, 7, 64, 20)
    return [RolloutRequest(i, torch.randint(10, 400, (n,), generator=generator).tolist(), (), n) for i, n in enumerate(lengths)]


def by_sample(groups: list[RolloutGroup]) -> dict[int, tuple[list[int], list[float]]]:
    return {rollout.sample_id: (rollout.token_ids, rollout.logprobs) for group in groups for rollout in group.rollouts}


@pytest.fixture(scope="module")
def handle(tiny_text: Path) -> Iterator[WeightHandle]:
    tensors = {name: tensor for path in tiny_text.glob("*.safetensors") for name, tensor in load_file(path).items()}
    buffer = new_buffer(tensors.items())
    yield fill(buffer, tensors.items())
    buffer.close()


@dataclass
class Ranks:
    """Two processes that are asked the same things at the same time."""

    processes: list[RolloutProcess]

    def all(self, ask: Callable[[RolloutProcess], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.processes)) as threads:
            return list(threads.map(ask, self.processes))


@pytest.fixture(scope="module")
def ranks(tiny_text: Path, handle: WeightHandle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ExitStack() as stack:
        ranks = Ranks([stack.enter_context(RolloutProcess(tmp_path_factory.mktemp("vllm_cache"))) for _ in range(2)])
        address, plan = free_address(), rollout_plan(tiny_text, tensor_parallel_size=2)
        ranks.all(lambda process: process.join(address, ranks.processes.index(process), 2))
        ranks.all(lambda process: process.build("text", plan, 7))
        ranks.all(lambda process: process.receive("text", handle, 1))
        yield ranks
        ranks.all(lambda process: process.close("text"))


def test_both_ranks_sample_the_same_and_again_the_same(ranks: Ranks) -> None:
    first, second = ranks.all(lambda process: by_sample(process.generate("text", requests(), {}, SAMPLES)))
    assert first == second and len(first) == 6 * SAMPLES
    assert len({tuple(tokens) for tokens, _ in first.values()}) == len(first)
    assert ranks.all(lambda process: by_sample(process.generate("text", requests()[::-1], {}, SAMPLES)))[0] == first


def test_a_stream_that_is_closed_on_the_first_rank_ends_on_the_other(ranks: Ranks) -> None:
    whole = by_sample(ranks.all(lambda process: process.generate("text", requests(), {}, SAMPLES))[0])
    first, second = ranks.processes

    def ask(process: RolloutProcess) -> list[RolloutGroup]:
        if process is first:
            return process.generate_while_open("text", requests(), {}, SAMPLES)[1]
        ended = process.generate("text", requests(), {}, SAMPLES)
        assert len(ended) < 6
        return process.generate("text", requests(), {}, SAMPLES)

    assert [by_sample(groups) for groups in ranks.all(ask)] == [whole, whole]


def test_a_prompt_that_is_refused_is_refused_on_both_and_leaves_nothing_behind(ranks: Ranks) -> None:
    too_long = [*requests()[:2], replace(requests()[2], expanded_length=250)]

    def ask(process: RolloutProcess) -> int:
        with pytest.raises(ValueError, match="prompt 2: 250 prompt tokens \\+ max_tokens 24 exceed max_model_len 256"):
            process.generate("text", too_long, {}, 2)
        return len(process.generate("text", requests(), {}, 2))

    assert ranks.all(ask) == [6, 6]


def test_none_of_them_has_a_named_file_in_shared_memory(ranks: Ranks) -> None:
    """It would outlive a kill, and by a name that is the same for all break the next run."""
    mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in ranks.all(lambda process: process.pid())]
    assert len(mapped) == 2 and not re.findall(r"/dev/shm/(?!sem\.)\S+", "".join(mapped))


@pytest.fixture(scope="module")
def slots(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[placement.Slots]:
    run = whole_plan(tiny_text, tiny_text, tmp_path_factory.mktemp("run")).run
    try:
        yield placement.start(replace(run, num_devices=2))
    finally:
        placement.stop()


def test_a_replica_is_replaced_whichever_of_its_ranks_dies_and_a_stopped_one_is_named(
    slots: placement.Slots, tiny_text: Path, handle: WeightHandle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = whole_plan(tiny_text, tiny_text, tmp_path)
    # Long enough to be met in the midst.
    rollout_of_two = replace(plan.rollout, tensor_parallel_size=2, max_tokens=100)
    plan = replace(plan, rollout=rollout_of_two, run=replace(plan.run, samples_per_prompt=SAMPLES))
    rollout = RolloutGroupStream(slots, plan)
    rollout.ready()
    rollout.receive_weights(OnHosts({slots.node: handle}), 1)
    undisturbed = by_sample(list(rollout.generate(requests(), [])))

    def disturbed(rank: int) -> tuple[int, list[RolloutGroup]]:
        stream, victim = rollout.generate(requests(), []), rollout.members[rank]
        groups = [next(stream)]
        os.kill(victim.pid, signal.SIGKILL)
        return victim.pid, groups + list(stream)

    for rank in (1, 0):
        caplog.clear()
        pid, groups = disturbed(rank)
        assert by_sample(groups) == undisturbed
        assert re.search(rf"rank {rank} of rollout replica 0 \(pid {pid} on .*\) died in rollout: killed by signal 9", caplog.text)
    assert rollout.take_replaced() == 2

    stream, victim = rollout.generate(requests(), []), rollout.members[1]
    next(stream)
    os.kill(victim.pid, signal.SIGSTOP)
    # Not before: a slow machine needs longer for the first group.
    rollout.timeout, began = 3.0, time.monotonic()
    with pytest.raises(WorkerFailed, match=r"no answer within 3 s .* from rank 1 of rollout replica 0 \(pid .*\), which is stopped"):
        list(stream)
    assert time.monotonic() - began < 20
