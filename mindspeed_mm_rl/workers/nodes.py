"""Whether every node of a run sees what it needs, asked once before anything is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.workers import placement
from mindspeed_mm_rl.workers.calls import Call, answers, start_bound
from mindspeed_mm_rl.workers.failure import Member
from mindspeed_mm_rl.workers.storage import NodeDisk, Storage

_SHOWN = 3
_SWITCH = "megatron_training.no_shared_storage"
_STATE_FILE = "state.json"
"""Beside the folder of each network of a training save."""


def open_storage(plan: Plan, slots: placement.Slots) -> Storage:
    """Raises ValueError, naming node and folder, when one node lacks what a run without shared storage can't bring there."""
    others = _other_nodes(slots)
    if not others:
        return Storage()
    return storage_of(plan, _disks(others, start_bound(plan.run.timeout_seconds)), slots.node)


def storage_of(plan: Plan, disks: list[Member], here: str) -> Storage:
    """disks: a NodeDisk of each node but that of the driver, whose address is `here`."""
    storage = Storage(disks, plan.run.timeout_seconds)
    for key, folder in _read_folders(plan):
        is_save = (Path(folder).parent / _STATE_FILE).exists()
        if plan.run.no_shared_storage and is_save:
            storage.bring(folder)
        else:
            _check_there(storage, key, folder, here)
    storage.apart = _apart(storage, plan.run.save) if plan.run.save else []
    if storage.apart and not plan.run.no_shared_storage:
        raise ValueError(
            f"actor_config.save: what node {here} writes into {plan.run.save} isn't seen on {', '.join(d.node for d in storage.apart)}: "
            f"give a folder that all nodes share, or set {_SWITCH}=true; each save is then collected on {here}"
        )
    return storage


def _other_nodes(slots: placement.Slots) -> dict[str, str]:
    """Ray's id of each node on which workers of the run live, by address, without that of the driver."""
    import ray
    from ray.util import placement_group_table

    used = set(placement_group_table(slots.group)["bundles_to_node_id"].values())
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return {addresses[node_id]: node_id for node_id in sorted(used) if addresses[node_id] != slots.node}


def _disks(nodes: dict[str, str], timeout_seconds: float) -> list[Member]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    members = []
    for number, (address, node_id) in enumerate(nodes.items()):
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        actor = ray.remote(NodeDisk).options(num_cpus=0, scheduling_strategy=strategy).remote()
        members.append(Member("storage process", number, actor, node=address))
    answers([Call(member, member.actor.alive.remote()) for member in members], timeout_seconds, "start of the storage processes")
    return members


def _read_folders(plan: Plan) -> Iterator[tuple[str, str]]:
    """(key, folder) of everything that workers read, each folder once."""
    wanted: list[tuple[str, Any]] = [
        ("megatron_training.tokenizer_name_or_path", plan.train.hf_path),
        ("actor_config.load", plan.train.load),
        (plan.reference_key, plan.train.reference_load if plan.needs_reference else None),
        ("critic_config.load", plan.critic and plan.critic.load),
        ("vit_config.load", plan.vision and plan.vision.load),
    ]
    yield from {folder: (key, folder) for key, folder in reversed(wanted) if folder}.values()


def _check_there(storage: Storage, key: str, folder: str, here: str) -> None:
    for member in storage.disks:
        if missing := storage.missing(member, folder):
            shown = ", ".join(missing[:_SHOWN]) + (f", ... ({len(missing)} in all)" if len(missing) > _SHOWN else "")
            raise ValueError(
                f"{key}: node {member.node} lacks {shown} of {folder}, or has another version of it: copy the folder there from {here}, to "
                "the same path, or give one that all nodes share"
            )


def _apart(storage: Storage, folder: str) -> list[Member]:
    """Those who don't see a file that is written here."""
    probe = Path(folder) / f".shared.{secrets.token_hex(4)}.partial"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
    try:
        return [member for member in storage.disks if not storage.sees(member, str(probe))]
    finally:
        probe.unlink()
