"""Where worker processes run: one Ray cluster, one placement group, one bundle per device slot that train and rollout share in turns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from tempfile import gettempdir
from typing import Any

from mindspeed_mm_rl.config.plan import RunPlan
from mindspeed_mm_rl.platforms import env, network, processes, resources, signals
from mindspeed_mm_rl.workers.calls import Call, answers, start_bound
from mindspeed_mm_rl.workers.failure import Member, WorkerFailed, first_sentence
from mindspeed_mm_rl.workers.storage import Storage
from mindspeed_mm_rl.workers.turns import Turns

_OBJECT_STORE_BYTES_ON_CPU = 512 << 20
_DEVICE_SHARE, _CPU_SHARE = 0.25, 0.5
"""Of a bundle, for each of the processes that take turns on it: trainer, rollout engine, critic and vision encoder."""
_WAIT_SECONDS = 600
"""For devices of a cluster that is there already: it may have to bring up machines first."""
_OWN_WAIT_SECONDS, _CONNECT_SECONDS = 60, 5.0
_SOCKET_CHARACTERS = 107
"""Of its path, see unix(7)."""
_COMMON_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Slots:
    """The bundles of the run. Example: Slots(group=<placement group>, device="cpu", count=1)."""

    group: Any
    device: resources.Kind
    count: int
    node: str
    """Address of this machine, as Ray knows it."""
    session_folder: str
    """Ray's files on this machine."""
    is_own_cluster: bool
    bundles: tuple[int, ...]
    """Of the group, in the order of the slots: those of one machine are neighbours, those of this one come first."""
    machines: tuple[str, ...]
    """Ray's id of the machine of each slot."""
    turns: Turns = field(default_factory=Turns)
    """Who works on them."""
    storage: Storage = field(default_factory=Storage)
    """Folders that all their processes read and write."""


