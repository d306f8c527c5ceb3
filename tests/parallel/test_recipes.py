"""The shipped recipes of real models: all sizes, and the whole check of one of each kind (tests/matrix/test_recipe_builds.py: of all)."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor

import pytest

from mindspeed_mm_rl.models.names import entries
from mindspeed_mm_rl.models.weight_files import read_config
from tests.recipe_checks import check_memory, check_names_and_shapes, check_networks
from tests.recipe_ranks import built_networks
from tests.recipes import MODELS, PUBLISHED, RECIPES, devices_of, recipe_plan

# Of the model pages at https://huggingface.co (Safetensors, Model size); DeepSeek's without its 14B module for further tokens.
PARAMETERS = {
    "DeepSeek-R1": 671_026_419_200,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_as_many_as_published(model: str):
    table = entries(read_config(PUBLISHED / model))
    assert sum(math.prod(shape) for entry in table for shape in entry.hf_shapes) == PARAMETERS[model]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_fits_the_smallest_device_that_it_is_for(recipe: str):
    check_memory(recipe, devices_of(recipe)[:1])


@pytest.mark.parametrize("model", ["Qwen2.5-VL-3B-Instruct", "Qwen3-30B-A3B"])
def test_names_and_shapes_are_those_of_hugging_face(model: str):
    check_names_and_shapes(model)


@pytest.mark.parametrize("recipe", ["grpo_trainer_qwen25vl_7b", "grpo_trainer_qwen3_30b_a3b", "ppo_trainer_qwen25_32b"])
def test_the_ranks_build_and_together_hold_every_weight_once(recipe: str, recipe_builder: ProcessPoolExecutor):
    plan = recipe_plan(recipe)
    check_networks(plan.train, False, recipe_builder.submit(built_networks, recipe, False).result(timeout=120))
    if plan.critic:
        check_networks(plan.critic, True, recipe_builder.submit(built_networks, recipe, True).result(timeout=120))
