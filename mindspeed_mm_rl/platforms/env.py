"""The only reader of environment variables; the launcher and Ray's runtime_env set them."""

from __future__ import annotations

import os


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
