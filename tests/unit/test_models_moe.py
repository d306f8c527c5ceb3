"""Mixture of experts: Qwen3-MoE against Hugging Face, the router by hand, and what config.json may ask for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.models.families import Experts, read_architecture
from mindspeed_mm_rl.models.names import entries
from tests import parity
from tests.tiny import make_tiny_text

SMALL = {"hidden": 48, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "layers": 3, "weight_std": 0.15}
MODELS = {
    "weights summing to one": {},
    "weights as they are, a dense layer": {"norm_topk_prob": False, "num_experts_per_tok": 3, "mlp_only_layers": [1]},
    "one expert, every second layer": {"norm_topk_prob": False, "num_experts_per_tok": 1, "decoder_sparse_step": 2},
}
LENGTHS = (5, 90, 1, 33)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_text(tmp_path_factory.mktemp("moe"), family="qwen3_moe", more=MODELS[request.param], **SMALL)


@pytest.fixture(scope="module")
def policy(one_rank, folder: Path):
    return parity.megatron(folder)


@pytest.fixture(scope="module")
def hf(folder: Path):
    return parity.hugging_face(folder)


def test_logits_equal_hugging_face_and_do_not_depend_on_packing(policy, hf):
    parity.check_logits(policy, hf, parity.random_rows(LENGTHS))


def test_every_gradient_equals_hugging_face(policy, hf):
    parity.check_gradients(policy, hf, parity.random_rows(LENGTHS))


def test_names_and_a_round_trip(policy, folder):
    parity.check_names_and_round_trip(policy, folder)


def test_every_module_that_holds_a_weight_is_called(policy):
    """Megatron's overlap_param_gather waits for the weights of a module when it is called: one that is only read would be an old one."""
    holders = {name: module for name, module in policy.named_modules() if any(True for _ in module.parameters(recurse=False))}
    called = set()
    handles = [module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in holders.items()]
    with torch.no_grad():
        parity.packed_logits(policy, parity.random_rows(LENGTHS))
    for handle in handles:
        handle.remove()
    assert holders.keys() == called


def test_which_layers_have_experts_is_counted_over_the_whole_model(one_rank, tmp_path: Path):
    """The second stage of a pipeline begins at layer 2."""
    from mindspeed_mm_rl.models.gpt import ModelOptions, layer_specs

    make_tiny_text(tmp_path, family="qwen3_moe", more={"mlp_only_layers": [0, 3]}, **SMALL | {"layers": 4})
    text = read_architecture(tmp_path).text
    kinds = [spec.submodules.mlp.module.__name__ for spec in layer_specs(text, ModelOptions(), range(2, 4))]
    assert kinds == ["ExpertLayer", "GatedMLP"]


EXPERTS = Experts(
    count=4,
    per_token=2,
    ffn_size=8,
    shared_ffn_size=0,
    layers=frozenset({0}),
    score_function="softmax",
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
    n_group=1,
    topk_group=1,
)
SIGMOID = replace(EXPERTS, score_function="sigmoid", routed_scaling_factor=2.5)


def choice(logits: list[float], experts: Experts, bias: list[float] | None = None) -> dict[int, float]:
    """Expert -> weight, of one token."""
    from mindspeed_mm_rl.models.experts import route

    chosen, weights = route(torch.tensor([logits]), experts, None if bias is None else torch.tensor(bias))
    return {int(number): round(float(weight), 5) for number, weight in zip(chosen[0], weights[0], strict=True)}


