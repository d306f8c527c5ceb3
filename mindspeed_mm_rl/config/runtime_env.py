"""The file that `rl_config.runtime_env_path` names: environment variables of every Ray worker, as Ray's runtime_env writes them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from mindspeed_mm_rl.config.model_file import find_file
from mindspeed_mm_rl.platforms.resources import Kind

_KEY = "rl_config.runtime_env_path"
_SECTION = "env_vars"
_RAYS_OWN = (
    "working_dir", "py_modules", "py_executable", "pip", "uv", "conda", "container", "image_uri", "java_jars", "excludes", "config",
    "nsight", "rocprof-sys", "mpi", "worker_process_setup_hook",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NULLS = ("", "~", "null", "Null", "NULL")
_OF_A_PROCESS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES", "VLLM_DP_RANK", "VLLM_DP_RANK_LOCAL", "VLLM_DP_MASTER_IP", "VLLM_DP_MASTER_PORT",
)  # fmt: skip
_OF_THE_RUN = ("MM_RL_RUN", "MM_RL_NODE", "SPT_NOENV")
_FIXED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V1": "1"}
"""What the rollout engine is built on."""
_PORT_RANGES = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")
_ONE_PORT = "HCCL_IF_BASE_PORT"
_PORTS = range(1024, 65536)
_INTERFACE = "_SOCKET_IFNAME"


@dataclass(frozen=True)
class RuntimeEnv:
    """Example: RuntimeEnv({"HCCL_SOCKET_IFNAME": "eth0"})."""

    variables: dict[str, str]
    notes: tuple[str, ...] = ()
    """What was left out of the file, and why."""


def read_runtime_env(path: str, folder: str, kind: Kind) -> RuntimeEnv:
    """The variables as they are written in the file, for workers on this kind of device. Raises ValueError that names file and variable."""
    file = find_file(path, Path(folder), _KEY)
    variables = _variables(file)
    for name, value in variables.items():
        _check(f"{file}: {_SECTION}.{name}", name, value)
    _check_ports(file, variables)
    left_out = {name: reason for name, value in variables.items() if (reason := _why_not(name, value, kind))}
    notes = tuple(f"{path}: {name}={variables[name]} is left out: {reason}" for name, reason in left_out.items())
    return RuntimeEnv({name: value for name, value in sorted(variables.items()) if name not in left_out}, notes)


def _variables(file: Path) -> dict[str, str]:
    """By the text of the file: a number is not read and written again, which would make 010 an 8."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} can't be read as YAML: {' '.join(str(error).split())[:200]}") from error
    found: dict[str, str] = {}
    for section, content in _entries(file, root, f"the file must hold {_SECTION}: with lines NAME: value"):
        if section != _SECTION:
            raise ValueError(f"{file}: {_unknown(section)}")
        for name, value in _entries(file, content, f"{_SECTION} must be a map of names to plain values"):
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError(f"{file}: {_SECTION}.{name} must be one plain value, not a list or map")
            if name in found:
                raise ValueError(f"{file}: {_SECTION}.{name} stands there twice, as {found[name]} and as {value.value}: remove one line")
            if value.style is None and value.value in _NULLS:
                raise ValueError(f"{file}: {_SECTION}.{name} has no value: write one, or remove the line")
            found[name] = value.value
    return found


def _entries(file: Path, node: yaml.Node | None, rule: str) -> list[tuple[str, yaml.Node]]:
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value in _NULLS):
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file}: {rule}")
    return [(str(key.value), value) for key, value in node.value]


def _unknown(section: str) -> str:
    if section in _RAYS_OWN:
        return f"{section} isn't offered: workers run what is installed on their machine; give {_SECTION} alone"
    close = difflib.get_close_matches(section, [_SECTION], 1)
    return f"unknown key {section}" + (f"; did you mean {_SECTION}?" if close else f": give {_SECTION} alone, with the variables below it")


def _check(where: str, name: str, value: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a variable's name has letters, digits and _ alone, and no digit first")
    if name in _OF_A_PROCESS:
        raise ValueError(f"{where}: it differs from process to process, and the run sets it; remove the line")
    if name in _OF_THE_RUN:
        raise ValueError(f"{where}: by it the run knows its own processes; remove the line")
    if value != _FIXED.get(name, value):
        raise ValueError(f"{where} is {value}, but the rollout engine needs {_FIXED[name]}; remove the line")
    if name.endswith(_INTERFACE) and re.search(r"\s", value.strip()):
        raise ValueError(f"{where} is '{value}', which is no name of a network interface (see `ip addr`)")


def _why_not(name: str, value: str, kind: Kind) -> str:
    """Usual elsewhere and of no use here: told, and not handed on."""
    if name == "VLLM_DP_SIZE" and value != "1":
        return "generate_config.infer_expert_parallel_size says how many groups share the experts of an engine"
    if name == "OMP_NUM_THREADS" and kind == "cpu":
        return "the processes of a CPU machine share its cores"
    if name.startswith("RAY_EXPERIMENTAL_NOSET_") and value not in ("0", "false"):
        return "each worker sees the devices of its own bundle"
    return ""


def _check_ports(file: Path, variables: dict[str, str]) -> None:
    ranges = {name: _ports(f"{file}: {_SECTION}.{name}", variables[name]) for name in _PORT_RANGES if name in variables}
    one = variables.get(_ONE_PORT)
    if one is not None and not (one.isdigit() and int(one) in _PORTS):
        raise ValueError(f"{file}: {_SECTION}.{_ONE_PORT} is '{one}'; give a port from {_PORTS.start} to {_PORTS.stop - 1}")
    shared = sorted(set.intersection(*ranges.values())) if len(ranges) == len(_PORT_RANGES) else []
    if shared:
        told = " and ".join(f"{name} ({variables[name]})" for name in ranges)
        raise ValueError(f"{file}: {told} share port {shared[0]}; give ranges that don't meet")


def _ports(where: str, text: str) -> set[int]:
    """Example: _ports("...", "60000-60001,60100-60100") == {60000, 60001, 60100}; none for auto."""
    if text == "auto":
        return set()
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last) and int(first) in _PORTS and int(last) in _PORTS):
            raise ValueError(f"{where} is '{text}'; give ports from {_PORTS.start} to {_PORTS.stop - 1} as first-last, or auto")
        found |= set(range(int(first), int(last) + 1))
    return found
