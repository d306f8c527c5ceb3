"""Preference optimisation learns what there is to learn: real pairs, a rule of text, what only a picture tells. Minutes each."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import transformers

import mindspeed_mm_rl  # noqa: F401  transformers' models import torchvision, which the package makes importable on CPU
from mindspeed_mm_rl.sinks import read_records
from tests.chaos.run import TrainRun
from tests.continuation import compared

REPOSITORY = Path(__file__).parents[2]
VOCABULARY = 2048
REAL = """
megatron_training:
  stage: dpo
  tokenizer_name_or_path: {folder}/model
  data_path: {data}
  global_batch_size: 25
  train_iters: 108
  bf16: false
  lr: 1.0e-3
  lr_warmup_fraction: 0.05
  adam_beta2: 0.95
  seq_length: 1024
  save: {folder}/save
rl_config:
  output: {folder}/logs
eval:
  held_out_rows: 50
  at_start: true
  interval: 18
"""
KILLED = """
megatron_training:
  stage: dpo
  tokenizer_name_or_path: {model}
  data_path: {data}
  global_batch_size: 8
  train_iters: 60
  save_interval: 5
  keep_last: 1
  bf16: false
  npu_deterministic: true
  lr: 1.0e-3
  load: {model}
  save: {folder}/save
rl_config:
  output: {folder}/logs
eval:
  held_out_rows: 10
  interval: 20
"""
KILL_AFTER = (7, 23, 41)

pytestmark = pytest.mark.timeout(1200)


def shell(command: str, folder: Path) -> None:
    """In a folder of its own, with this checkout's package."""
    variables = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "VIRTUAL_ENV": str(REPOSITORY / ".venv")}
    variables["PATH"] = f"{REPOSITORY}/.venv/bin:{variables['PATH']}"
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=variables, check=True)


def write_model(folder: Path, data: Path) -> None:
    """Two thirds of a million parameters, with a tokenizer that has learned the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tests.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((row[key] for row in rows for key in ("question", "chosen", "rejected")), trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    transformers.set_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def test_real_pairs_are_learned(data_dir: Path, tmp_path: Path) -> None:
    data = data_dir.absolute() / "preference" / "train.jsonl"
    write_model(tmp_path / "model", data)
    (tmp_path / "real.yaml").write_text(REAL.format(folder=tmp_path, data=data))
    shell(f"mm-rl train --config {tmp_path}/real.yaml", tmp_path)
    _, *records = read_records(tmp_path / "logs" / "metrics.jsonl")
    last_epoch = records[-18:]
    assert sum(record["rewards/accuracies"] for record in last_epoch) / len(last_epoch) > 0.9
    # A model of this size learns these by heart; what is held out is measured all the same.
    assert 40 < records[-1]["eval/held_out/num_pairs"] <= 50
    assert records[-1].keys() >= {"eval/held_out/rewards/accuracies", "eval/held_out/rewards/margins"}


def test_a_rule_of_text_is_learned(tmp_path: Path) -> None:
    """The worked sum that goes wrong on the way is the worse one."""
    shell(f"bash {REPOSITORY}/examples/rl/scripts/dpo_trainer_qwen25_tiny.sh", tmp_path)
    records = read_records(tmp_path / "quickstart" / "text" / "logs" / "dpo" / "metrics.jsonl")
    assert records[-1]["eval/test/rewards/accuracies"] > 0.9


def test_what_only_the_picture_tells_is_learned_from_the_picture(tmp_path: Path) -> None:
    tools = REPOSITORY / "examples" / "rl"
    for command in (
        f"python {tools}/quickstart/pictures.py --out quickstart/pictures",
        f"python {tools}/data_preprocess/geo3k.py --local_data quickstart/pictures/warm_start --local_dir quickstart/data/warm_start",
        f"python {tools}/data_preprocess/geo3k.py --local_data quickstart/pictures/rl --local_dir quickstart/data/geo3k",
        f"python {tools}/quickstart/tiny_model.py --data quickstart/data/geo3k/train.parquet --out quickstart/model/random",
        f"python {tools}/quickstart/warm_start.py --model quickstart/model/random --data quickstart/data/warm_start "
        "--out quickstart/model/warm",
        f"bash {tools}/scripts/dpo_trainer_qwen25vl_tiny.sh megatron_training.load=quickstart/model/warm "
        "megatron_training.ref_model=quickstart/model/warm",
    ):
        shell(command, tmp_path)
    last = read_records(tmp_path / "quickstart" / "logs" / "dpo" / "metrics.jsonl")[-1]
    assert last["eval/test/rewards/accuracies"] > 0.9
    assert last["eval/test_blank/rewards/accuracies"] == pytest.approx(0.5, abs=0.05)


def killed_config(folder: Path, model: Path, data: Path) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text(KILLED.format(folder=folder, model=model, data=data))
    return folder / "run.yaml"


def test_a_run_whose_processes_are_killed_again_and_again_ends_as_one_that_was_left_alone(tiny_text: Path, tmp_path: Path) -> None:
    """Driver and trainer in turn, at iterations that were not saved, with half of the reference's log-probs not on disk yet."""
    rng, data = random.Random(0), tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Find {number}.", "chosen": "x" * rng.randint(1, 9), "rejected": "y" * rng.randint(1, 9)} for number in range(50)]
    data.write_text("\n".join(map(json.dumps, rows)))
    with TrainRun(killed_config(tmp_path / "alone", tiny_text, data)) as alone:
        assert alone.wait(240) == 0, alone.console.tail()
    config = killed_config(tmp_path / "killed", tiny_text, data)
    for number, iteration in enumerate(KILL_AFTER):
        with TrainRun(config) as run:
            while run.iterations_done() < iteration:
                assert not run.is_over, run.console.tail()
                time.sleep(0.001)
            trainer = next(process.pid for process in run.footprint.look() if process.title.startswith("ray::ActorWorker"))
            os.kill(run.driver.pid if number % 2 == 0 else trainer, signal.SIGKILL)
            assert run.wait(120) != 0
    with TrainRun(config) as run:
        assert run.wait(240) == 0, run.console.tail()
    left, right = (read_records(tmp_path / name / "logs" / "metrics.jsonl") for name in ("alone", "killed"))
    assert [record["iteration"] for record in right] == list(range(1, 61))
    # How many log-probs had to be computed again says what was lost, not what was learned.
    for a, b in zip(left, right, strict=True):
        assert {**compared(a), "reference/computed_pairs": 0} == {**compared(b), "reference/computed_pairs": 0}
    shards = [sorted((tmp_path / name / "save" / "iter_0000060" / "actor").glob("*.distcp")) for name in ("alone", "killed")]
    assert len(shards[0]) == len(shards[1]) > 0
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*shards, strict=True)), "weights and optimizer, bit for bit"
