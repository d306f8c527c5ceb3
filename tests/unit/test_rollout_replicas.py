"""Rollout replicas without their processes: how prompts are dealt, which sizes fit a model, and how a rank is called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm_rl.config.check import check_model
from mindspeed_mm_rl.types import RolloutRequest
from mindspeed_mm_rl.workers.failure import Member
from mindspeed_mm_rl.workers.replicas import dealt
from tests.plans import rollout_plan

TEXT = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 48,
        "vocab_size": 101}  # fmt: skip
VISION = {"num_heads": 16, "intermediate_size": 30}


def requests(*lengths: int) -> list[RolloutRequest]:
    return [RolloutRequest(number, [], (), length) for number, length in enumerate(lengths)]


def numbers(shares: list[list[RolloutRequest]]) -> list[list[int]]:
    return [[request.prompt_id for request in share] for share in shares]


def test_a_long_prompt_goes_alone_where_responses_are_short():
    """90 + 10 against 3 x (20 + 10): in turns it would be 130 against 60."""
    assert numbers(dealt(requests(90, 20, 20, 20), max_tokens=10, replicas=2)) == [[0], [1, 2, 3]]


def test_counts_are_even_where_responses_are_long():
    assert numbers(dealt(requests(90, 20, 20, 20), max_tokens=4000, replicas=2)) == [[0, 3], [1, 2]]


def test_every_request_is_dealt_once_and_a_replica_may_stay_idle():
    assert numbers(dealt(requests(5, 5), max_tokens=10, replicas=3)) == [[0], [1], []]
    shares = numbers(dealt(requests(*range(1, 30)), max_tokens=7, replicas=4))
    assert sorted(sum(shares, [])) == list(range(29)) and all(share == sorted(share) for share in shares)


@pytest.mark.parametrize(
    ("size", "config", "would_do"),
    [
        (
            5,
            TEXT,
            r"num_attention_heads \(12\) and intermediate_size \(48\) and num_key_value_heads \(4; or .*\) .*; 1, 2, 4 or 12 would do",
        ),
        (8, TEXT, r"num_attention_heads \(12\) of"),
        (6, TEXT, r"num_key_value_heads \(4; or be a multiple of it\) of"),
        (4, TEXT | {"num_experts": 4, "moe_intermediate_size": 6}, r"moe_intermediate_size \(6\) of .*; 1 or 2 would do"),
        (4, TEXT | {"vision_config": VISION}, r"vision_config's intermediate_size \(30\) of .*; 1 or 2 would do"),
    ],
)
def test_a_size_that_does_not_fit_the_model_is_refused_with_those_that_would_do(
    size: int, config: dict[str, Any], would_do: str, tmp_path: Path
):
    plan = rollout_plan(tmp_path, tensor_parallel_size=size, image_embeds=False)
    with pytest.raises(ValueError, match=rf"generate_config.infer_tensor_parallel_size \({size}\) must divide {would_do}"):
        check_model(plan, config, on_cpu=True)


@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_key_value_heads_are_shared_out_or_repeated(size: int, tmp_path: Path):
    check_model(rollout_plan(tmp_path, tensor_parallel_size=size), TEXT | {"vision_config": VISION}, on_cpu=True)


MIXTURE = TEXT | {"num_experts": 12, "moe_intermediate_size": 7}


@pytest.mark.parametrize(("tensor", "groups"), [(1, 1), (4, 1), (1, 12), (4, 3), (2, 2)])
def test_whole_experts_are_dealt_out_whatever_their_width(tensor: int, groups: int, tmp_path: Path):
    plan = rollout_plan(tmp_path, tensor_parallel_size=tensor, data_parallel_size=groups, expert_parallel=True)
    check_model(plan, MIXTURE, on_cpu=True)
    assert plan.num_ranks == tensor * groups


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            MIXTURE,
            "generate_config.infer_tensor_parallel_size (4) x generate_config.infer_expert_parallel_size (2) = 8 must divide the 12 "
            "experts of {hf}/config.json while generate_config.enable_expert_parallel is true; a product of 1, 2, 3, 4, 6 or 12 would do",
        ),
        (TEXT, "generate_config.enable_expert_parallel (true) needs a mixture of experts, which {hf}/config.json isn't; set it to false"),
    ],
)
def test_experts_that_cannot_be_dealt_out_evenly_are_refused(config: dict[str, Any], sentence: str, tmp_path: Path):
    plan = rollout_plan(tmp_path, tensor_parallel_size=4, data_parallel_size=2, expert_parallel=True)
    with pytest.raises(ValueError) as error:
        check_model(plan, config, on_cpu=True)
    assert str(error.value) == sentence.format(hf=tmp_path)


@pytest.mark.parametrize("size", [1, 4])
def test_latent_attention_keeps_one_small_vector_per_token_on_every_rank(size: int, tmp_path: Path):
    """3 layers x (16 + 8 numbers) x 4 bytes for the 256 tokens of max_model_len and an empty block of 128."""
    latent = TEXT | {"num_hidden_layers": 3, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 32, "num_key_value_heads": 12}
    fits, bytes_needed = rollout_plan(tmp_path, tensor_parallel_size=size), 3 * (16 + 8) * 4 * (256 + 128)
    check_model(replace(fits, kv_cache_bytes=bytes_needed), latent, on_cpu=True)
    with pytest.raises(ValueError, match=rf"kv_cache_bytes \({bytes_needed - 1}\) must be >= {bytes_needed}"):
        check_model(replace(fits, kv_cache_bytes=bytes_needed - 1), latent, on_cpu=True)


def test_a_rank_of_a_replica_is_called_by_both_numbers():
    assert str(Member("rollout replica", 1, None, pid=812, node="10.0.0.3", rank=0)) == "rank 0 of rollout replica 1 (pid 812 on 10.0.0.3)"
    assert str(Member("rollout replica", 1, None)) == "rollout replica 1"
