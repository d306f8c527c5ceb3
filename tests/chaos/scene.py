"""What a chaos run trains on: a tiny random model, a few rows, and one configuration per setting."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

TRAIN_ITERS = 6
_ROWS = 24


def make_scene(folder: Path) -> Path:
    """Model and rows, shared by every run; returns the folder."""
    from tests.tiny import make_tiny_vl

    make_tiny_vl(folder / "model")
    (folder / "data").mkdir(parents=True)
    rng = np.random.default_rng(5)
    pq.write_table(pa.Table.from_pylist([_row(rng, index) for index in range(_ROWS)]), folder / "data" / "train.parquet")
    return folder


def _row(rng: np.random.Generator, index: int) -> dict[str, Any]:
    """One picture, two, none, in turn."""
    images = [{"bytes": _picture(rng), "path": None} for _ in range((1, 2, 0)[index % 3])]
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>" * len(images) + f"Find x, number {index}."}],
        "images": images,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(index)},
        "extra_info": {"split": "train", "index": index, "answer": str(index), "question": "Find x."},
    }


def _picture(rng: np.random.Generator) -> bytes:
    width, height = (int(side) for side in rng.integers(40, 130, 2))
    encoded = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def grpo() -> dict[str, Any]:
    """GRPO with a KL term, one device: log-probs of the reference and of the policy, two updates per iteration."""
    return {"megatron_training": {"stage": "ray_grpo", "global_batch_size": 8}, "rl_config": {"init_kl_coef": 0.01, "mini_batch_size": 4}}


def dapo() -> dict[str, Any]:
    """DAPO with filtering and refill, two devices: two trainer ranks and two rollout replicas."""
    return {
        "megatron_training": {"stage": "ray_dapo", "global_batch_size": 8},
        "rl_config": {
            "actor_resource": {"num_npus": 2},
            "mini_batch_size": 3,
            "filter_groups_enable": True,
            "filter_groups_metric": "score",
            "filter_groups_max_batches": -1,
            "filter_groups_train_batch_size": 6,
        },
    }


SETTINGS = {"grpo": grpo, "dapo": dapo}


def write_config(scene: Path, setting: str, folder: Path, keep_last: int) -> Path:
    """The YAML of one run that saves and logs below `folder`. Random models are never right: the overlong penalty makes rewards differ."""
    own = SETTINGS[setting]()
    common = {
        "megatron_training": {
            "tokenizer_name_or_path": str(scene / "model"),
            "data_path": str(scene / "data"),
            "train_iters": TRAIN_ITERS,
            "save_interval": 1,
            "keep_last": keep_last,
            "bf16": False,
            "npu_deterministic": True,
            "min_pixels": 28 * 28,
            "max_pixels": 64 * 28 * 28,
            "lr": 1e-3,
            "seed": 7,
        },
        "actor_config": {"load": str(scene / "model"), "save": str(folder / "save")},
        "rl_config": {
            "output": str(folder / "logs"),
            "integrated_mode_config": {"ref_model_load_path": str(scene / "model")},
            "max_prompt_length": 200,
            "n_samples_per_prompt": 8,
            "rollout_max_tokens": 48,
            "overlong_buffer_enable": True,
            "overlong_buffer": 44,
            "verifier_parallel": 1,
            "timeout_seconds": 300,
        },
        "generate_config": {
            "limit_mm_image_per_prompt": 3,
            "kv_cache_bytes": 64 << 20,
            "sampling_config": {"max_tokens": 48, "temperature": 0.7},
        },
    }
    whole = {section: values | own.get(section, {}) for section, values in common.items()}
    path = folder / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(whole))
    return path
