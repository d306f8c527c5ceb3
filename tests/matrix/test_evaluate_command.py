"""`mm-rl evaluate` of a save gives what was measured beside training; greedy gives one answer however often it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm_rl.sinks import read_records
from tests.data_files import row, write_rows

pytestmark = pytest.mark.timeout(600)

CONFIG = """
megatron_training:
  stage: ray_dapo
  tokenizer_name_or_path: {model}
  data_path: {folder}/train.parquet
  save: {folder}/save
  global_batch_size: 4
  train_iters: 1
  bf16: false
actor_config: {{lr: 0.001}}
rl_config:
  output: {folder}/logs
  n_samples_per_prompt: 4
  max_prompt_length: 200
  use_tensorboard: false
generate_config:
  sampling_config: {{max_tokens: 16}}
eval:
  data_path: {folder}/test.parquet
  n_samples_per_prompt: 4
  max_rows: 5
"""


def mm_rl(command: str, config: Path, *overrides: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mindspeed_mm_rl.cli.main", command, "--config", str(config), *overrides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_save_alone_and_beside_training(tiny_text: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        rows = [row(f"{name}: find x, number {number}.", [], answer=str(number)) for number in range(8)]
        write_rows(tmp_path / f"{name}.parquet", rows, drop=("images",))
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(model=tiny_text, folder=tmp_path))
    mm_rl("train", config)
    (trained,) = read_records(tmp_path / "logs" / "metrics.jsonl")
    before = {path: path.read_bytes() for path in (tmp_path / "save").rglob("*") if path.is_file()}

    out = mm_rl("evaluate", config, f"actor_config.load={tmp_path}/save", "actor_config.save=null", f"rl_config.output={tmp_path}/alone")
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    assert "hiyouga/geometry3k" in out and "mean@4" in out
    assert alone["iteration"] == 1
    for name in (name for name in trained if name.startswith("eval/")):
        assert alone[name] == trained[name], name
    assert trained["eval/hiyouga/geometry3k/response_length/mean"] > 1

    greedy = ["eval.temperature=0", "eval.n_samples_per_prompt=1", f"rl_config.output={tmp_path}/greedy"]
    mm_rl("evaluate", config, *greedy)
    first = json.loads((tmp_path / "greedy" / "evaluation.json").read_text())
    mm_rl("evaluate", config, *greedy, "generate_config.sampling_config.seed=5")
    second = json.loads((tmp_path / "greedy" / "evaluation.json").read_text())
    del first["timing/eval"], second["timing/eval"]
    assert first == second and first["iteration"] == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "save").rglob("*") if path.is_file()}
