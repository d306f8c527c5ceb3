"""Advantages, KL terms, filters and recipes against numbers worked by hand."""

import math
import pickle

import pytest
import torch

from mindspeed_mm_rl.algorithms.advantages import group_advantages, group_normalised, per_token
from mindspeed_mm_rl.algorithms.filters import check_metric, has_spread, metric_name, metric_values
from mindspeed_mm_rl.algorithms.kl import KLController, kl_estimate
from mindspeed_mm_rl.algorithms.recipes import ALGORITHMS, RecipeSettings, make_kl_controller, make_recipe
from mindspeed_mm_rl.types import Batch, Group, LossInput, Prompt, Ragged


def recipe_settings(**changes):
    values = {
        "algorithm": "dapo",
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28,
        "token_level_loss": True,
        "kl_penalty": "low_var_kl",
        "kl_coef": 0.0,
        "kl_ctrl_type": "fixed",
        "kl_target": 0.1,
        "kl_horizon": 1000.0,
        "entropy_coeff": 0.0,
        "rollout_is_cap": 0.0,
        "filter_groups": True,
        "filter_metric": "acc",
        "filter_max_batches": 0,
        "train_prompts": 8,
    }
    return RecipeSettings(**{**values, **changes})


def group(rewards=(1.0, 0.0), accuracy=(1.0, 0.0), **scores):
    prompt = Prompt(prompt_id=0, token_ids=[], expanded_length=0, images=(), answer="")
    return Group(prompt, (), {name: list(values) for name, values in scores.items()}, list(accuracy), list(rewards))


def test_group_normalised_by_hand():
    # mean 0.5, unbiased std sqrt(4 * 0.25 / 3) = 0.5773503
    expected = 0.5 / (0.5773502692 + 1e-6)
    answer = group_normalised(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 3.0]]))
    assert answer.dtype == torch.float64
    assert answer[0].tolist() == pytest.approx([expected, -expected, -expected, expected], abs=1e-9)
    assert answer[1].tolist() == pytest.approx([1 / (1.1547005384 + 1e-6) * sign for sign in (1, -1, -1, 1)], abs=1e-9)


def test_advantage_is_exactly_zero_when_all_rewards_are_equal():
    # The mean of three times 0.1 is 0.10000000000000002 in float64.
    assert group_normalised(torch.full((1, 3), 0.1, dtype=torch.float64)).tolist() == [[0.0] * 3]


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"n_samples_per_prompt must be >= 2, but rewards came as \[3, 1\]"):
        group_normalised(torch.ones(3, 1))


def test_every_response_token_gets_its_sample_advantage():
    ragged = per_token(torch.tensor([1.0, 2.0, 3.0]), (2, 0, 1))
    assert (ragged.values.tolist(), ragged.lengths) == ([1.0, 1.0, 3.0], (2, 0, 1))
    rows = Ragged.from_rows([[5, 6], [7], [8, 9, 9], [4]], torch.int64)
    ones = Ragged.from_rows([[1.0] * length for length in rows.lengths], torch.float32)
    batch = Batch((0, 1, 2, 3), rows, rows, ones, ones, ((),) * 4, (1.0, 0.0, 2.0, 2.0), samples_per_prompt=2)
    half = math.sqrt(0.5)
    assert group_advantages(batch).values.tolist() == pytest.approx([half, half, -half, 0.0, 0.0, 0.0, 0.0], abs=2e-6)
    with pytest.raises(ValueError, match="3 samples are not whole groups"):
        group_advantages(batch.select([0, 1, 2]))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("kl", [math.log(2), -math.log(2), -5.0]),
        ("abs", [math.log(2), math.log(2), 5.0]),
        ("mse", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 12.5]),
        ("low_var_kl", [0.5 + math.log(2) - 1, 2 - math.log(2) - 1, 10.0]),
    ],
)
def test_kl_kinds_by_hand(kind, values):
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([-1.0 - math.log(2), -2.0 + math.log(2), -1.0])
    assert kl_estimate(logprobs, ref_logprobs, kind).tolist() == pytest.approx(values, abs=1e-6)
    assert kl_estimate(logprobs, logprobs, kind).tolist() == [0.0, 0.0, 0.0]


def test_unknown_kl_kind_names_the_valid_ones():
    with pytest.raises(ValueError, match="'full'; it must be one of kl, abs, mse, low_var_kl"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "full")


