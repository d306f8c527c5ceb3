"""Runs on two machines: who leads, what is trained, and that whatever ends the run ends it on both."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from mindspeed_mm_rl.platforms import network, processes
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.failure import Member, WorkerFailed
from mindspeed_mm_rl.workers.worker import Worker
from tests.chaos.processes import PROC
from tests.plans import whole_plan
from tests.two_machines import NODE, REPOSITORY, SECOND, TwoMachines

RL = REPOSITORY / "examples/rl"
TRAIN = (
    "bash", str(RL / "scripts/grpo_trainer_qwen25_7b.sh"), "grpo_trainer_qwen25_tiny",
    "actor_config.load=quickstart/text/model/warm", "megatron_training.train_iters=2", "megatron_training.global_batch_size=8",
    "megatron_training.save_interval=1", "rl_config.n_samples_per_prompt=4", "rl_config.mini_batch_size=4", "eval=null",
    "rl_config.actor_resource.num_npus=2", "rl_config.runtime_env_path=env.yaml",
)  # fmt: skip
NOWHERE = "203.0.113.5"
"""Kept for documents (RFC 5737): no machine has it."""
COMMAND = """
import pathlib, sys, time
import ray

ray.init(address="auto", log_to_driver=False, logging_level="CRITICAL")
pathlib.Path("ready").touch()
if sys.argv[1] == "fail":
    sys.exit(7)
while sum(node["Alive"] for node in ray.nodes()) == 2:
    time.sleep(0.2)
pathlib.Path("alone").touch()
sys.exit(8)
"""
"""Of the head: ends at once, or when the other machine has left."""


@pytest.fixture(scope="module", autouse=True)
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TwoMachines, float]]:
    """A machine that looks for its head where there is none, while the other tests run."""
    with TwoMachines(tmp_path_factory.mktemp("lost"), MASTER_ADDR=NOWHERE, WAIT_SECONDS="") as lost:
        lost.head = lost.other = lost.start("head", [*NODE, "false"])
        yield lost, time.monotonic()


@pytest.fixture(scope="module", autouse=True)
def another_head() -> Iterator[None]:
    """Has the port at which Ray's server for clients usually listens."""
    with ExitStack() as stack:
        with suppress(OSError):  # Then there is one.
            stack.enter_context(socket.create_server(("", 10001)))
        yield


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows and a random model where the YAML looks for them."""
    monkeypatch.syspath_prepend(str(RL / "quickstart"))
    monkeypatch.chdir(tmp_path)
    import prepare_sums
    import sums
    import tiny_text_model

    sums.write_splits(prepare_sums.DATA, seed=0)
    tiny_text_model.write_model(prepare_sums.WARM, seed=0)
    (tmp_path / "env.yaml").write_text("env_vars: {A_WORD_FOR_ALL: '5'}\n")
    return tmp_path


def environment(pid: int) -> dict[str, str]:
    entries = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def test_two_machines_train_together_and_leave_nothing(scene: Path) -> None:
    with TwoMachines(scene) as machines:
        machines.run(*TRAIN)
        machines.wait_for("quickstart/text/ckpt/ray_grpo/iter_0000001")
        workers = {p.pid: p.title for p in machines.footprint.look() if p.title.startswith(("ray::ActorWorker", "ray::RolloutWorker"))}
        variables = [environment(pid) for pid in workers]
        codes = machines.ended()
        told = machines.console("head"), machines.console("other")
    assert codes == (0, 0), told
    assert len(workers) == 4 and len({own[processes.NODE_MARKER] for own in variables}) == 2, "a trainer and a replica on each machine"
    assert all(own["A_WORD_FOR_ALL"] == "5" for own in variables)
    assert "2 trainer and 2 rollout process(es)" in told[0] and "A_WORD_FOR_ALL=5" in told[0]
    assert told[1].strip().endswith(f"the run at {machines.address}:{machines.variables['RAY_PORT']} is over")
    records = read_records(scene / "quickstart/text/logs/ray_grpo/metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(record["rollout/logprob_gap/max"] <= 1e-4 for record in records), "both replicas have the weights of both trainers"


def send(machines: TwoMachines, what: str) -> None:
    match what:
        case "Ctrl-C on the head":
            machines.head.send_signal(signal.SIGINT)
        case "Ctrl-C on the other":
            machines.other.send_signal(signal.SIGINT)
            machines.wait_for("alone", 20.0)
        case "the head is killed":
            machines.head.kill()


@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        ("the command fails", (7, 7), "is over: exit code 7, its reason is told there"),
        ("Ctrl-C on the head", (130, 130), "is over: exit code 130"),
        ("Ctrl-C on the other", (8, 130), "stopped by Ctrl-C"),
        ("the head is killed", (-9, 1), "is gone without a word"),
    ],
)
def test_whatever_ends_the_run_ends_it_on_both(tmp_path: Path, what: str, codes: tuple[int, int], said: str) -> None:
    with TwoMachines(tmp_path) as machines:
        machines.run(*NODE, sys.executable, "-c", COMMAND, "fail" if what == "the command fails" else "wait")
        if what != "the command fails":
            machines.wait_for("ready")
        machines.footprint.look()
        send(machines, what)
        assert machines.ended() == codes, (machines.console("head"), machines.console("other"))
        assert said in machines.console("other")
        assert ("the launcher (pid" in machines.console("head")) == (what == "the head is killed")


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[placement.Slots, int]]:
    """Slots on two machines, and the pid of Ray's daemon on the second one."""
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    sizes = {"num_cpus": 2, "object_store_memory": 128 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=sizes | {"include_dashboard": False})
    second = cluster.add_node(**sizes, node_ip_address=SECOND)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield (
            placement.start(replace(whole_plan(tmp_path, tmp_path, tmp_path).run, num_devices=2)),
            second.all_processes["raylet"][0].process.pid,
        )
    finally:
        placement.stop()
        cluster.shutdown()


