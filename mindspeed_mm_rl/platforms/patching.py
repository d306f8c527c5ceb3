"""Fixes to versions of third-party packages: one file each in patches/, applied when a worker starts, never at import.

    patches/NAME.py   docstring: what is wrong without it      PATCH: a value that says in which versions, and until when

The folder lies beside this package, in a checkout as well as in an installed copy, and its files are loaded by their place: no name of
theirs has to be importable in Ray's workers. Loading one imports nothing but this module.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from mindspeed_mm_rl.platforms import compat, versions
from mindspeed_mm_rl.platforms.resources import Kind

FOLDER = Path(__file__).parents[2] / "patches"
EVERYWHERE: tuple[Kind, ...] = ("cpu", "cuda", "npu")
State = Literal["applies", "not needed", "unknown version", "package missing"]


@dataclass(frozen=True)
class Patch:
    """Example: Patch("megatron-core", ">=0.12,<0.13", "train", ("megatron.core.x.y",), "0.12 is no longer supported", _apply)."""

    package: str
    versions: str
    """Those that need it; empty: none, as `condition` says, and it is listed for whoever knows it from other systems. In versions that
    compat.KNOWN_VERSIONS doesn't hold it is not applied, and said so."""
    process: Literal["train", "rollout", "every"]
    """Of which worker; "every": at import, in all processes."""
    changes: tuple[str, ...]
    """Dotted names of what is replaced."""
    until: str
    """When the file can be deleted."""
    apply: Callable[[], None] | None = None
    devices: tuple[Kind, ...] = EVERYWHERE
    condition: str = ""
    """What else must be so, in words."""
    holds: Callable[[], bool] = lambda: True
    """Whether it is."""


@dataclass(frozen=True)
class Status:
    """What becomes of a patch here. Example: Status("megatron_write_item", patch, "megatron 0.12 ...", "not needed", "only on cpu")."""

    name: str
    patch: Patch
    reason: str
    """Why there is such a patch."""
    state: State
    because: str
    """Why it is in this state; empty where it applies."""


def statuses(kind: Kind) -> list[Status]:
    """Of every patch, by name."""
    return [_status(name, patch, reason, kind) for name, (patch, reason) in _patches().items()]


@lru_cache(maxsize=2)
def apply(process: Literal["train", "rollout"], kind: Kind) -> None:
    """Once, when the worker starts. A version that nobody has looked at gets no patch and a warning."""
    for status in statuses(kind):
        if status.patch.process != process:
            continue
        if status.state == "applies":
            status.patch.apply()
        elif status.state == "unknown version":
            logging.getLogger(__name__).warning("patches/%s.py is not applied: %s", status.name, status.because)


@lru_cache(maxsize=1)
def _patches() -> dict[str, tuple[Patch, str]]:
    """name -> patch and reason."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"patches.{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[file.stem] = module.PATCH, " ".join(module.__doc__.split())
    if not found:
        raise ValueError(f"{FOLDER} has no patches: it belongs beside the package, as in the repository")
    return found


def _status(name: str, patch: Patch, reason: str, kind: Kind) -> Status:
    return Status(name, patch, reason, *_state(patch, kind))


def _state(patch: Patch, kind: Kind) -> tuple[State, str]:
    version = versions.installed(patch.package)
    if version is None:
        return "package missing", f"{patch.package} is not installed"
    if kind not in patch.devices:
        return "not needed", f"only on {' and '.join(patch.devices)}"
    if not patch.versions:
        return "not needed", patch.condition
    if not compat.is_known(patch.package, version):
        return "unknown version", f"{patch.package} {version} was not looked at, only {compat.KNOWN_VERSIONS[patch.package]}"
    if not versions.within(version, patch.versions):
        return "not needed", f"{patch.package} {version} is not {patch.versions}"
    if not patch.holds():
        return "not needed", f"only where {patch.condition}"
    return "applies", ""
