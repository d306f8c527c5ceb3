"""Installations to look at: folders with the metadata of packages, as pip writes it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def write_metadata(folder: Path, packages: Mapping[str, str], requires: Mapping[str, tuple[str, ...]] | None = None) -> None:
    """packages: name -> version. requires: name -> lines such as "torch (==2.13.0)"."""
    for name, version in packages.items():
        place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir(parents=True)
        lines = "".join(f"Requires-Dist: {line}\n" for line in (requires or {}).get(name, ()))
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
    importlib.invalidate_caches()


def only_these(monkeypatch: pytest.MonkeyPatch, folder: Path, packages: Mapping[str, str], **more: Mapping[str, tuple[str, ...]]) -> None:
    """For the length of a test, Python finds these packages and those of the standard library."""
    write_metadata(folder, packages, **more)
    library = [entry for entry in sys.path if "site-packages" not in entry and entry.startswith((sys.base_prefix, sys.base_exec_prefix))]
    monkeypatch.setattr(sys, "path", [str(folder), *library])
