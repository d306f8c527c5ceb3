"""Where worker processes run: one Ray cluster, one placement group, one bundle per device slot that train and rollout share in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm_rl.config.plan import RunPlan
from mindspeed_mm_rl.platforms import env, processes, signals
from mindspeed_mm_rl.workers.calls import Call, answers, start_bound
from mindspeed_mm_rl.workers.failure import Member
from mindspeed_mm_rl.workers.storage import Storage
from mindspeed_mm_rl.workers.turns import Turns

_OBJECT_STORE_BYTES_ON_CPU = 512 << 20
_DEVICE_SHARE, _CPU_SHARE = 0.25, 0.5
"""Of a bundle, for each of the processes that take turns on it: trainer, rollout engine, critic and vision encoder."""
_COMMON_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Slots:
    """The bundles of the run. Example: Slots(group=<placement group>, device="cpu", count=1)."""

    group: Any
    device: str
    count: int
    node: str
    """Address of this machine, as Ray knows it."""
    session_folder: str
    """Ray's files on this machine."""
    is_own_cluster: bool
    turns: Turns = field(default_factory=Turns)
    """Who works on them."""
    storage: Storage = field(default_factory=Storage)
    """Folders that all their processes read and write."""


def start(run: RunPlan) -> Slots:
    """Joins the cluster that the launcher announced (RAY_ADDRESS), else starts one of its own on this machine.

    Raises ValueError when the cluster has fewer devices than the run asks for.
    """
    import ray
    from ray.util.placement_group import placement_group

    env.set_all({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"} | processes.PROCESS_ENV)
    address = env.read("RAY_ADDRESS")
    new_cluster = {"address": "local", "include_dashboard": False}
    if run.device == "cpu":
        new_cluster |= {"num_cpus": 2 * run.num_devices + 1, "object_store_memory": _OBJECT_STORE_BYTES_ON_CPU}
    # Ray ends the process at SIGTERM by itself, and nothing would be said or saved.
    with signals.kept():
        context = ray.init(log_to_driver=False, logging_level="ERROR", **({"address": address} if address else new_cluster))
    # What Ray's daemons say of a dead worker in many lines, the run says in one sentence.
    ray._private.worker._worker_logs_enabled = False
    group = placement_group([_bundle(run.device)] * run.num_devices, strategy="PACK")
    if not group.wait(run.timeout_seconds):
        raise ValueError(
            f"actor_resource asks for {run.num_devices} x {_bundle(run.device)} but the cluster offers {ray.cluster_resources()}; "
            "lower actor_resource.num_npus or add nodes"
        )
    info = context.address_info
    turns = Turns(start_together=run.device == "cpu")
    return Slots(group, run.device, run.num_devices, info["node_ip_address"], info["session_dir"], not address, turns)


def stop() -> None:
    """Ends every process of the run."""
    import ray

    ray.shutdown()


def _bundle(device: str) -> dict[str, float]:
    return {"cpu": {"CPU": 2}, "cuda": {"CPU": 2, "GPU": 1}, "npu": {"CPU": 2, "NPU": 1}}[device]


def spawn(slots: Slots, worker: type, slot: int, variables: dict[str, str], **arguments: Any) -> Any:
    """One worker process on bundle `slot`; its class must live in an importable module."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    share = {"cpu": {}, "cuda": {"num_gpus": _DEVICE_SHARE}, "npu": {"resources": {"NPU": _DEVICE_SHARE}}}[slots.device]
    return (
        ray.remote(worker)
        .options(
            num_cpus=_CPU_SHARE,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(slots.group, placement_group_bundle_index=slot),
            runtime_env={"env_vars": _COMMON_ENV | processes.PROCESS_ENV | _marker() | variables},
            **share,
        )
        .remote(**arguments)
    )


def _marker() -> dict[str, str]:
    """Workers on a cluster that others started don't inherit it."""
    marker = env.read(processes.RUN_MARKER)
    return {processes.RUN_MARKER: marker} if marker else {}


def introduced(role: str, actors: Sequence[Any], greetings: Sequence[Any], slots: Slots) -> list[Member]:
    """greetings: what `alive` of the actors returned, asked before anything long. The number of a member is its place in the list."""
    calls = [Call(Member(role, number, actor), ref) for number, (actor, ref) in enumerate(zip(actors, greetings, strict=True))]
    known = answers(calls, start_bound(0.0), "start of the process")
    return [_introduced(call.member, pid, node, slots) for call, (pid, node) in zip(calls, known, strict=True)]


def _introduced(member: Member, pid: int, node: str, slots: Slots) -> Member:
    if node != slots.node:
        return Member(member.role, member.number, member.actor, pid, node)
    return Member(member.role, member.number, member.actor, pid, node, f"{slots.session_folder}/logs", processes.memory_kills())
