"""The shipped recipes of real models, with the published architecture of each in place of a downloaded folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.config.memory import offload_parts
from mindspeed_mm_rl.config.plan import Plan, TrainPlan
from mindspeed_mm_rl.platforms.memory import KNOWN, DeviceMemory

CONFIGS = Path(__file__).parents[1] / "examples/rl/configs"
PUBLISHED = Path(__file__).parent / "published"
"""config.json of each model, as its authors published it (https://huggingface.co); no weights."""
_ON_CPU_ALONE = ("tiny", "smollm2")
_ANY_CACHE = "generate_config.kv_cache_bytes=1000000000000"
"""Rules for CPU are not what a recipe for devices has to keep."""

RECIPES = sorted(path.stem for path in CONFIGS.glob("*_trainer_*.yaml") if not any(name in path.stem for name in _ON_CPU_ALONE))


def model_of(recipe: str) -> str:
    """Example: "Qwen2.5-VL-7B-Instruct"."""
    return Path(load_config(CONFIGS / f"{recipe}.yaml").actor_config.tokenizer_name_or_path).name


MODELS = sorted({model_of(recipe) for recipe in RECIPES})


def devices_of(recipe: str) -> list[DeviceMemory]:
    """A recipe runs on every kind of device, or on the one that its name ends with."""
    named = [device for name, device in KNOWN.items() if recipe.endswith(f"_{name}")]
    return named or list(KNOWN.values())


def recipe_plan(recipe: str, *overrides: str) -> Plan:
    """As on an NPU or a GPU, wherever this runs."""
    hf_path = PUBLISHED / model_of(recipe)
    config = load_config(CONFIGS / f"{recipe}.yaml", [f"megatron_training.tokenizer_name_or_path={hf_path}", _ANY_CACHE, *overrides])
    plan, leaves = make_plan(config), offload_parts(config.generate_config, "npu")

    def on_device(train: TrainPlan | None) -> TrainPlan | None:
        return train and replace(train, offload=leaves)

    trainers: dict[str, Any] = {"train": on_device(plan.train), "critic": on_device(plan.critic), "vision": on_device(plan.vision)}
    # What generate_config.weight_carrier auto comes to where processes can open each other's device memory.
    carrier = "host" if config.generate_config.offload_train_param else "device"
    return replace(plan, run=replace(plan.run, device="npu"), rollout=replace(plan.rollout, weight_carrier=carrier), **trainers)
