"""Short supervised training on worked solutions, in plain transformers: what a real checkpoint brings along before reinforcement learning.

First sight: the whole model learns until it reads nearly all pictures, and then only its vision encoder and projector are kept. They stay
frozen from here on, as the trainer leaves them. Then the start: a language model with fresh weights learns the answer format and begins to
use what the encoder sees. Most of the solutions that it is shown belong to other pictures, so that it stays unsure: it still samples every
answer now and then, which is what reinforcement learning needs to find the right one.

Both stop at an accuracy, not at a number of steps: the curve is flat for a while, then steep, and the length of the flat part depends on
the seed.

    python examples/rl/quickstart/warm_start.py --model quickstart/model/random --data quickstart/data/warm_start \\
        --out quickstart/model/warm
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from pictures import solution
from questions import Question, prompt_tokens, read_questions
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from mindspeed_mm_rl.data.chat import ChatRenderer

BATCH = 32
LEARNING_RATE = 1e-3
WARMUP_STEPS = 20
MAX_NEW_TOKENS = 28
ANSWER = re.compile(r"<think>.*</think> ?\\boxed\{(\d+)\}", re.DOTALL)
NEVER_SAMPLED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def expand_image_tokens(token_ids: list[int], image_token: int, count: int) -> list[int]:
    """Example: expand_image_tokens([7, 1, 8], image_token=1, count=3) == [7, 1, 1, 1, 8]."""
    return [token for token_id in token_ids for token in [token_id] * (count if token_id == image_token else 1)]


class Pictures:
    """Every question's prompt and picture, prepared once. All prompts are equally long: the question is always the same."""

    def __init__(self, folder: Path, questions: list[Question]) -> None:
        renderer = ChatRenderer(folder)
        self.tokenizer = renderer.tokenizer
        processor = AutoImageProcessor.from_pretrained(folder)
        inputs = processor(images=[question.image for question in questions], return_tensors="pt")
        self.grids = inputs["image_grid_thw"]
        patches = int(self.grids[0].prod())
        self.pixels = inputs["pixel_values"].view(len(questions), patches, -1)
        self.image_token = renderer.image_token_id
        image_tokens = patches // processor.merge_size**2
        self.prompt = torch.tensor(expand_image_tokens(prompt_tokens(renderer, questions[0]), self.image_token, image_tokens))
        self.answers = [question.answer for question in questions]
        solutions = [torch.tensor(self.tokenizer(solution(answer) + self.tokenizer.eos_token).input_ids) for answer in self.answers]
        self.solutions = torch.nn.utils.rnn.pad_sequence(solutions, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def inputs(self, index: torch.Tensor, response: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        ids = self.prompt.expand(len(index), -1)
        if response is not None:
            ids = torch.cat([ids, response], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.image_token).int(),
            "pixel_values": self.pixels[index].flatten(0, 1),
            "image_grid_thw": self.grids[index],
        }


def solution_loss(model: Qwen2_5_VLForConditionalGeneration, pictures: Pictures, index: torch.Tensor, unsure: float) -> torch.Tensor:
    """Cross entropy of the worked solution's tokens, the end of sequence included; a share `unsure` of them is of other pictures."""
    others = torch.randint(len(pictures.answers), index.shape)
    response = pictures.solutions[torch.where(torch.rand(index.shape) < unsure, others, index)]
    logits = model(**pictures.inputs(index, response), logits_to_keep=response.shape[1] + 1, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), response.flatten(), ignore_index=pictures.tokenizer.pad_token_id)


@torch.no_grad()
def accuracy(model: Qwen2_5_VLForConditionalGeneration, pictures: Pictures) -> float:
    """Share of right greedy answers in the taught format."""
    index = torch.arange(len(pictures.answers))
    never = pictures.tokenizer.convert_tokens_to_ids(list(NEVER_SAMPLED))
    tokens = model.generate(**pictures.inputs(index), do_sample=False, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=never)
    texts = pictures.tokenizer.batch_decode(tokens[:, len(pictures.prompt) :], skip_special_tokens=True)
    found = [ANSWER.fullmatch(text.strip()) for text in texts]
    right = [match is not None and int(match[1]) == answer for match, answer in zip(found, pictures.answers, strict=True)]
    return sum(right) / len(right)


@dataclass(frozen=True)
class Stage:
    """Example: Stage("sight", unsure=0.0, stop=0.9, steps=800, first_look=100, look_every=10)."""

    title: str
    unsure: float
    """Share of solutions that belong to other pictures."""
    stop: float
    """Held-out accuracy that ends the stage."""
    steps: int
    """Giving up is an error after so many."""
    first_look: int
    """Answering is dear next to a step, and hopeless before the format is learned."""
    look_every: int


def train(model: Qwen2_5_VLForConditionalGeneration, pictures: Pictures, held_out: Pictures, stage: Stage) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    seen = 0.0
    with tqdm(range(1, stage.steps + 1), desc=f"{stage.title}, until {stage.stop:.2f} are right", unit="step") as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
            loss = solution_loss(model, pictures, torch.randint(len(pictures.answers), (BATCH,)), stage.unsure)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if step >= stage.first_look and step % stage.look_every == 0:
                seen = accuracy(model, held_out)
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{seen:.2f}")
            if seen >= stage.stop:
                return
    raise SystemExit(f"{stage.title}: {seen:.2f} of the answers are right after {stage.steps} steps, not {stage.stop}: try another --seed")


def with_frozen_sight(folder: Path, seeing: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint's fresh language model behind the vision encoder and projector of `seeing`."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.visual.load_state_dict(seeing.model.visual.state_dict())
    model.model.visual.requires_grad_(False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint of tiny_model.py")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet of geo3k.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sight", type=float, default=0.9, help="accuracy at which the vision encoder is good enough")
    parser.add_argument("--unsure", type=float, default=0.8, help="share of the start's solutions that belong to other pictures")
    parser.add_argument("--stop", type=float, default=0.3, help="accuracy at which to leave the rest to reinforcement learning")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pictures, held_out = (Pictures(args.model, read_questions(args.data / f"{split}.parquet")) for split in ("train", "test"))
    seeing = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    train(seeing, pictures, held_out, Stage("sight", unsure=0.0, stop=args.sight, steps=800, first_look=150, look_every=10))
    model = with_frozen_sight(args.model, seeing)
    train(model, pictures, held_out, Stage("start", args.unsure, args.stop, steps=800, first_look=60, look_every=2))
    unfinished = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(args.model, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(unfinished)
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(unfinished, args.out)


if __name__ == "__main__":
    main()
