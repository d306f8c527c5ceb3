"""What a plugin of vLLM brings for its device is used, and its sampler speaks of the policy; in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm_rl.engines.vllm.environment import rollout_env
from tests.tiny import make_tiny_text

PLUGIN = """
def register():
    from vllm import ModelRegistry
    ModelRegistry.register_model("Qwen2ForCausalLM", "vllm.model_executor.models.qwen3:Qwen3ForCausalLM")
"""
PROCESS = """
import json, sys
from types import SimpleNamespace

import torch
from mindspeed_mm_rl.engines.vllm.extension import WorkerExtension
from mindspeed_mm_rl.engines.vllm.model_class import import_model_class
from vllm import ModelRegistry
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

import_model_class(sys.argv[1])
worker = WorkerExtension()
worker.model_runner = SimpleNamespace(sampler=Sampler())
worker.score_processed_logits()
nothing = torch.zeros(1)
sampled = worker.model_runner.sampler(torch.tensor([[1.0, 2.0, 4.0]]), SamplingMetadata(
    temperature=torch.tensor([0.5]), all_greedy=False, all_random=True, top_p=None, top_k=None, generators={}, max_num_logprobs=0,
    no_penalties=True, prompt_token_ids=None, frequency_penalties=nothing, presence_penalties=nothing, repetition_penalties=nothing,
    output_token_ids=[[]], allowed_token_ids_mask=None, bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
))
print(json.dumps({
    "class": ModelRegistry.models["Qwen2ForCausalLM"].load_model_cls().__name__,
    "token": int(sampled.sampled_token_ids),
    "logprob": float(sampled.logprobs_tensors.logprobs[0, 0]),
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plugin")
    make_tiny_text(folder / "model")
    (folder / "other_device.py").write_text(PLUGIN)
    about = folder / "other_device-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-device\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nother = other_device:register\n")
    paths = os.pathsep.join((str(folder), str(Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(folder / "model")],
        env=os.environ | rollout_env(threads=1) | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_plugin_brings_the_class_of_a_model(seen: dict[str, Any]):
    assert seen["class"] == "Qwen3ForCausalLM"


def test_a_sampler_that_was_not_told_returns_the_policys_logprobs(seen: dict[str, Any]):
    """Logits 1, 2 and 4 at temperature 0.5: softmax of 2, 4 and 8, whose sum of exponentials is 3042.9452."""
    assert seen["logprob"] == pytest.approx([2, 4, 8][seen["token"]] - 8.0205810, abs=1e-4)
