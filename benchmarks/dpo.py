"""How many preference pairs per second, beside TRL's DPOTrainer? One JSON line.

The same ~10 M-parameter text model and pairs, float32, sigmoid loss, the reference run in every step, one optimizer step per PAIRS pairs.
Our loop whole (Ray, data, reference, update) and TRL's whole training step take turns, a few steps each, for several rounds; TRL pads and
so gets the best of several batch sizes, without gradient checkpointing. `uneven`: lengths spread as those of worked answers do, the median
at 90 tokens, one in twenty over 240; `equal`: all of 96.

TRL goes into a folder of its own, torch and transformers are those of this environment:
    pip install --no-deps --target FOLDER trl accelerate

Example:
    python benchmarks/dpo.py --trl FOLDER --rounds 3
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mindspeed_mm_rl.config.check import check
from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.data.indexed import column_name
from mindspeed_mm_rl.data.preprocess.output import new_columns
from mindspeed_mm_rl.sinks import read_records

SIZES = {"hidden": 256, "intermediate": 1280, "layers": 6, "heads": 8, "kv_heads": 4, "vocab": 4096}
KINDS = ("uneven", "equal")
PAIRS, WARM_UP = 16, 1
TRL_BATCHES = (2, 4, 8)
"""Pairs of one padded forward pass."""
IGNORED = -100
Pair = dict[str, list[int]]


def draw_pairs(kind: str, count: int) -> list[Pair]:
    dice = random.Random(0)

    def ids(count: int) -> list[int]:
        return [dice.randrange(10, 500) for _ in range(count)]

    def lengths() -> tuple[int, int, int]:
        if kind == "equal":
            return 64, 96, 96
        chosen, rejected = (min(400, max(16, round(90 * math.exp(0.6 * dice.gauss(0, 1))))) for _ in range(2))
        return dice.randint(32, 96), chosen, rejected

    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(ids, lengths()), strict=True)) for _ in range(count)]


def write_columns(pairs: list[Pair], prefix: Path) -> None:
    names = [Path(column_name(prefix, f"{side}_{column}")) for side in ("chosen", "rejected") for column in ("input_ids", "labels")]
    with new_columns(names) as writers:
        for pair in pairs:
            for number, side in enumerate(("chosen", "rejected")):
                prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
                writers[2 * number].add(prompt + response)
                writers[2 * number + 1].add([IGNORED] * len(prompt) + response)


def our_seconds(model: Path, prefix: Path, output: Path, steps: int, threads: int) -> list[float]:
    """Of each step, data and reference included."""
    from mindspeed_mm_rl.trainer.build import run

    config = output.with_suffix(".yaml")
    keys: dict[str, Any] = {
        "stage": "dpo",
        "tokenizer_name_or_path": str(model),
        "data_path": str(prefix),
        "global_batch_size": PAIRS,
        "train_iters": WARM_UP + steps,
        "bf16": False,
        "lr": 1e-6,
        "lr_decay_style": "constant",
        "cache_ref_logprobs": False,
    }
    config.write_text(json.dumps({"megatron_training": keys, "rl_config": {"output": str(output), "use_tensorboard": False}}))
    checked = load_config(config, [])
    check(checked)
    plan = make_plan(checked)
    run(replace(plan, train=replace(plan.train, threads=threads)))
    return [record["timing/all"] for record in read_records(output / "metrics.jsonl")][WARM_UP:]


def trl_seconds(trl: str, model: str, pairs: list[Pair], batch: int, steps: int, threads: int) -> list[float]:
    """Of each step. Runs in a process of its own."""
    sys.path.insert(0, trl)
    import torch

    import mindspeed_mm_rl  # noqa: F401  TRL imports torchvision, which the package makes importable on CPU

    torch.set_num_threads(threads)
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Times(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=PAIRS // batch,
            max_steps=WARM_UP + steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(model).float() for _ in range(2))
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(model=policy, ref_model=reference, args=config, processing_class=tokenizer, train_dataset=text)
        trainer.train_dataset = Dataset.from_list(pairs)
        times = Times()
        trainer.add_callback(times)
        trainer.train()
    return [end - start for start, end in zip(times.ends[WARM_UP - 1 : -1], times.ends[WARM_UP:], strict=True)]


def apart(work: Callable[..., list[float]], *arguments: Any) -> list[float]:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def compare(kind: str, model: Path, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    pairs = draw_pairs(kind, PAIRS * (WARM_UP + chosen.steps))
    prefix = folder / kind
    write_columns(pairs, prefix)

    def theirs(batch: int, steps: int) -> list[float]:
        return apart(trl_seconds, str(chosen.trl), str(model), pairs, batch, steps, chosen.threads)

    batch = min(TRL_BATCHES, key=lambda size: median(theirs(size, 2)))
    ours, of_trl = [], []
    for number in range(chosen.rounds):
        of_trl.append(median(theirs(batch, chosen.steps)))
        ours.append(median(our_seconds(model, prefix, folder / f"{kind}_{number}", chosen.steps, chosen.threads)))
    return {
        "pairs_per_second": round(PAIRS / median(ours), 2),
        "trl_pairs_per_second": round(PAIRS / median(of_trl), 2),
        "ratio": round(median(of_trl) / median(ours), 3),
        "ratio_of_each_round": [round(slow / fast, 3) for slow, fast in zip(of_trl, ours, strict=True)],
        "trl_batch": batch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="folder that TRL is installed in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a round; one more is run first and left out")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    from tests.tiny import make_tiny_text

    with tempfile.TemporaryDirectory() as name:
        model = make_tiny_text(Path(name) / "model", **SIZES)
        found = {kind: compare(kind, model, Path(name), chosen) for kind in KINDS}
    print(json.dumps({"threads": chosen.threads, "rounds": chosen.rounds, "steps": chosen.steps} | found))


if __name__ == "__main__":
    main()