def test_kl_controllers():
    fixed = make_kl_controller(recipe_settings(kl_coef=0.01))
    fixed.update(5.0, 100)
    assert fixed.coef == 0.01
    adaptive = make_kl_controller(recipe_settings(kl_coef=0.01, kl_ctrl_type="adaptive"))
    adaptive.update(0.3, 50)  # error 2, clipped at 0.2
    assert adaptive.coef == pytest.approx(0.01 * 1.01)
    adaptive.update(0.095, 50)  # error -0.05
    assert adaptive.coef == pytest.approx(0.01 * 1.01 * 0.9975)
    many = KLController(0.01, True, 0.1, 1000.0)
    many.update(0.0, 8192)  # error -1, clipped at -0.2; more samples than the horizon: never below 0
    assert many.coef == pytest.approx(0.01 * 0.8)
    resumed = KLController(0.5, True, 0.1, 1000.0)
    resumed.load_state(adaptive.state())
    assert resumed.coef == adaptive.coef
    with pytest.raises(ValueError, match="kl_target and rl_config.kl_horizon above 0"):
        KLController(0.01, adaptive=True, target=0.0, horizon=1.0)


@pytest.mark.parametrize(
    "spelling", ["acc_for_dapo", "grpo/acc_for_dapo_rewards/mean", "dapo/acc_for_dapo_rewards/mean", "acc_for_dapo_rewards/mean"]
)
def test_both_spellings_of_a_filter_metric(spelling):
    assert metric_name(spelling) == "acc_for_dapo"


def test_filter_keeps_groups_whose_samples_differ():
    assert has_spread(group(geo3k=[0.9, 1.0]), "geo3k")
    assert not has_spread(group(geo3k=[0.9, 0.9]), "geo3k")
    assert has_spread(group(geo3k=[0.9]), "geo3k")


def test_filter_metric_is_raw_score_accuracy_or_reward():
    one = group(rewards=[0.5, 0.7], accuracy=[1.0, 1.0], geo3k=[1.0, 0.9], acc=[0.0, 1.0])
    assert metric_values(one, "geo3k") == [1.0, 0.9]
    assert metric_values(one, "acc") == [0.0, 1.0]
    assert metric_values(one, "acc_for_dapo") == [1.0, 1.0]  # no such verifier in this run: right or wrong is meant
    assert metric_values(one, "score") == [0.5, 0.7]
    with pytest.raises(ValueError, match="'geo3', .*did you mean 'geo3k'"):
        check_metric("geo3", ("geo3k", "format"))


def test_recipe_of_grpo_is_that_of_dapo_with_equal_clips():
    equal = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "filter_groups": False}
    grpo, dapo = (make_recipe(recipe_settings(algorithm=name, **equal)) for name in ("grpo", "dapo"))
    x = LossInput(*(torch.randn(6) for _ in range(6)), torch.ones(6), torch.zeros(6, dtype=torch.int64), 6.0, 1.0)
    assert grpo.policy_loss(0.3)(x)[0].item() == dapo.policy_loss(0.3)(x)[0].item()
    assert grpo.policy_loss(0.3)(x)[0].item() != grpo.policy_loss(0.0)(x)[0].item()
    assert grpo.group_filter is None


def test_recipe_needs_only_what_its_settings_ask_for():
    plain = make_recipe(recipe_settings())
    assert not (plain.needs_reference or plain.needs_critic or plain.needs_entropy_grad)
    full = make_recipe(recipe_settings(kl_coef=0.01, entropy_coeff=0.1))
    assert full.needs_reference and full.needs_entropy_grad
    keep = make_recipe(recipe_settings(filter_metric="grpo/acc_for_dapo_rewards/mean")).group_filter
    assert keep(group(acc_for_dapo=[1.0, -1.0])) and not keep(group(acc_for_dapo=[1.0, 1.0]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_recipes_travel_between_processes(algorithm):
    recipe = make_recipe(recipe_settings(algorithm=algorithm, kl_coef=0.01, loss_length=8))
    x = LossInput(*(torch.linspace(-2.0, -1.0, 4) * k for k in range(1, 7)), torch.ones(4), torch.zeros(4, dtype=torch.int64), 4.0, 1.0)
    assert pickle.loads(pickle.dumps(recipe.policy_loss(0.01)))(x)[0].item() == recipe.policy_loss(0.01)(x)[0].item()
    assert pickle.loads(pickle.dumps(recipe)).name == algorithm
    assert (recipe.value_loss is not None) == recipe.needs_critic == (algorithm == "ppo")