def start(run: RunPlan) -> Slots:
    """Joins the cluster that the launcher announced (RAY_ADDRESS), else starts one of its own on this machine.

    Raises ValueError when the cluster has fewer devices than the run asks for.
    """
    _check_temporary_folders()
    import ray
    from ray.util.placement_group import placement_group

    env.set_all({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"} | processes.PROCESS_ENV)
    address = env.read("RAY_ADDRESS")
    # Ray ends the process at SIGTERM by itself, and nothing would be said or saved.
    with signals.kept():
        info = _join(address) if address else _begin(run)
    # What Ray's daemons say of a dead worker in many lines, the run says in one sentence.
    ray._private.worker._worker_logs_enabled = False
    group = placement_group([resources.bundle(run.device)] * run.num_devices, strategy="PACK")
    seconds = env.read_int("WAIT_SECONDS", _WAIT_SECONDS) if address else _OWN_WAIT_SECONDS
    if not group.wait(seconds):
        raise ValueError(_too_few(run, seconds))
    here, turns = info["node_ip_address"], Turns(start_together=run.device == "cpu")
    bundles, machines = _by_machine(group, here)
    return Slots(group, run.device, run.num_devices, here, info["session_dir"], not address, bundles, machines, turns)


def _check_temporary_folders() -> None:
    """Raises ValueError for one whose path is too long for the sockets in it; megatron would not see that before the first save."""
    places = [("TMPDIR", gettempdir(), "the writers of saves", "pymp-01234567/listener-01234567")]
    if not env.read("RAY_ADDRESS"):
        socket = f"ray/session_2026-01-31_23-59-59_999999_{os.getpid()}/sockets/plasma_store"
        places.append(("RAY_TMPDIR", env.read("RAY_TMPDIR") or env.read("TMPDIR", "/tmp"), "Ray", socket))
    for name, folder, whose, socket in places:
        longest = _SOCKET_CHARACTERS - len(f"/{socket}")
        if len(os.fsencode(folder)) > longest:
            raise ValueError(
                f"the path of the temporary folder {folder} has {len(os.fsencode(folder))} characters, and the sockets of {whose} in it "
                f"allow {longest}: set {name} to a folder with a shorter one, for example /tmp"
            )


def _begin(run: RunPlan) -> dict[str, str]:
    import ray

    sizes = {"num_cpus": 2 * run.num_devices + 1, "object_store_memory": _OBJECT_STORE_BYTES_ON_CPU} if run.device == "cpu" else {}
    return ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", **sizes).address_info


def _join(address: str) -> dict[str, str]:
    """Raises ValueError for an address that no Ray cluster answers at, or not to this machine."""
    import ray

    if "://" in address:
        raise ValueError(f"RAY_ADDRESS is {address}: give host:port of the head, and start the run on a machine of the cluster")
    host, _, port = address.rpartition(":")
    # Ray would try for two minutes, and then end the process.
    if host and port.isdigit() and (reason := network.unreachable(host, int(port), _CONNECT_SECONDS)):
        raise ValueError(f"RAY_ADDRESS is {address}, but {reason}; correct it, or unset it for a cluster of the run's own")
    try:
        return ray.init(address=address, log_to_driver=False, logging_level="ERROR").address_info
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"RAY_ADDRESS is {address}, and Ray can't join it: {first_sentence(error)}") from error


def _too_few(run: RunPlan, seconds: int) -> str:
    import ray

    one = resources.bundle(run.device)
    offers = {
        node["NodeManagerAddress"]: int(min(node["Resources"].get(name, 0) // amount for name, amount in one.items()))
        for node in ray.nodes()
        if node["Alive"]
    }
    told = ", ".join(f"{count} on {address}" for address, count in sorted(offers.items()))
    return (
        f"rl_config.actor_resource.num_npus asks for {run.num_devices} devices, each with {one}, and after {seconds} s the cluster has not "
        f"given them; it has {told} in all, others may use some: lower num_npus, add machines (NNODES, NPUS_PER_NODE), or end the others"
    )


def _by_machine(group: Any, here: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Bundles, and the machine of each. Ray gives them to machines in no order that it promises; ranks that talk most are neighbours."""
    import ray
    from ray.util import placement_group_table

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    machines: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    bundles = tuple(sorted(machines, key=lambda bundle: (addresses[machines[bundle]] != here, machines[bundle], bundle)))
    return bundles, tuple(machines[bundle] for bundle in bundles)


def stop() -> None:
    """Ends every process of the run."""
    import ray

    ray.shutdown()


def spawn(slots: Slots, worker: type, slot: int, variables: dict[str, str], **arguments: Any) -> Any:
    """One worker process on a slot; its class must live in an importable module."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return (
        ray.remote(worker)
        .options(
            num_cpus=_CPU_SHARE,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(slots.group, placement_group_bundle_index=slots.bundles[slot]),
            runtime_env={"env_vars": _COMMON_ENV | processes.PROCESS_ENV | _marker() | variables},
            **resources.share(slots.device, _DEVICE_SHARE),
        )
        .remote(**arguments)
    )


def _marker() -> dict[str, str]:
    """Workers on a cluster that others started don't inherit it."""
    marker = env.read(processes.RUN_MARKER)
    return {processes.RUN_MARKER: marker} if marker else {}


def introduced(members: Sequence[Member], greetings: Sequence[Any], slots: Slots, places: Sequence[int]) -> list[Member]:
    """With process id and node. greetings: what `alive` of them returned, asked before anything long; places: their slots."""
    calls = [Call(member, ref) for member, ref in zip(members, greetings, strict=True)]
    known = answers(calls, start_bound(0.0), "start of the process", while_waiting=lambda: _check_machines(members, slots, places))
    return [_introduced(member, pid, node, slots) for member, (pid, node) in zip(members, known, strict=True)]


def _introduced(member: Member, pid: int, node: str, slots: Slots) -> Member:
    found = replace(member, pid=pid, node=node)
    return found if node != slots.node else replace(found, log_folder=f"{slots.session_folder}/logs", memory_kills=processes.memory_kills())


def _check_machines(members: Sequence[Member], slots: Slots, places: Sequence[int]) -> None:
    """Ray goes on looking for a place for a process that was still starting when its machine was lost, and says nothing.

    Raises WorkerFailed.
    """
    import ray

    lost = {machine["NodeID"]: machine["NodeManagerAddress"] for machine in ray.nodes() if not machine["Alive"]}
    for member, place in zip(members, places, strict=True):
        if address := lost.get(slots.machines[place]):
            raise WorkerFailed(f"{member} can't start: its machine ({address}) is gone, or Ray on it")