def test_router_by_hand(one_rank):
    """Softmax of ln(1, 2, 3, 4) is 0.1, 0.2, 0.3, 0.4; the sigmoid of ln(x) is x / (1 + x): 1/2, 2/3, 3/4, 4/5."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().tolist()
    assert choice(logits, EXPERTS) == {3: round(4 / 7, 5), 2: round(3 / 7, 5)}
    assert choice(logits, replace(EXPERTS, norm_topk_prob=False)) == {3: 0.4, 2: 0.3}
    whole = 3 / 4 + 4 / 5
    assert choice(logits, SIGMOID, [0.0] * 4) == {3: round(2.5 * 4 / 5 / whole, 5), 2: round(2.5 * 3 / 4 / whole, 5)}
    assert choice(logits, replace(SIGMOID, norm_topk_prob=False), [0.0] * 4) == {3: 2.0, 2: 1.875}


def test_the_bias_has_a_say_in_the_choice_alone(one_rank):
    """With 0.4 more the first expert (1/2 + 0.4) comes before the third (3/4), and its weight is still made of 1/2."""
    logits = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().tolist()
    whole = 1 / 2 + 4 / 5
    assert choice(logits, SIGMOID, [0.4, 0.0, 0.0, 0.0]) == {0: round(2.5 * 0.5 / whole, 5), 3: round(2.5 * 0.8 / whole, 5)}


def test_experts_come_out_of_the_best_groups(one_rank):
    """Two groups; the best single expert is in the second, but the two of the first add up to more (2/3 + 3/4 > 4/5 + 1/11)."""
    logits = torch.tensor([2.0, 3.0, 4.0, 0.1]).log().tolist()
    assert set(choice(logits, SIGMOID, [0.0] * 4)) == {1, 2}
    assert set(choice(logits, replace(SIGMOID, n_group=2), [0.0] * 4)) == {0, 1}
    assert set(choice(logits, replace(SIGMOID, n_group=2), [0.0, 0.0, 0.9, 0.0])) == {2, 3}


def test_the_router_works_in_float32_whatever_the_dtype(one_rank, tmp_path: Path):
    make_tiny_text(tmp_path, family="qwen3_moe", **SMALL)
    router = parity.megatron(tmp_path, dtype=torch.bfloat16).text_decoder.decoder.layers[0].mlp.router
    hidden = torch.randn(64, 1, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights, chosen = router(hidden)
    logits = hidden[:, 0].double() @ router.weight.double().T
    best = logits.softmax(-1).topk(2)
    expected = torch.zeros_like(logits).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    assert router.weight.dtype is torch.bfloat16 and weights.dtype is torch.float32
    assert torch.equal(chosen, expected > 0)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=0)


def test_bfloat16_is_close_to_float32(one_rank, tmp_path: Path):
    """8 bits per number; a token that is sent to another expert differs more, so the median is compared."""
    make_tiny_text(tmp_path, family="qwen3_moe", **SMALL)
    rows = parity.random_rows(LENGTHS)
    with torch.no_grad():
        narrow, wide = (parity.packed_logits(parity.megatron(tmp_path, dtype=dtype), rows) for dtype in (torch.bfloat16, torch.float32))
    assert (narrow.float() - wide).abs().median() < 0.03 < wide.std()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((None, 1, 2, 1, False), r"expert_model_parallel_size \(2\) must be 1: the model has no experts"),
        ((EXPERTS, 1, 3, 1, False), r"expert_model_parallel_size \(3\) must divide the model's 4 experts"),
        ((EXPERTS, 2, 2, 1, False), r"tensor_model_parallel_size \(2\) > 1 of a model with experts needs sequence_parallel: true"),
        ((EXPERTS, 2, 1, 1, True), r"expert_tensor_parallel_size \(1\) must be tensor_model_parallel_size \(2\)"),
    ],
)
def test_layouts_that_megatron_would_train_wrongly_are_refused(one_rank, sizes: tuple, message: str):
    from mindspeed_mm_rl.models.experts import check_expert_split

    check_expert_split(EXPERTS, 2, 2, 1, True)
    check_expert_split(EXPERTS, 2, 1, 2, True)
    check_expert_split(None, 4, 1, 1, False)
    with pytest.raises(ValueError, match=message):
        check_expert_split(*sizes)


QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    architecture = read_architecture(tmp_path)
    experts = architecture.text.experts
    assert (experts.count, experts.per_token, experts.ffn_size, experts.shared_ffn_size, len(experts.layers)) == (128, 8, 768, 0, 48)
    assert (experts.score_function, experts.norm_topk_prob, experts.routed_scaling_factor) == ("softmax", True, 1.0)
    assert architecture.notes == ("router_aux_loss_coef 0.001 isn't used: policies are trained without a load-balancing loss",)
    assert sum(torch.Size(shape).numel() for entry in entries(QWEN3_30B) for shape in entry.hf_shapes) == 30_532_122_624
