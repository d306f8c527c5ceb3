import json

import pytest

from mindspeed_mm_rl.metrics import (
    PHASES,
    SUMMED_PHASES,
    Metric,
    Stopwatch,
    TokenCounts,
    aliases,
    distribution,
    iteration_record,
    reduce,
    throughput,
    timings,
)


def test_a_mean_is_weighted_and_the_others_are_not():
    records = [
        {"loss": Metric(1.0, "mean", 3), "gap": Metric(0.1, "max"), "dropped": Metric(2, "sum"), "low": Metric(5, "min")},
        {"loss": Metric(5.0, "mean", 1), "gap": Metric(0.7, "max"), "dropped": Metric(1, "sum"), "low": Metric(4, "min")},
    ]
    assert reduce(records) == {"loss": 2.0, "gap": 0.7, "dropped": 3.0, "low": 4.0}


def test_a_mean_of_no_weight_is_zero():
    assert reduce([{"loss": Metric(7.0, "mean", 0.0)}]) == {"loss": 0.0}


def test_two_reductions_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="gap.*max, mean"):
        reduce([{"gap": Metric(1.0, "mean")}, {"gap": Metric(1.0, "max")}])


def test_distribution():
    assert distribution("length", [2, 4, 9]) == {"length/mean": 5.0, "length/max": 9.0, "length/min": 2.0}
    assert distribution("length", []) == {"length/mean": 0.0, "length/max": 0.0, "length/min": 0.0}


def test_pieces_that_overlap_count_once():
    clock = Stopwatch()
    for start, end in ((0.0, 3.0), (2.0, 5.0), (7.0, 8.0), (7.2, 7.5)):
        clock.add("rollout", start, end)
    assert clock.seconds("rollout") == 6.0
    assert clock.seconds("update") == 0.0


def test_measure_records_even_when_the_phase_fails():
    clock = Stopwatch()
    with pytest.raises(RuntimeError), clock.measure("update"):
        raise RuntimeError
    assert len(clock.intervals["update"]) == 1


def iteration_clock() -> Stopwatch:
    """all 0-20 | rollout 0-8 | rule_reward 5-9 | reference 9-12 | old_log_p 12-13 | adv 13-13.5 | update 14-18 | push 18-19"""
    clock = Stopwatch()
    intervals = {
        "all": (0.0, 20.0), "rollout": (0.0, 8.0), "rule_reward": (5.0, 9.0), "reference_model": (9.0, 12.0), "old_log_p": (12.0, 13.0),
        "adv": (13.0, 13.5), "update": (14.0, 18.0), "resharding_to_infer": (18.0, 19.0),
    }  # fmt: skip
    for phase, (start, end) in intervals.items():
        clock.add(phase, start, end)
    return clock


def test_non_overlap_is_what_no_other_phase_covers():
    values = timings(iteration_clock())
    assert values["timing/non_overlap_rule_reward"] == 1.0
    assert values["timing/non_overlap_adv"] == 0.5
    assert values["timing/non_overlap_reference_model"] == 0.0


def test_all_is_at_least_the_documented_sum():
    values = timings(iteration_clock())
    non_overlap = max(value for name, value in values.items() if "non_overlap" in name)
    assert values["timing/all"] == 20.0 >= sum(values[f"timing/{phase}"] for phase in SUMMED_PHASES) + non_overlap == 18.0


def test_phases_that_did_not_run_are_zero_and_aliases_are_there():
    values = timings(iteration_clock())
    assert {f"timing/{phase}" for phase in PHASES} <= set(values)
    assert values["timing/image_embeds"] == values["timing/vit_image_emb"] == 0.0
    assert values["timing/resharding_enter_infer"] == values["timing/resharding_to_infer"] == 1.0


def test_throughput_by_hand():
    counts = TokenCounts([10, 20], [30, 50], generated_samples=16, trained_samples=8, num_devices=2)
    # Mean lengths 15 + 40 = 55: 55 * 16 / 2 / 20 = 22, 55 * 8 / 2 / 4 = 55, 55 * 16 / 2 / 8 = 55.
    assert throughput(counts, iteration_clock()) == {"e2e_tps": 22.0, "update_tps": 55.0, "vllm_tps": 55.0}
    longest = TokenCounts([10, 20], [30, 50], 16, 8, 2, use_max_lengths=True)
    assert throughput(longest, iteration_clock())["e2e_tps"] == (20 + 50) * 16 / 2 / 20


def test_aliases_only_of_what_is_there():
    assert aliases("dapo", {"dapo/score/mean": 0.5, "actor/lr": 1e-6}) == {"dapo/rewards/mean": 0.5, "dapo/lr": 1e-6}
    assert aliases("grpo", {"actor/grad_norm": 2.0}) == {"grad_norm": 2.0}


REFERENCE_NAMES = """
timing/all timing/update timing/rollout timing/old_log_p timing/reference_model timing/resharding_to_infer timing/resharding_to_train
timing/adv timing/non_overlap_reference_model timing/non_overlap_adv timing/non_overlap_rule_reward timing/non_overlap_reward_model
timing/rule_reward timing/reward_model timing/ref_onload timing/ref_offload timing/onload timing/offload timing/vit_image_emb
timing/image_embeds timing/resharding_enter_infer timing/resharding_exit_infer actor/lr actor/grad_norm grad_norm grpo/lr
grpo/score/mean grpo/score/max grpo/score/min grpo/rewards/mean grpo/rewards/max grpo/rewards/min response_length/mean
response_length/max response_length/min prompt_length/mean prompt_length/max prompt_length/min e2e_tps update_tps vllm_tps
"""


def test_a_record_has_every_name_that_users_know():
    values = distribution("grpo/score", [0.0, 1.0]) | {"actor/lr": 1e-6, "actor/grad_norm": 0.3}
    record = iteration_record("grpo", values, iteration_clock(), TokenCounts([3], [4], 2, 2, 1))
    assert not set(REFERENCE_NAMES.split()) - set(record)
    json.dumps(record)
