"""Which versions of the libraries the code is written for, and the one place that asks which of them is there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

TESTED_VERSIONS = {
    "megatron-core": ("0.12.1", "0.16.1"),
    "torch": ("2.5.1", "2.13.0"),
    "transformers": ("4.52.0", "5.19.0"),
    "vllm": ("0.9.1", "0.32.0"),
}
"""Package -> (oldest, newest) version the code was written against."""


def installed_version(package: str) -> tuple[int, ...]:
    """(0, 16, 1) for "0.16.1rc0+cpu"; raises ValueError when the package isn't installed."""
    try:
        text = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"{package} is not installed; scripts/install.sh installs all that is needed") from error
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def megatron_is_0_12() -> bool:
    """0.12 needs repairs on current torch and numpy that later versions carry themselves."""
    return installed_version("megatron-core") < (0, 13)


def tell_virtual_stage(virtual: int) -> None:
    """0.12 asks a global variable which virtual stage a network is built for; later versions are told by an argument."""
    if megatron_is_0_12():
        from megatron.core import parallel_state

        parallel_state.set_virtual_pipeline_model_parallel_rank(virtual)


def supported_arguments(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that this version of `function` takes. Use it only for those that one of the versions lacks by design."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}
