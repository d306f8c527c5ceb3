"""Small data sets and model folders (tokenizer, chat template, picture settings; no weights) for the tests of the data part."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mindspeed_mm_rl.config.plan import DataPlan

SCRIPTS = Path(__file__).parents[1] / "examples" / "rl" / "data_preprocess"
# The template that Qwen2.5-VL's tokenizer carries.
VL_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run_geo3k(*arguments: object) -> int:
    """Exit status of the command."""
    return _script("geo3k").main([str(argument) for argument in arguments])


def write_vl_settings(folder: Path, image_token_id: int) -> None:
    """What makes a folder with a tokenizer one of a vision-language model, as far as data are concerned."""
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_vl", "transformers_version": "4.49.0", "image_token_id": image_token_id})
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "chat_template.jinja").write_text(VL_TEMPLATE)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids of SPECIAL_TOKENS after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=SPECIAL_TOKENS)


def make_hf_folder(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    write_vl_settings(folder, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    return folder


def png(height: int, width: int, seed: int = 0, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, kind)
    return stream.getvalue()


def row(text: str = "<image>Find x.", images: list[bytes] | None = None, answer: str | None = "5", **columns: Any) -> dict[str, Any]:
    """One row as the preprocessing scripts write it; columns replace whole columns."""
    images = [png(56, 56)] if images is None else images
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": text}],
        "images": [{"bytes": image, "path": None} for image in images],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "train", "index": 0, "answer": answer, "question": text},
    } | columns


def write_rows(path: Path, rows: list[dict[str, Any]], rows_per_group: int = 2, drop: tuple[str, ...] = ()) -> Path:
    pq.write_table(pa.Table.from_pylist(rows).drop_columns(list(drop)), path, row_group_size=rows_per_group)
    return path


def data_plan(train_path: Path, hf_path: Path, **changes: Any) -> DataPlan:
    values = {
        "train_path": str(train_path),
        "hf_path": str(hf_path),
        "seed": 1,
        "shuffle": True,
        "max_prompt_length": 512,
        "min_pixels": 28 * 28,
        "max_pixels": 128 * 28 * 28,
        "max_images_per_prompt": 4,
        "num_workers": 2,
        "skip_bad_rows": False,
        "prompt_key": "prompt",
        "image_key": "images",
        "trust_remote_code": False,
    }
    return DataPlan(**(values | changes))
