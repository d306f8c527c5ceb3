"""Short supervised training on worked sums: the model learns the format and begins to calculate, and reinforcement learning does the rest.

A share of the results that it is shown is slightly wrong, so that it stays unsure: it samples right and wrong results of the same sum,
which is what reinforcement learning needs to tell them apart.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import sums
import torch
from supervised import Stage, save, train
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2ForCausalLM

from mindspeed_mm_rl.data.chat import ChatRenderer

BATCH = 64
SLIPS = 0.3
STOP = 0.5
MAX_NEW_TOKENS = 28
IGNORED = -100


class Sums:
    """Every chain and its prompt, exactly as the trainer renders it."""

    def __init__(self, folder: Path, path: Path) -> None:
        renderer = ChatRenderer(folder)
        self.tokenizer = renderer.tokenizer
        self.chains = sums.read_chains(path)
        messages = ([{"role": "user", "content": chain.question()}] for chain in self.chains)
        self.prompts = [torch.tensor(renderer.token_ids(message, num_images=0)) for message in messages]

    def solution_tokens(self, chain: sums.Chain, rng: random.Random, slips: float) -> torch.Tensor:
        return torch.tensor(self.tokenizer(sums.solution(chain, rng, slips) + self.tokenizer.eos_token).input_ids)

    def padded(self, rows: list[torch.Tensor], side: str) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id, padding_side=side)


def solution_loss(model: Qwen2ForCausalLM, problems: Sums, rng: random.Random, slips: float) -> torch.Tensor:
    """Cross entropy of a random batch's worked solutions, the end of sequence included."""
    chosen = rng.sample(range(len(problems.chains)), BATCH)
    prompts = [problems.prompts[index] for index in chosen]
    solutions = [problems.solution_tokens(problems.chains[index], rng, slips) for index in chosen]
    rows = problems.padded([torch.cat(pair) for pair in zip(prompts, solutions, strict=True)], "right")
    targets = [torch.cat([torch.full_like(prompt, IGNORED), answer]) for prompt, answer in zip(prompts, solutions, strict=True)]
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    # Causal attention never looks at the padding on the right.
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, problems: Sums) -> float:
    """Share of greedy answers that are right."""
    rows = problems.padded(problems.prompts, "left")
    mask = (rows != problems.tokenizer.pad_token_id).long()
    tokens = model.generate(input_ids=rows, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    texts = problems.tokenizer.batch_decode(tokens[:, rows.shape[1] :], skip_special_tokens=True)
    right = [text.endswith(f"\\boxed{{{chain.answer()}}}") for text, chain in zip(texts, problems.chains, strict=True)]
    return sum(right) / len(right)


def warm_start(random_model: Path, data: Path, out: Path, seed: int) -> None:
    """Trains the checkpoint `random_model` on `data`/train.jsonl until it answers STOP of `data`/test.jsonl."""
    torch.manual_seed(seed)
    problems, held_out = (Sums(random_model, data / f"{split}.jsonl") for split in ("train", "test"))
    model = Qwen2ForCausalLM.from_pretrained(random_model).float()
    loss = partial(solution_loss, model, problems, random.Random(seed), SLIPS)
    train(model, loss, partial(accuracy, model, held_out), Stage("warm start", stop=STOP, steps=3000, first_look=150, look_every=10))
    save(model, random_model, out)
