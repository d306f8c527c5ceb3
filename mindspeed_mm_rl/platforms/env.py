"""The only reader of environment variables; the launcher and Ray's runtime_env set them."""

from __future__ import annotations

import os
from collections.abc import Mapping

ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF")
"""Settings of torch's memory on a device."""


def read(name: str, default: str = "") -> str:
    return os.environ.get(name, default)


def read_int(name: str, default: int) -> int:
    """Raises ValueError naming the variable when its value is no integer."""
    value = os.environ.get(name)
    if value is None or value == "":
        return default
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f"environment variable {name} must be an integer, got {value!r}") from error


def set_all(values: dict[str, str]) -> None:
    """For this process and those it starts; before the library that reads them is imported."""
    os.environ.update(values)


def remove(name: str) -> None:
    os.environ.pop(name, None)


def without(name: str) -> dict[str, str]:
    """All variables but one, for a process that is not to inherit it."""
    return {other: value for other, value in os.environ.items() if other != name}


def has_expandable_segments(kind: str, variables: Mapping[str, str]) -> bool:
    """Whether memory of a process on this kind of device, which gets these variables beside those of this one, grows in segments, to which
    ipc handles are not given everywhere."""
    own = ("PYTORCH_ALLOC_CONF", f"PYTORCH_{kind.upper()}_ALLOC_CONF")
    return any("expandable_segments:True" in variables.get(name, read(name)) for name in own)
