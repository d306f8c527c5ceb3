"""Accuracy of checkpoints on held-out pictures with vLLM: greedy, mean@k at temperature 1, and with the pictures blanked.

With white paper for a picture nothing tells the answer: a model that still scores above chance would have read it somewhere else.

    python examples/rl/quickstart/evaluate.py --model start=quickstart/model/start end=quickstart/model/end \\
        --data quickstart/data/rl/test.parquet --out quickstart/evaluation.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os

# Read when vLLM is imported: one process, no compiler, no network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TORCH_COMPILE_DISABLE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    OMP_WAIT_POLICY="PASSIVE",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

from mathruler.grader import extract_boxed_content, grade_answer  # noqa: E402
from PIL import Image  # noqa: E402
from questions import Question, prompt_tokens, read_questions  # noqa: E402
from tqdm import tqdm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from mindspeed_mm_rl.data.chat import ChatRenderer  # noqa: E402

NEVER_SAMPLED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MAX_MODEL_LEN = 256
KV_CACHE_BYTES = 256 << 20
PICTURES_AT_A_TIME = 64


def blanked(question: Question) -> Question:
    return replace(question, image=Image.new("RGB", question.image.size, "white"))


def correct(text: str, answer: int) -> bool:
    return grade_answer(extract_boxed_content(text), str(answer))


class Model:
    """A checkpoint folder in vLLM."""

    def __init__(self, folder: Path, max_tokens: int, seed: int) -> None:
        self.renderer = ChatRenderer(folder)
        self.banned = dict.fromkeys(self.renderer.tokenizer.convert_tokens_to_ids(list(NEVER_SAMPLED)), -100.0)
        self.max_tokens, self.seed = max_tokens, seed
        self.engine = LLM(
            str(folder),
            dtype="float32",
            enforce_eager=True,
            use_tqdm_on_load=False,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=PICTURES_AT_A_TIME * 4,
            max_num_batched_tokens=PICTURES_AT_A_TIME * MAX_MODEL_LEN,
            # A prompt in two chunks would rewind its random generator, which CPU generators can't.
            enable_chunked_prefill=False,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            limit_mm_per_prompt={"image": 1, "video": 0},
            seed=seed,
        )

    def accuracy(self, questions: list[Question], samples: int, temperature: float, title: str) -> float:
        right = 0
        with tqdm(total=len(questions), desc=title, unit="picture") as bar:
            for start in range(0, len(questions), PICTURES_AT_A_TIME):
                part = questions[start : start + PICTURES_AT_A_TIME]
                for question, texts in zip(part, self.respond(part, samples, temperature, start), strict=True):
                    right += sum(correct(text, question.answer) for text in texts)
                bar.update(len(part))
        return right / (len(questions) * samples)

    def respond(self, questions: list[Question], samples: int, temperature: float, first: int) -> list[list[str]]:
        prompts = [
            {"prompt_token_ids": prompt_tokens(self.renderer, question), "multi_modal_data": {"image": question.image}}
            for question in questions
        ]
        settings = [
            SamplingParams(
                n=samples, temperature=temperature, max_tokens=self.max_tokens, seed=self.seed + first + i, logit_bias=self.banned
            )
            for i in range(len(questions))
        ]
        return [[output.text for output in request.outputs] for request in self.engine.generate(prompts, settings, use_tqdm=False)]


def evaluate(name: str, folder: Path, questions: list[Question], samples: int, max_tokens: int, seed: int) -> dict[str, float]:
    model = Model(folder, max_tokens, seed)
    blank = [blanked(question) for question in questions]
    return {
        "sampled": model.accuracy(questions, samples, 1.0, f"{name}: mean@{samples}"),
        "greedy": model.accuracy(questions, 1, 0.0, f"{name}: greedy"),
        "blanked_sampled": model.accuracy(blank, samples, 1.0, f"{name}: blanked, mean@{samples}"),
        "blanked_greedy": model.accuracy(blank, 1, 0.0, f"{name}: blanked, greedy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, metavar="NAME=FOLDER", help="checkpoints in Hugging Face format")
    parser.add_argument("--data", type=Path, required=True, help="parquet of geo3k.py")
    parser.add_argument("--out", type=Path, required=True, help="json file to write")
    parser.add_argument("--limit", type=int, default=None, help="use the first so many pictures (default: all)")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    questions = read_questions(args.data, args.limit)
    answers = [question.answer for question in questions]
    result: dict[str, object] = {
        "pictures": len(questions),
        "samples": args.samples,
        "chance": max(answers.count(answer) for answer in set(answers)) / len(answers),
        "models": {},
    }
    for pair in args.model:
        name, folder = pair.split("=", 1)
        result["models"][name] = evaluate(name, Path(folder), questions, args.samples, args.max_tokens, args.seed)
        # The engine's memory is freed before the next one asks for its own.
        gc.collect()
    unfinished = args.out.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=1))
    os.replace(unfinished, args.out)


if __name__ == "__main__":
    main()
