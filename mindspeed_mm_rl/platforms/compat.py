"""Which versions of the libraries the code is written for, and the one place that asks which of them is there.

Read before torch is imported, and where it can't be imported: standard library alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_mm_rl.platforms import versions
from mindspeed_mm_rl.platforms.resources import Kind

KNOWN_VERSIONS = {
    "megatron-core": ">=0.12,<0.17",
    "torch": ">=2.5,<2.14",
    "torchvision": ">=0.20,<0.30",
    "numpy": ">=1.26,<3",
    "vllm": ">=0.9.1,<0.33",
    "vllm-ascend": ">=0.9.1,<0.12",
    "mindspeed": ">=0.12,<0.17",
}
"""Package -> versions of which it was read in the source, or run, which patches they need."""


@dataclass(frozen=True)
class Want:
    """Example: Want(">=5.16.1,<5.20", "5.19.0")."""

    allowed: str
    install: str
    """The version that is named to whoever has another one."""


@dataclass(frozen=True, eq=False)
class Combination:
    """Versions that go together."""

    name: str
    device: Kind
    packages: Mapping[str, Want]
    """Also "python" and "cann", which pip doesn't install."""
    tested: str
    limits: str = ""
    """What it can't do."""


_RAY = Want(">=2.40,<3", "2.60.0")
_CPU = {
    "python": Want(">=3.11,<3.14", "3.11"),
    "torch": Want(">=2.13,<2.14", "2.13.0"),
    "torchvision": Want(">=0.28,<0.29", "0.28.0"),
    "vllm": Want(">=0.32,<0.33", "0.32.0"),
    "megatron-core": Want("==0.16.1", "0.16.1"),
    "transformers": Want(">=5.16.1,<5.20", "5.19.0"),
    "numpy": Want(">=2,<3", "2.3.5"),
    "ray": _RAY,
}
_CUDA = {
    "python": Want(">=3.10,<3.15", "3.12"),
    "torch": Want(">=2.13,<2.14", "2.13.0"),
    "vllm": Want(">=0.23,<0.33", "0.32.0"),
    "megatron-core": Want("==0.16.1", "0.16.1"),
    "transformers": Want(">=5.5.3,<5.20", "5.19.0"),
    "numpy": Want(">=1.26,<3", "2.3.5"),
    "ray": _RAY,
}
_NPU = {
    "python": Want(">=3.10,<3.12", "3.10"),
    "cann": Want(">=8.2", "8.2.RC1"),
    "torch": Want("==2.5.1", "2.5.1"),
    "torch_npu": Want("==2.5.1", "2.5.1.post1"),
    "megatron-core": Want("==0.12.1", "0.12.1"),
    "mindspeed": Want("==0.12.1", "0.12.1"),
    "vllm": Want("==0.9.1", "0.9.1"),
    "vllm-ascend": Want("==0.9.1", "0.9.1"),
    "transformers": Want(">=4.52,<4.53", "4.52.4"),
    "numpy": Want(">=1.26,<2", "1.26.4"),
    "ray": _RAY,
}
_NPU_2_7 = _NPU | {
    "cann": Want(">=8.3", "8.3.RC2"),
    "torch": Want("==2.7.1", "2.7.1"),
    "torch_npu": Want("==2.7.1", "2.7.1.post2"),
    "vllm": Want("==0.11.0", "0.11.0"),
    "vllm-ascend": Want("==0.11.0", "0.11.0"),
    "transformers": Want(">=4.52,<4.58", "4.57.1"),
}
_OLD_VLLM = "infer_expert_parallel_size is 1; models with latent attention were not run in the rollout engine"
COMBINATIONS = (
    Combination("cpu", "cpu", _CPU, "all tests"),
    Combination("cpu, megatron-core 0.12", "cpu", _CPU | {"megatron-core": Want("==0.12.1", "0.12.1")}, "train engine, all layouts"),
    Combination("cuda", "cuda", _CUDA, "by source"),
    Combination("npu", "npu", _NPU, "by source; the rollout engine on CPU", _OLD_VLLM),
    Combination("npu, torch 2.7", "npu", _NPU_2_7, "by source; the rollout engine on CPU", _OLD_VLLM),
)


def installed_version(package: str) -> tuple[int, ...]:
    """(0, 16, 1) for "0.16.1rc0+cpu"; raises ValueError when the package isn't installed."""
    text = versions.installed(package)
    if text is None:
        raise ValueError(f"{package} is not installed; scripts/install.sh installs all that is needed")
    return versions.numbers(text)


def is_known(package: str, version: str) -> bool:
    """Whether it was looked at which patches this version needs."""
    return versions.within(version, KNOWN_VERSIONS[package])


def megatron_is_0_12() -> bool:
    """0.12 needs repairs on current torch and numpy that later versions carry themselves."""
    return installed_version("megatron-core") < (0, 13)


def vllm_has_update_api() -> bool:
    """Takes new weights by methods of its own, with a backend that others register."""
    return installed_version("vllm") >= (0, 27)


def vllm_reloads_by_layer() -> bool:
    """Puts weights into packed layers; older ones pack them once and for all."""
    return installed_version("vllm") >= (0, 18)


def vllm_renders() -> bool:
    """Takes a prompt that was prepared apart from its samples, log-probs as flat lists, and forgets features of pictures when asked."""
    return installed_version("vllm") >= (0, 18)


def vllm_is_0_9() -> bool:
    """Returns log-probs of the raw logits alone, and takes a loader as a class."""
    return installed_version("vllm") < (0, 10)


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
