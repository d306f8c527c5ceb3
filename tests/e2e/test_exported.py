"""A training save, exported by mm-convert, gives vLLM the log-probs that the trainer had."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from checkpoint.convert_cli import main
from mindspeed_mm_rl.engines.vllm.environment import rollout_env
from tests.plans import train_plan

IDS = [8, 20, 21, 300, 31, 32, 41, 5, 77, 130, 200]
TOLERANCE = 1e-4


def logprobs_of_vllm(folder: str) -> list[float]:
    """Of every token but the first, in a process of its own: megatron on CPU changes torch for the whole process."""
    from vllm import LLM, SamplingParams

    from mindspeed_mm_rl.engines.vllm.model_class import import_model_class

    import_model_class(folder)
    engine = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        max_num_batched_tokens=512,
        enable_chunked_prefill=False,
        limit_mm_per_prompt={"image": 1, "video": 0},
        kv_cache_memory_bytes=64 << 20,
        seed=0,
    )
    (output,) = engine.generate([{"prompt_token_ids": IDS}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    return [scores[token].logprob for token, scores in zip(IDS[1:], output.prompt_logprobs[1:], strict=True)]


def test_logprobs_of_an_exported_save(one_rank: None, tiny_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    engine = MegatronTrainEngine(train_plan(tiny_vl), False, False, publish_vision=True)
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        ids = torch.tensor(IDS)
        logits = engine.policy.logits(engine.policy(ids, engine.policy.layout([ids], [[]])))
    trained = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    iteration = tmp_path / "save" / "iter_0000003"
    (iteration / "actor").mkdir(parents=True)
    engine.save(iteration / "actor")
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("3")
    options = [f"--cfg.mm_dir={tmp_path / 'save'}", f"--cfg.hf_config.hf_dir={tiny_vl}", f"--cfg.save_hf_dir={tmp_path / 'hf'}"]
    assert main(["mm_to_hf", *options]) == 0
    for name, value in (rollout_env(threads=1) | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        exported = torch.tensor(process.submit(logprobs_of_vllm, str(tmp_path / "hf")).result(timeout=400))
    torch.testing.assert_close(exported, trained, atol=TOLERANCE, rtol=0)
