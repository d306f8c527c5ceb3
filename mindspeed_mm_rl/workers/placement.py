"""Where worker processes run: one Ray cluster, one placement group, one bundle per device slot that train and rollout share in turns."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from mindspeed_mm_rl.config.plan import RunPlan
from mindspeed_mm_rl.platforms import env

_OBJECT_STORE_BYTES_ON_CPU = 512 << 20
_DEVICE_SHARE, _CPU_SHARE = 0.5, 0.5
"""Of a bundle, for each of the processes that take turns on it."""
_COMMON_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Slots:
    """The bundles of the run. Example: Slots(group=<placement group>, device="cpu", count=1)."""

    group: Any
    device: str
    count: int


def start(run: RunPlan) -> Slots:
    """Joins the cluster that the launcher announced (RAY_ADDRESS), else starts one of its own on this machine.

    Raises ValueError when the cluster has fewer devices than the run asks for.
    """
    import ray
    from ray.util.placement_group import placement_group

    env.set_all({"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})
    address = env.read("RAY_ADDRESS")
    new_cluster = {"address": "local", "include_dashboard": False}
    if run.device == "cpu":
        new_cluster |= {"num_cpus": 2 * run.num_devices + 1, "object_store_memory": _OBJECT_STORE_BYTES_ON_CPU}
    ray.init(log_to_driver=False, logging_level="ERROR", **({"address": address} if address else new_cluster))
    group = placement_group([_bundle(run.device)] * run.num_devices, strategy="PACK")
    if not group.wait(run.timeout_seconds):
        raise ValueError(
            f"actor_resource asks for {run.num_devices} x {_bundle(run.device)} but the cluster offers {ray.cluster_resources()}; "
            "lower actor_resource.num_npus or add nodes"
        )
    return Slots(group, run.device, run.num_devices)


def stop() -> None:
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
            runtime_env={"env_vars": _COMMON_ENV | variables},
            **share,
        )
        .remote(**arguments)
    )


def free_address() -> str:
    """host:port for the trainer's process group, on the node of the caller."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
