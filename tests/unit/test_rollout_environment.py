"""Environment variables of the processes that run vLLM."""

from __future__ import annotations

from mindspeed_mm_rl.engines.vllm.environment import without_segments


def test_a_rollout_process_that_sleeps_has_no_expandable_segments():
    users = {
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512, expandable_segments:True,garbage_collection_threshold:0.8",
        "TASK_QUEUE_ENABLE": "2",
    }
    assert without_segments(users) == {
        "PYTORCH_NPU_ALLOC_CONF": "",
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512,garbage_collection_threshold:0.8",
        "TASK_QUEUE_ENABLE": "2",
    }
