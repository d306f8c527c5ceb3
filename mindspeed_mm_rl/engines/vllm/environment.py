"""Environment variables of a process that runs vLLM; they must stand before vLLM is imported, so the one who starts it sets them."""

from __future__ import annotations

ROLLOUT_ENV = {
    # The engine lives in the worker's own process: requests, weights and aborts are plain calls.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Compiling the log-prob ranks costs seconds at the first request and gains nothing at these sizes.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    # Idle OpenMP threads that spin slow down the other processes of the machine up to four times.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def rollout_env(threads: int) -> dict[str, str]:
    """ROLLOUT_ENV with the number of OpenMP threads (0 = OpenMP's own choice)."""
    return ROLLOUT_ENV | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
