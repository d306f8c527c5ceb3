"""What this machine and this Python have, read without importing any of it: the answer must come where packages are broken, too."""

from __future__ import annotations

import json
import os.path
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm_rl.platforms import env, versions
from mindspeed_mm_rl.platforms.resources import Kind

PACKAGES = (
    "torch", "torch_npu", "torchvision", "megatron-core", "mindspeed", "vllm", "vllm-ascend", "transformers", "tokenizers", "numpy", "ray",
    "transformer-engine", "apex", "triton", "flash-attn",
)  # fmt: skip
"""What is shown. What a run can't do without is in NEEDED and in the combinations of compat.py."""
NEEDED = (
    "torch", "megatron-core", "transformers", "numpy", "ray", "einops", "safetensors", "datasets", "pyarrow", "pillow", "mathruler",
    "math-verify", "pylatexenc", "omegaconf", "pydantic", "jsonargparse", "typer", "rich", "tqdm", "tensorboard", "matplotlib", "psutil",
)  # fmt: skip
"""psutil: without it megatron's saves hang in a process of their own."""
_MODULES = {"torch": "torch", "megatron-core": "megatron/core", "mindspeed": "mindspeed", "vllm": "vllm", "transformers": "transformers"}
_NODES: Mapping[Kind, str] = {"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}
_CANN_FOLDERS = ("usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann")
_PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
kind = sys.argv[1]
if kind == "npu":
    import torch_npu
runtime = torch.npu if kind == "npu" else torch.cuda
count = runtime.device_count() if kind != "cpu" and runtime.is_available() else 0
found = [runtime.get_device_properties(number) for number in range(count)]
print(json.dumps([[one.name, one.total_memory] for one in found]))
"""
_PROBE_SECONDS = 120


@dataclass(frozen=True)
class Installation:
    device: Kind
    """What a run would use, by the device files of the machine."""
    device_files: tuple[str, ...]
    architecture: str
    """As `uname -m` says it."""
    packages: Mapping[str, str]
    """Package -> version; those of PACKAGES and NEEDED that are there, "python", and "cann" where it is found."""
    elsewhere: Mapping[str, str]
    """Package -> folder, for those that don't come from this Python's own site-packages."""
    torch_build: str | None
    shadowed: Mapping[str, tuple[str, str]]
    """Package -> (folder that an import finds, that of the installed one or nothing), where a copy hides the installed package."""
    command: str | None
    """Where `mm-rl` is."""
    shared_memory: int | None
    """Bytes of /dev/shm; None where there is none."""
    open_files: tuple[int, int]
    """Soft and hard limit."""
    preload: str
    """LD_PRELOAD."""
    openmp: str | None
    """The libgomp that scikit-learn brings."""


@dataclass(frozen=True)
class Probe:
    """What torch says. Example: Probe((("NVIDIA H200", 150_000_000_000),), "")."""

    devices: tuple[tuple[str, int], ...]
    """Name and bytes of memory of each."""
    error: str
    """Its last words where it can't be imported or asked."""


def read(root: Path = Path("/")) -> Installation:
    """root: where dev/ and usr/local/Ascend are looked for."""
    kind = device(root)
    found = {name: versions.installed(name) for name in dict.fromkeys(PACKAGES + NEEDED)}
    own = {"python": platform.python_version(), "cann": _cann(root)}
    return Installation(
        device=kind,
        device_files=_device_files(root, kind),
        architecture=platform.machine(),
        packages={name: version for name, version in (own | found).items() if version is not None},
        elsewhere={name: place for name in found if (place := _place(name))},
        torch_build=versions.torch_build(),
        shadowed={name: pair for name, file in _MODULES.items() if (pair := _shadow(name, file))},
        command=_command(),
        shared_memory=_shared_memory(root / "dev" / "shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        preload=env.read("LD_PRELOAD"),
        openmp=_openmp(),
    )


def device(root: Path = Path("/")) -> Kind:
    """What a run would use, by the device files of the machine."""
    return next((kind for kind in _NODES if _device_files(root, kind)), "cpu")


def _device_files(root: Path, kind: Kind) -> tuple[str, ...]:
    return tuple(sorted(str(node) for node in (root / "dev").glob(_NODES[kind]))) if kind in _NODES else ()


def probe(kind: Kind) -> Probe:
    """In a process of its own: a package that breaks may take its process with it. Without torch there is nobody to ask."""
    if versions.installed("torch") is None:
        return Probe((), "")
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE, kind], capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return Probe((), f"no answer within {_PROBE_SECONDS} s")
    if done.returncode == 0:
        return Probe(tuple((name, memory) for name, memory in json.loads(done.stdout.splitlines()[-1])), "")
    return Probe((), (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def _cann(root: Path) -> str | None:
    """Version of the first toolkit found: "8.2.RC1"."""
    named = [Path(folder) for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if (folder := env.read(name))]
    for folder in (*named, *(root / place for place in _CANN_FOLDERS)):
        for file in (folder / "version.cfg", *folder.glob("*-linux/ascend_toolkit_install.info")):
            match = re.search(r"^(?:runtime_running_version=\[[^:\]]*:|version=)([\w.]+)", _text(file), re.MULTILINE)
            if match:
                return match[1]
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _place(package: str) -> str:
    """Empty where it lies in this Python's own site-packages, or nowhere."""
    found = versions.distribution(package)
    folder = "" if found is None else str(found.locate_file(""))
    return "" if folder.startswith(sys.prefix) else folder


def _shadow(package: str, module: str) -> tuple[str, str] | None:
    """Users of vendored trees have a `megatron` or `mindspeed` folder on the path, of which no metadata says which version it is."""
    # Path.exists raises for folders that may not be looked into.
    entry = next((Path(folder or ".") for folder in sys.path if os.path.exists(Path(folder or ".", module, "__init__.py"))), None)
    found = versions.distribution(package)
    own = None if found is None else Path(found.locate_file(module))
    if entry is None or (own is not None and (not own.exists() or own.samefile(entry / module))):
        return None
    return str(entry / Path(module).parts[0]), "" if own is None else str(own)


def _command() -> str | None:
    beside = Path(sys.executable).parent / "mm-rl"
    return str(beside) if beside.exists() else shutil.which("mm-rl")


def _shared_memory(folder: Path) -> int | None:
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def _openmp() -> str | None:
    found = versions.distribution("scikit-learn")
    files = sorted(Path(found.locate_file("scikit_learn.libs")).glob("libgomp*")) if found else []
    return str(files[0]) if files else None
