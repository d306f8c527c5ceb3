"""The device of this process, chosen once: npu before cuda before cpu."""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from mindspeed_mm_rl.platforms import cpu, cuda, npu, patching, processes
from mindspeed_mm_rl.platforms.packed_sdpa import Segments
from mindspeed_mm_rl.platforms.resources import Kind
from mindspeed_mm_rl.platforms.shared_memory import MemoryHandle, SharedMemory


@lru_cache(maxsize=1)
def kind() -> Kind:
    if importlib.util.find_spec("torch_npu") is not None:
        import torch_npu  # noqa: F401  registers torch.npu

        if torch.npu.is_available():
            return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _platform() -> ModuleType:
    return {"cpu": cpu, "cuda": cuda, "npu": npu}[kind()]


def _runtime() -> Any:
    """torch.cuda or torch.npu: they share their interface."""
    return torch.npu if kind() == "npu" else torch.cuda


def current() -> torch.device:
    if kind() == "cpu":
        return torch.device("cpu")
    return torch.device(kind(), _runtime().current_device())


def synchronize() -> None:
    if kind() != "cpu":
        _runtime().synchronize()


def empty_cache() -> None:
    if kind() != "cpu":
        _runtime().empty_cache()


def properties() -> tuple[str, int, int]:
    """(name and bytes of memory of one, how many there are) of this machine's devices; not on CPU."""
    first = _runtime().get_device_properties(0)
    return first.name, first.total_memory, _runtime().device_count()


def peak_memory_bytes() -> int:
    """Most memory that this process had allocated on the device since `reset_peak_memory`; on CPU its largest resident set."""
    return processes.peak_resident_bytes() if kind() == "cpu" else _runtime().max_memory_allocated()


def reset_peak_memory() -> None:
    """The peak begins anew from what is allocated now."""
    if kind() == "cpu":
        processes.reset_peak_resident()
    else:
        _runtime().reset_peak_memory_stats()


def host_memory(num_bytes: int) -> torch.Tensor:
    """uint8, for copies to and from the device that don't wait (pinned); on CPU memory like any other."""
    return _platform().host_memory(num_bytes)


def can_share_memory() -> bool:
    """Whether another process that sees the device can open memory of this one."""
    return _platform().can_share_memory()


def shared_memory(num_bytes: int) -> SharedMemory:
    """Memory of the device that another process can open by its handle."""
    return _platform().shared_memory(num_bytes)


def open_shared(handle: MemoryHandle) -> torch.Tensor:
    """uint8, no copy. Raises ValueError on CPU when its maker is gone."""
    return _platform().open_shared(handle)


def collective_backend() -> Literal["gloo", "nccl", "hccl"]:
    return {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[kind()]


def adapt_megatron() -> None:
    """Makes megatron-core run on this device. Call it before anything imports megatron; a second call does nothing."""
    _platform().adapt_megatron()
    patching.apply("train", kind())
    # It warns of every layer whose MLP or experts are a class of ours.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """Attention within each segment of a pack, by the device's own kernel.

    query [T, heads, dim]; key, value [K, kv_heads, dim]; returns [T, heads, value dim].
    """
    width = value.shape[-1]
    # Kernels want heads of one size, latent attention has others for values: zeros change no product and come out as zeros.
    query, key, value = (_filled(heads, max(query.shape[-1], width)) for heads in (query, key, value))
    return _platform().packed_attention(query, key, value, segments, causal, scale)[..., :width]


def _filled(heads: torch.Tensor, width: int) -> torch.Tensor:
    missing = width - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing else heads


def grouped_matmul(tokens: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """Each group's rows times its own weight: tokens [T, in], of which the first counts[0] belong to weights[0] [out, in] -> [T, out].

    A weight whose group is empty gets a gradient of zeros.
    """
    return _platform().grouped_matmul(tokens, weights, counts)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight (arXiv:1910.07467), computed in float32; hidden [..., n], weight [n]."""
    return _platform().rms_norm(hidden, weight, eps)


def rope(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns heads [T, heads, dim] by float32 cos and sin [T, dim], whose halves are equal; computed in float32."""
    return _platform().rope(heads, cos, sin)


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv:2002.05202); [..., 2 n], the gate first -> [..., n]."""
    return _platform().swiglu(gate_and_up)


def set_threads(count: int) -> None:
    """Intra-op threads of the process; 0 leaves torch's choice. A resumed run is bit-exact only with the same count."""
    if count:
        torch.set_num_threads(count)


def make_deterministic() -> None:
    """Kernels that give the same bits every time; what has none raises RuntimeError. On an accelerator the process needs
    `resources.deterministic_environment` from its beginning."""
    # Not warn_only: the backward of flash attention would then warn and stay as it is.
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Everything `set_rng_state` needs; tensors, numbers and tuples only, so that it loads without pickle's dangers."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "device": None if kind() == "cpu" else _runtime().get_rng_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        _runtime().set_rng_state(state["device"])
