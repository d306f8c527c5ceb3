"""A Qwen2.5 of half a million parameters with random weights, whose tokenizer knows the texts of sums.py: digits and little else."""

from __future__ import annotations

import os
import random
from pathlib import Path

import sums
import torch
from tokenizer import AS_QWEN2, END, PADDING, TURNS, learn_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 320
"""A multiple of 64; 256 of them are the bytes."""
MARKS = ("\\boxed{",)
LEARNED_FROM = 200
"""Problems whose texts the tokenizer learns: they only differ in their digits."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    chains = list(sums.new_chains(random.Random(0), LEARNED_FROM, set()))
    texts = [text for chain in chains for text in ("user\n", chain.question(), "assistant\n", sums.solution(chain))]
    return learn_tokenizer(texts, AS_QWEN2, MARKS, TURNS, VOCABULARY)


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PADDING),
    )


def write_model(out: Path, seed: int) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(make_config(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    unfinished = out.with_name(out.name + ".partial")
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    os.replace(unfinished, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
