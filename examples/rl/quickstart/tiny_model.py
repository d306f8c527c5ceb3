"""A Qwen2.5-VL of about a million parameters with random weights: Hugging Face folder with tokenizer, chat template and image processor.

python examples/rl/quickstart/tiny_model.py --data quickstart/data/rl/train.parquet --out quickstart/model/random
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from pictures import ANSWERS, solution
from questions import read_questions
from tokenizer import AT_DIGITS, END, PADDING, TURNS, learn_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PATCH, MERGE, TEMPORAL = 14, 2, 2
VOCABULARY = 448
"""A multiple of 64."""
SPECIAL = (*TURNS, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
MARKS = ("<think>", "</think>", "\\boxed{")


def make_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """The fixed instruction in every prompt becomes a handful of tokens."""
    texts = [text for prompt in sorted(set(prompts)) for answer in ANSWERS for text in ("user\n", prompt, "assistant\n", solution(answer))]
    return learn_tokenizer(texts, AT_DIGITS, MARKS, SPECIAL, VOCABULARY)


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.05,
            "bos_token_id": None,
            "eos_token_id": token_id(END),
            "pad_token_id": token_id(PADDING),
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "window_size": 56,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": 0.05,
        },
        tie_word_embeddings=False,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def image_processor() -> dict[str, object]:
    side = PATCH * MERGE
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": side**2,
        "max_pixels": 64 * side**2,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        # White paper becomes zero input. With the usual mean the warm start stood at chance for hundreds of steps.
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [0.25, 0.25, 0.25],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet of geo3k.py: the tokenizer learns its prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = make_tokenizer([question.content.replace("<image>", "") for question in read_questions(args.data)])
    torch.manual_seed(args.seed)
    model = Qwen2_5_VLForConditionalGeneration(make_config(tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(args.out)
    (args.out / "preprocessor_config.json").write_text(json.dumps(image_processor(), indent=1))
    model.save_pretrained(args.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
