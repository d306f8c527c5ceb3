"""How much memory a device has: the one at hand, and those that the shipped recipes are made for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm_rl.platforms import device

GIB = 1 << 30
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class DeviceMemory:
    """Example: DeviceMemory("H100", 79 * GIB, 8)"""

    name: str
    total_bytes: int
    """As the runtime reports it, which is less than the label says."""
    per_node: int
    """Devices of a machine."""


KNOWN = {
    "a2": DeviceMemory("A2", 61 * GIB, 8),
    "a3": DeviceMemory("A3", 61 * GIB, 16),
    "h100": DeviceMemory("H100", 79 * GIB, 8),
    "h200": DeviceMemory("H200", 139 * GIB, 8),
}
"""Ascend devices of 64 GB (an A3 has two of them, and a machine eight A3), NVIDIA's of 80 and 141 GB."""


def at_hand(num_devices: int) -> DeviceMemory:
    """This machine's. num_devices: processes that a run on CPU shares the machine's memory among."""
    if device.kind() == "cpu":
        return DeviceMemory("share of this machine", _machine_bytes() // num_devices, num_devices)
    return DeviceMemory(*device.properties())


def _machine_bytes() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.is_file() else "max"
    return machine if limit == "max" else min(machine, int(limit))
