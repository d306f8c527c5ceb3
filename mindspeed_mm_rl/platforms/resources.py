"""What each kind of device is called by Ray and wants in the environment of a process: tables, read before torch is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mindspeed_mm_rl.platforms import env

Kind = Literal["cpu", "cuda", "npu"]

RAY_NAMES: dict[Kind, str] = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}
"""What a node offers to `ray start` and a bundle asks for."""
_CPUS_OF_BUNDLE = 2


def bundle(kind: Kind) -> dict[str, float]:
    """One device with the cores of the processes that take turns on it."""
    return {"CPU": _CPUS_OF_BUNDLE} | ({} if kind == "cpu" else {RAY_NAMES[kind]: 1})


def share(kind: Kind, part: float) -> dict[str, Any]:
    """Options of an actor that holds `part` of a device: GPUs are a resource of Ray's own, others go by name."""
    match kind:
        case "cpu":
            return {}
        case "cuda":
            return {"num_gpus": part}
        case "npu":
            return {"resources": {RAY_NAMES["npu"]: part}}


_OWN_DEVICES_ONLY = {
    "cuda": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": ""},
    "npu": {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": ""},
}
"""With 1, which is usual where a program counts devices by itself, every worker would take the first device of its node. Ray 2.51 and
older only ask whether there is a value, and 0 is one."""
_DEFAULTS = {
    # Collectives and kernels queue up in the order in which megatron's overlaps issue them.
    "cuda": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    "npu": {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        # Several processes have one NPU, and by default each would listen at the same port of it. The system finds free ones; a range
        # does as well, and one for all processes: it needs a port for each of them (CANN's manual of environment variables).
        "HCCL_HOST_SOCKET_PORT_RANGE": "auto",
        "HCCL_NPU_SOCKET_PORT_RANGE": "auto",
    },
}
_DETERMINISTIC = {
    # cuBLAS wants workspaces of a fixed size; sums within a switch come in any order, those along rings and trees in one. NCCL_ALGO=^NVLS
    # would leave the trees of several machines that have a switch in each.
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"},
    "npu": {
        "HCCL_DETERMINISTIC": "true",
        "LCCL_DETERMINISTIC": "1",
        # Matrix products whose cores begin at different places of the inner dimension, and those fused with communication.
        "CLOSE_MATMUL_K_SHIFT": "1",
        "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
        "ATB_LLM_LCOC_ENABLE": "0",
    },
}


def worker_environment(kind: Kind, deterministic: bool, given: Mapping[str, str]) -> dict[str, str]:
    """Variables of every worker process, to be there before it begins: those `given` by the user, and what the device wants, with the
    value that the environment of this process has for it: workers on other machines would not inherit that.

    Example: worker_environment("cuda", False, {"A": "1"}) has A and CUDA_DEVICE_MAX_CONNECTIONS.
    """
    wanted = _DEFAULTS.get(kind, {}) | deterministic_environment(kind, deterministic)
    return {name: env.read(name) or value for name, value in wanted.items()} | dict(given) | _OWN_DEVICES_ONLY.get(kind, {})


def deterministic_environment(kind: Kind, deterministic: bool = True) -> dict[str, str]:
    """What libraries read when they are loaded; `device.make_deterministic` does the rest."""
    return dict(_DETERMINISTIC.get(kind, {})) if deterministic else {}


def of_this_machine() -> Kind:
    """By the files of the drivers. `device.kind` is the answer of torch, whose import takes seconds."""
    if Path("/dev/davinci_manager").exists():
        return "npu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def offered(kind: Kind, count: int) -> list[str]:
    """Options of `ray start` for a node that lends this many devices."""
    match kind:
        case "cpu":
            return ["--num-cpus", str(count * _CPUS_OF_BUNDLE + 1)]
        case "cuda":
            return ["--num-gpus", str(count)]
        case "npu":
            return ["--resources", json.dumps({RAY_NAMES[kind]: count})]
