"""A rollout engine of two groups that share the experts: each samples its own prompts, and they stay in step whatever happens."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mindspeed_mm_rl.types import RolloutGroup, RolloutRequest
from mindspeed_mm_rl.weights.host import WeightHandle
from mindspeed_mm_rl.workers import placement, replicas
from mindspeed_mm_rl.workers.published import OnHosts
from mindspeed_mm_rl.workers.replicas import RolloutGroupStream
from tests.addresses import free_address
from tests.e2e import planted
from tests.e2e.rollout_process import RolloutProcess
from tests.e2e.test_rollout_ranks import Ranks, by_sample, requests
from tests.host_weights import fill, new_buffer
from tests.plans import rollout_plan, whole_plan
from tests.tiny import make_tiny_text

SAMPLES = 16
TWO_GROUPS = {"data_parallel_size": 2, "expert_parallel": True}
Sampled = dict[int, tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_text(tmp_path_factory.mktemp("experts"), family="qwen3_moe", head_dim=32, weight_std=0.1)


@pytest.fixture(scope="module")
def handle(model: Path) -> Iterator[WeightHandle]:
    tensors = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    buffer = new_buffer(tensors.items())
    yield fill(buffer, tensors.items())
    buffer.close()


@pytest.fixture(scope="module")
def groups(model: Path, handle: WeightHandle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with ExitStack() as stack:
        ranks = Ranks([stack.enter_context(RolloutProcess(tmp_path_factory.mktemp("vllm_cache"))) for _ in range(2)])
        address, plan = free_address(), rollout_plan(model, **TWO_GROUPS)
        ranks.all(lambda process: process.join(address, ranks.processes.index(process), 2))
        ranks.all(lambda process: process.build("text", plan, 7))
        ranks.all(lambda process: process.receive("text", handle, 1))
        yield ranks
        ranks.all(lambda process: process.close("text"))


def sampled(groups: Ranks, *shares: Sequence[RolloutRequest]) -> Sampled:
    """Of all groups. shares: requests of each."""
    of_process = dict(zip(groups.processes, shares, strict=True))
    found = groups.all(lambda process: by_sample(process.generate("text", list(of_process[process]), {}, SAMPLES)))
    return {sample: rollout for samples in found for sample, rollout in samples.items()}


def test_samples_do_not_depend_on_the_group_even_where_one_has_nothing_to_do(groups: Ranks) -> None:
    shared = sampled(groups, requests()[::2], requests()[1::2])
    assert len(shared) == 6 * SAMPLES and len({tuple(tokens) for tokens, _ in shared.values()}) == len(shared)
    for shares in ((requests(), []), ([], requests()), (requests()[3:], requests()[:3])):
        assert sampled(groups, *shares) == shared


def test_a_stream_that_is_closed_ends_those_of_all_groups(groups: Ranks) -> None:
    first, second = groups.processes
    whole = sampled(groups, requests()[:5], requests()[5:])

    def ask(process: RolloutProcess) -> list[RolloutGroup]:
        if process is first:
            return process.generate_while_open("text", requests()[:5], {}, SAMPLES)[1]
        process.generate("text", requests()[5:], {}, SAMPLES)
        return process.generate("text", requests()[5:], {}, SAMPLES)

    again = groups.all(ask)
    assert by_sample([group for found in again for group in found]) == whole


def test_a_prompt_that_one_group_refuses_is_refused_by_all_and_leaves_nothing_behind(groups: Ranks) -> None:
    first, _ = groups.processes
    too_long = replace(requests()[2], expanded_length=250)

    def ask(process: RolloutProcess) -> int:
        with pytest.raises(ValueError, match="prompt 2: 250 prompt tokens \\+ max_tokens 24 exceed max_model_len 256"):
            process.generate("text", [too_long] if process is first else requests()[3:], {}, 2)
        return len(process.generate("text", requests(), {}, 2))

    assert groups.all(ask) == [6, 6]


def read_late(rollout: RolloutGroupStream, seconds: float) -> Sampled:
    """With so long a break of the reader that the bound is over; all has come meanwhile."""
    stream = rollout.generate(requests(), [])
    found, patience = [next(stream)], rollout.timeout
    time.sleep(seconds)
    rollout.timeout = seconds / 100
    found += list(stream)
    rollout.timeout = patience
    return by_sample(found)


def test_a_replica_is_replaced_when_a_process_of_one_of_its_groups_dies_and_so_is_a_successor(
    model: Path, handle: WeightHandle, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "RolloutWorker", planted.DyingRollout)
    plan, death = whole_plan(model, model, tmp_path), tmp_path / "death"
    # Long enough to be met in the midst.
    rollout_of_two = replace(plan.rollout, max_tokens=100, **TWO_GROUPS)
    run = replace(plan.run, samples_per_prompt=SAMPLES, num_devices=2)
    plan = replace(plan, rollout=rollout_of_two, run=run, runtime_env=((planted.HALT, str(death)),))
    try:
        rollout = RolloutGroupStream(slots := placement.start(plan.run), plan)
        rollout.ready()
        rollout.receive_weights(OnHosts({slots.node: handle}), 1)
        began = time.monotonic()
        undisturbed = by_sample(list(rollout.generate(requests(), [])))
        assert read_late(rollout, 4 * (time.monotonic() - began)) == undisturbed
        stream, victim = rollout.generate(requests(), []), rollout.members[1]
        found = [next(stream)]
        os.kill(victim.pid, signal.SIGKILL)
        death.touch()
        found += list(stream)
    finally:
        placement.stop()
    assert by_sample(found) == undisturbed
    assert re.search(rf"rank 1 of rollout replica 0 \(pid {victim.pid} on .*\) died in rollout: killed by signal 9", caplog.text)
    assert rollout.take_replaced() == 2
