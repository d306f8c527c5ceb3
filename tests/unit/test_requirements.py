"""What the code imports is what the lock installs: a fresh machine has nothing else."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = {"mindspeed_mm_rl", "tests", "benchmarks", "checkpoint", "patches", "conftest"}
DEVICE_ONLY = {"torch_npu", "mindspeed", "vllm_ascend", "flash_attn", "pip"}
COMPARED_WITH = {"trl"}
"""Installed aside where somebody asks for the comparison."""


def _locked() -> set[str]:
    names = re.findall(r"^([\w.-]+)(?:\[.*\])?==", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def _missing(modules: set[str]) -> list[str]:
    owners, locked = packages_distributions(), _locked()
    given = {module for module, packages in owners.items() if {re.sub(r"[-_.]+", "-", name).lower() for name in packages} & locked}
    return sorted(modules - given - OWN - DEVICE_ONLY - COMPARED_WITH - set(sys.stdlib_module_names))


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_of_the_code_is_locked():
    folders = ("mindspeed_mm_rl", "tests", "benchmarks", "examples", "checkpoint", "patches")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    beside = {file.stem for file in files if "examples" in file.parts}
    imported = set().union(*(_imported(ast.parse(file.read_text())) for file in files))
    assert len(files) > 100
    assert _missing(imported - beside) == []


def test_every_import_that_the_installer_checks_is_locked():
    check = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON", (ROOT / "scripts" / "install.sh").read_text(), re.DOTALL).group(1)
    modules = _imported(ast.parse(check))
    assert {"vllm", "megatron", "ray"} <= modules
    assert _missing(modules) == []


def test_a_module_that_no_locked_package_gives_is_named():
    assert _missing({"torch", "no_such_module"}) == ["no_such_module"]