def test_a_machine_that_is_lost_before_its_processes_have_started_is_named(two_nodes: tuple[placement.Slots, int]) -> None:
    """Ray itself waits for it for ever."""
    slots, daemon = two_nodes
    os.kill(daemon, signal.SIGSTOP)
    members = [Member("trainer rank", slot, placement.spawn(slots, Worker, slot, {})) for slot in range(2)]
    greetings = [member.actor.alive.remote() for member in members]
    os.kill(daemon, signal.SIGKILL)
    with pytest.raises(WorkerFailed, match=rf"^trainer rank 1 can't start: its machine \({SECOND}\) is gone, or Ray on it$"):
        placement.introduced(members, greetings, slots, range(2))


def test_a_wrong_master_address_is_told_within_a_minute(lost: tuple[TwoMachines, float]) -> None:
    machines, since = lost
    codes = machines.ended(max(1.0, since + 60.0 - time.monotonic()))
    assert codes == (2, 2)
    assert "error: no head at MASTER_ADDR within 40 s: " in machines.console("head")
    assert f"Is MASTER_ADDR ({NOWHERE}) an address of the machine that is to be the head" in machines.console("head")


def test_another_program_at_the_port_is_told(tmp_path: Path) -> None:
    with TwoMachines(tmp_path) as machines:
        port = machines.variables["RAY_PORT"]
        listener = machines.start("listener", [sys.executable, "-m", "http.server", port, "--bind", machines.address])
        while network.unreachable(machines.address, int(port), 1.0):
            assert listener.poll() is None
        machines.head = machines.start("head", [*NODE, "false"], CURRENT_IP=machines.address)
        machines.other = machines.start("other", [*NODE, "false"], CURRENT_IP=SECOND, NODE_RANK="1", WAIT_SECONDS="1")
        assert (machines.head.wait(60), machines.other.wait(60)) == (2, 2)
        listener.terminate()
        listener.wait(10)
        machines.ended()
        assert f"port {port} of {machines.address} is taken" in machines.console("head")
        assert "is no Ray head" in machines.console("other") or "does not answer as a Ray head" in machines.console("other")
