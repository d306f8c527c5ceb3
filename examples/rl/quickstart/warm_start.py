"""Short supervised training on worked solutions, in plain transformers: what a real checkpoint brings along before reinforcement learning.

First sight: the whole model learns until it reads nearly all pictures, and then only its vision encoder and projector are kept. They stay
frozen from here on, as the trainer leaves them. Then the start: a language model with fresh weights learns the answer format and begins to
use what the encoder sees. Most of the solutions that it is shown belong to other pictures, so that it stays unsure: it still samples every
answer now and then, which is what reinforcement learning needs to find the right one.

    python examples/rl/quickstart/warm_start.py --model quickstart/model/random --data quickstart/data/warm_start \\
        --out quickstart/model/warm
"""

from __future__ import annotations

import argparse
import inspect
import re
from functools import partial
from pathlib import Path

import torch
from pictures import solution
from questions import Question, prompt_tokens, read_questions
from supervised import BATCH, Stage, save, train
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, Qwen2_5_VLForConditionalGeneration

from mindspeed_mm_rl.data.chat import ChatRenderer

MAX_NEW_TOKENS = 28
ANSWER = re.compile(r"<think>.*</think> ?\\boxed\{(\d+)\}", re.DOTALL)
_ASKS_FOR_PICTURE_TOKENS = "mm_token_type_ids" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters
"""transformers 5 does; 4 finds them itself."""
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
            **({"mm_token_type_ids": (ids == self.image_token).int()} if _ASKS_FOR_PICTURE_TOKENS else {}),
            "pixel_values": self.pixels[index].flatten(0, 1),
            "image_grid_thw": self.grids[index],
        }


def solution_loss(model: Qwen2_5_VLForConditionalGeneration, pictures: Pictures, unsure: float) -> torch.Tensor:
    """Cross entropy of a random batch's worked solutions, the end of sequence included; a share `unsure` of them is of other pictures."""
    index = torch.randint(len(pictures.answers), (BATCH,))
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


def learn(model: Qwen2_5_VLForConditionalGeneration, pictures: Pictures, held_out: Pictures, unsure: float, stage: Stage) -> None:
    train(model, partial(solution_loss, model, pictures, unsure), partial(accuracy, model, held_out), stage)


def with_frozen_sight(folder: Path, seeing: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint's fresh language model behind the vision encoder and projector of `seeing`."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).float()
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
    seeing = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.model).float()
    learn(seeing, pictures, held_out, 0.0, Stage("sight", stop=args.sight, steps=800, first_look=150, look_every=10))
    model = with_frozen_sight(args.model, seeing)
    learn(model, pictures, held_out, args.unsure, Stage("start", stop=args.stop, steps=800, first_look=60, look_every=2))
    save(model, args.model, args.out)


if __name__ == "__main__":
    main()
