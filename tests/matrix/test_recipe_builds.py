"""Every shipped recipe of a real model, without its weights: networks of all ranks, names and shapes at Hugging Face, memory."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.recipe_checks import check_memory, check_names_and_shapes, check_networks
from tests.recipe_ranks import built_networks
from tests.recipes import MODELS, RECIPES, devices_of, recipe_plan

MOST_SECONDS = 120


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_those_of_hugging_face(model: str):
    check_names_and_shapes(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_ranks_build_and_together_hold_every_weight_once(recipe: str, recipe_builder: ProcessPoolExecutor):
    plan, began = recipe_plan(recipe), time.monotonic()
    check_networks(plan.train, False, recipe_builder.submit(built_networks, recipe, False).result(timeout=MOST_SECONDS))
    if plan.critic:
        check_networks(plan.critic, True, recipe_builder.submit(built_networks, recipe, True).result(timeout=MOST_SECONDS))
    assert time.monotonic() - began < MOST_SECONDS


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_fits_the_devices_that_it_is_for(recipe: str):
    check_memory(recipe, devices_of(recipe))
