"""The device layer: what the CPU shim changes, and what it must leave alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mindspeed_mm_rl.platforms import compat, device, env


def test_rotary_buffers_of_hugging_face_are_right_beside_megatron(one_rank, tiny_vl: Path):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vl)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".inv_freq")}
    assert len(buffers) >= 2
    for name, buffer in buffers.items():
        # Head size 32 both times; the vision encoder turns half of it by each of its two axes.
        half = 8 if "visual" in name else 16
        torch.testing.assert_close(buffer, 10000.0 ** (-torch.arange(half) / half), atol=1e-7, rtol=1e-6)


@pytest.mark.skipif(device.kind() != "cpu", reason="the shim is for CPU")
def test_cuda_calls_mean_the_cpu_after_the_shim(one_rank):
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(2, device="cuda").device == torch.zeros(2).cuda().device == torch.ones(1).to("cuda:0").device == torch.device("cpu")
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert not torch.cuda.is_available()
    torch.cuda.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(1))


@pytest.mark.skipif(device.kind() != "cpu", reason="the shim is for CPU")
def test_a_second_call_changes_nothing(one_rank):
    before = torch.zeros, torch.Tensor.to, torch.Tensor.type
    device.adapt_megatron()
    assert before == (torch.zeros, torch.Tensor.to, torch.Tensor.type)


def test_rng_state_brings_all_generators_back():
    device.seed_everything(3)
    state = device.rng_state()
    first = random.random(), np.random.rand(), torch.rand(1).item()
    device.set_rng_state(state)
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())


def test_rng_state_is_saved_without_pickled_objects(tmp_path: Path):
    torch.save(device.rng_state(), tmp_path / "rng.pt")
    device.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))


def test_device_questions_have_answers():
    assert device.current().type == device.kind()
    assert device.peak_memory_bytes() > 0 or device.kind() != "cpu"
    assert device.collective_backend() == {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}[device.kind()]
    device.synchronize()
    device.empty_cache()


def test_environment_integers_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_RANK", "two")
    with pytest.raises(ValueError, match="SOME_RANK must be an integer, got 'two'"):
        env.read_int("SOME_RANK", 0)
    monkeypatch.setenv("SOME_RANK", "2")
    assert env.read_int("SOME_RANK", 0) == 2
    assert env.read_int("SOME_OTHER", 7) == 7
    assert env.read("SOME_OTHER", "x") == "x"


def test_only_supported_arguments_are_passed():
    def old(a: int) -> int:
        return a

    def open_ended(a: int, **rest: int) -> int:
        return a

    assert compat.supported_arguments(old, {"a": 1, "b": 2}) == {"a": 1}
    assert compat.supported_arguments(open_ended, {"a": 1, "b": 2}) == {"a": 1, "b": 2}


def test_versions_are_read_as_numbers():
    assert compat.installed_version("torch")[:1] == (int(torch.__version__.split(".")[0]),)
    with pytest.raises(ValueError, match="is not installed"):
        compat.installed_version("no-such-package")
