"""Environment variables of a process that runs vLLM; they must stand before vLLM is imported, so the one who starts it sets them."""

from __future__ import annotations

from collections.abc import Mapping

from mindspeed_mm_rl.platforms.env import ALLOCATORS

ROLLOUT_ENV = {
    # The engine lives in the worker's own process: requests, weights and aborts are plain calls.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Before 0.11 there was another engine too, and CPUs and NPUs got that one.
    "VLLM_USE_V1": "1",
    # Compiling the log-prob ranks costs seconds at the first request and gains nothing at these sizes.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # vllm-ascend's faster vision tower pads its weights while they are loaded, and can't load a second time.
    "USE_OPTIMIZED_MODEL": "0",
    # From 0.11 on it keeps them in a format of the chip, and refuses to wake up with it.
    "VLLM_ASCEND_ENABLE_NZ": "0",
    # Users' files set it for another launcher; here the configuration alone says it.
    "VLLM_DP_SIZE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    # Idle OpenMP threads that spin slow down the other processes of the machine up to four times.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def without_segments(variables: Mapping[str, str]) -> dict[str, str]:
    """Of the variables that a user has for all workers: memory that can sleep lies in a pool of vLLM's, which refuses expandable segments.

    Example: without_segments({"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512"}) keeps max_split_size_mb:512.
    """

    def kept(value: str) -> str:
        return ",".join(setting for setting in value.split(",") if not setting.strip().startswith("expandable_segments"))

    return {name: kept(value) if name in ALLOCATORS else value for name, value in variables.items()}


def rollout_env(threads: int) -> dict[str, str]:
    """ROLLOUT_ENV with the number of OpenMP threads (0 = OpenMP's own choice)."""
    return ROLLOUT_ENV | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
