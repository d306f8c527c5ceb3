"""The device of this process, chosen once: npu before cuda before cpu."""

from __future__ import annotations

import importlib.util
import logging
import random
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from mindspeed_mm_rl.platforms import cpu, cuda, env, npu, processes
from mindspeed_mm_rl.platforms.packed_sdpa import Segments

Kind = Literal["cpu", "cuda", "npu"]


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


def select_local() -> torch.device:
    """Binds the process to the device LOCAL_RANK, of those that are visible to it."""
    if kind() != "cpu":
        runtime = _runtime()
        runtime.set_device(env.read_int("LOCAL_RANK", 0) % runtime.device_count())
    return current()


def synchronize() -> None:
    if kind() != "cpu":
        _runtime().synchronize()


def empty_cache() -> None:
    if kind() != "cpu":
        _runtime().empty_cache()


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


def collective_backend() -> Literal["gloo", "nccl", "hccl"]:
    return {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[kind()]


def adapt_megatron() -> None:
    """Makes megatron-core run on this device. Call it before anything imports megatron; a second call does nothing."""
    _platform().adapt_megatron()
    # It warns of every layer whose experts are a class of ours.
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


def set_threads(count: int) -> None:
    """Intra-op threads of the process; 0 leaves torch's choice. A resumed run is bit-exact only with the same count."""
    if count:
        torch.set_num_threads(count)


def make_deterministic() -> None:
    torch.use_deterministic_algorithms(True, warn_only=kind() != "cpu")
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
