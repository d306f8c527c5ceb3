"""How fast one training iteration is, on tiny models and the real engines; one JSON line per run.

    python benchmarks/iteration.py --model text     ~10 M parameters, 32 prompts x 8 samples, 64 + 128 tokens
    python benchmarks/iteration.py --model vl       tiny Qwen2.5-VL, 32 prompts x 8 samples, one 84 x 84 picture and 32 tokens each

Tokens are prompt and response tokens, as in e2e_tps. `share_of_neither` is the part of an iteration that is neither rollout nor update.
`update_over_transformers` compares the update with the same number of sequences of the same length in plain transformers
(forward, backward, AdamW, padded batches of 32), measured in the same run on the same threads.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.plans import whole_plan
from tests.tiny import make_tiny_text, make_tiny_vl

PROMPTS, SAMPLES, PROMPT_TOKENS = 32, 8, 64
RESPONSE_TOKENS = {"text": 128, "vl": 32}
TEXT_SIZES = {"hidden": 256, "intermediate": 1280, "layers": 6, "heads": 8, "kv_heads": 4, "vocab": 4096}
SEQUENCES_PER_BATCH = 32


def make_model(kind: str, folder: Path) -> Path:
    return make_tiny_text(folder, **TEXT_SIZES) if kind == "text" else make_tiny_vl(folder)


def question(tokenizer: Any, number: int) -> str:
    """A text whose rendered prompt has PROMPT_TOKENS tokens."""
    text = f"{number}"
    while len(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]) < PROMPT_TOKENS:
        text += " ?"
    return text


def write_rows(kind: str, hf_path: Path, path: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_path)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4 * PROMPTS):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)).save(encoded, "PNG")
        images = [{"bytes": encoded.getvalue(), "path": None}] if kind == "vl" else []
        content = "<image>Find x." if kind == "vl" else question(tokenizer, number)
        rows.append(
            {
                "data_source": "benchmark",
                "prompt": [{"role": "user", "content": content}],
                "images": images,
                "reward_model": {"style": "rule", "ground_truth": "1"},
                "extra_info": {"index": number, "answer": "1"},
            }
        )
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", pa.struct([("index", pa.int64()), ("answer", pa.string())])),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def make_plan(kind: str, hf_path: Path, folder: Path, iterations: int, threads: int) -> Plan:
    plan = whole_plan(hf_path, write_rows(kind, hf_path, folder / "train.parquet"), folder)
    tokens = RESPONSE_TOKENS[kind]
    return replace(
        plan,
        run=replace(
            plan.run,
            train_iters=iterations,
            prompts_per_generation=PROMPTS,
            samples_per_prompt=SAMPLES,
            mini_batch_prompts=PROMPTS,
            on_policy=True,
            save="",
            timeout_seconds=600.0,
        ),
        train=replace(plan.train, threads=threads, temperature=1.0, max_tokens_per_micro_batch=6144),
        rollout=replace(
            plan.rollout,
            threads=threads,
            temperature=1.0,
            max_tokens=tokens,
            max_num_seqs=PROMPTS * SAMPLES,
            max_num_batched_tokens=8192,
            kv_cache_bytes=1 << 30,
            enable_prefix_caching=False,
        ),
        reward=replace(plan.reward, max_tokens=tokens, overlong_buffer=tokens - 1),
        recipe=replace(plan.recipe, train_prompts=PROMPTS),
    )


def transformers_update_seconds(hf_path: Path, tokens: int, repeats: int, threads: int) -> float:
    """Median seconds of forward, backward and AdamW over PROMPTS * SAMPLES text sequences; logits at every position."""
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_path).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(10, 500, (PROMPTS * SAMPLES, tokens))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for rows in ids.split(SEQUENCES_PER_BATCH):
            logprobs = model(rows).logits[:, PROMPT_TOKENS - 1 : -1].log_softmax(-1).gather(-1, rows[:, PROMPT_TOKENS:, None])
            (-logprobs.mean() / (len(ids) / len(rows))).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("text", "vl"), default="text")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations; one more is run first and left out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf_path = make_model(arguments.model, folder / "model")
        plan = make_plan(arguments.model, hf_path, folder, arguments.iterations + 1, arguments.threads)
        result: dict[str, Any] = {"model": arguments.model, "threads": arguments.threads, "iterations": arguments.iterations}
        if arguments.model == "text":
            expected = transformers_update_seconds(hf_path, PROMPT_TOKENS + RESPONSE_TOKENS["text"], 2, arguments.threads)
        build.run(plan)
        records = read_records(folder / "logs" / "metrics.jsonl")[1:]
    of = {key: median(record[key] for record in records) for key in records[0] if key != "iteration"}
    shares = [1 - (record["timing/rollout"] + record["timing/update"]) / record["timing/all"] for record in records]
    result |= {
        "iteration_seconds": of["timing/all"],
        "tokens_per_second": of["e2e_tps"],
        "rollout_tokens_per_second": of["vllm_tps"],
        "generated_tokens_per_second": of["response_length/mean"] * PROMPTS * SAMPLES / of["timing/rollout"],
        "update_tokens_per_second": of["update_tps"],
        "weight_push_seconds": of["timing/resharding_to_infer"],
        "share_of_neither": median(shares),
        "mean_tokens": of["response_length/mean"] + of["prompt_length/mean"],
    }
    if arguments.model == "text":
        result["update_over_transformers"] = expected / of["timing/update"]
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    main()
