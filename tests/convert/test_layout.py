"""Names and layouts of weights: numbers by hand, real parameter counts, and Hugging Face's own files as the other side."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_mm_rl.models.names import Entry, canonical_hf_name, entries, is_tied
from mindspeed_mm_rl.models.weight_layout import check_hf_shapes, check_megatron_shapes, join, separate, to_hf, to_megatron
from tests.checkpoints import CONFIG_3B, CONFIG_7B, load


def entry(kind: str, shapes: tuple, groups: int) -> Entry:
    return Entry("mm", tuple(f"hf{i}" for i in range(len(shapes))), kind, "rows", "text", shapes, groups)


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_qkv_stands_per_key_value_group():
    qkv = entry("qkv", ((4, 1), (2, 1), (2, 1)), 2)
    joined = join(qkv, [column(0, 1, 2, 3), column(10, 11), column(20, 21)])
    assert joined.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [part.flatten().tolist() for part in separate(qkv, joined)] == [[0, 1, 2, 3], [10, 11], [20, 21]]


def test_vision_qkv_stands_per_head():
    qkv = entry("vision_qkv", ((6, 1),), 2)
    joined = join(qkv, [column(0, 1, 10, 11, 20, 21)])
    assert joined.flatten().tolist() == [0, 10, 20, 1, 11, 21]
    assert separate(qkv, joined)[0].flatten().tolist() == [0, 1, 10, 11, 20, 21]


def test_biases_are_regrouped_as_their_weights():
    assert join(entry("qkv", ((2,), (1,), (1,)), 1), [column(0, 1)[:, 0], column(10)[:, 0], column(20)[:, 0]]).tolist() == [0, 1, 10, 20]
    assert join(entry("vision_qkv", ((6,),), 2), [torch.arange(6)]).tolist() == [0, 2, 4, 1, 3, 5]


def test_gate_stands_before_up():
    gate_up = entry("gate_up", ((2, 1), (2, 1)), 1)
    joined = join(gate_up, [column(0, 1), column(10, 11)])
    assert joined.flatten().tolist() == [0, 1, 10, 11]
    assert [part.flatten().tolist() for part in separate(gate_up, joined)] == [[0, 1], [10, 11]]


@pytest.mark.parametrize(("config", "parameters"), [(CONFIG_7B, 8_292_166_656), (CONFIG_3B, 3_754_622_976)])
def test_published_models_have_their_published_parameter_count(config, parameters):
    assert sum(math.prod(shape) for each in entries(config) for shape in each.hf_shapes) == parameters
    assert sum(math.prod(each.mm_shape) for each in entries(config)) == parameters


def test_megatron_names_are_those_of_mindspeed_mm():
    names = {name: each.mm for each in entries(CONFIG_7B) for name in each.hf}
    assert names["visual.patch_embed.proj.weight"] == "image_encoder.encoder.patch_embed.proj.weight"
    assert names["visual.blocks.31.norm2.weight"] == "image_encoder.encoder.blocks.layers.31.pre_mlp_layernorm.weight"
    assert names["visual.blocks.0.attn.qkv.bias"] == "image_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.bias"
    assert names["visual.blocks.0.mlp.up_proj.bias"] == "image_encoder.encoder.blocks.layers.0.mlp.linear_fc1.bias"
    assert names["visual.merger.ln_q.weight"] == "image_encoder.projector.layernorm.weight"
    assert names["visual.merger.mlp.0.bias"] == "image_encoder.projector.encoder.linear_fc1.bias"
    assert names["visual.merger.mlp.2.weight"] == "image_encoder.projector.encoder.linear_fc2.weight"
    assert names["model.embed_tokens.weight"] == "text_decoder.embedding.word_embeddings.weight"
    assert names["model.layers.27.self_attn.k_proj.bias"] == "text_decoder.decoder.layers.27.self_attention.linear_qkv.bias"
    assert names["model.layers.0.post_attention_layernorm.weight"] == "text_decoder.decoder.layers.0.pre_mlp_layernorm.weight"
    assert names["model.norm.weight"] == "text_decoder.decoder.final_layernorm.weight"
    assert names["lm_head.weight"] == "text_decoder.output_layer.weight"


def test_flat_and_nested_config_describe_the_same_model():
    text_keys = [key for key in CONFIG_7B if key not in ("model_type", "vision_config", "tie_word_embeddings")]
    nested = {key: value for key, value in CONFIG_7B.items() if key not in text_keys}
    nested["text_config"] = {"model_type": "qwen2_5_vl_text", **{key: CONFIG_7B[key] for key in text_keys}}
    assert entries(nested) == entries(CONFIG_7B)


def test_tie_is_seen_wherever_the_config_says_it():
    assert is_tied(CONFIG_3B) and not is_tied(CONFIG_7B)
    assert is_tied({"text_config": {"tie_word_embeddings": True}})
    assert "text_decoder.output_layer.weight" not in {each.mm for each in entries(CONFIG_3B)}


def test_names_of_transformers_5_become_the_classic_ones():
    assert canonical_hf_name("model.language_model.layers.3.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert canonical_hf_name("model.visual.merger.ln_q.weight") == "visual.merger.ln_q.weight"
    assert canonical_hf_name("lm_head.weight") == "lm_head.weight"


def test_unknown_model_type_names_the_nearest():
    with pytest.raises(ValueError, match="'qwen2_5_v1'; the nearest known one is 'qwen2_5_vl'"):
        entries({**CONFIG_7B, "model_type": "qwen2_5_v1"})


def test_config_without_a_size_is_named():
    with pytest.raises(ValueError, match="no intermediate_size"):
        entries({key: value for key, value in CONFIG_7B.items() if key != "intermediate_size"})


@pytest.mark.parametrize("fixture", ["tiny_vl", "tiny_text"])
def test_round_trip_is_bit_exact(fixture, request):
    weights, config = load(request.getfixturevalue(fixture))
    megatron = to_megatron(weights, config)
    back = dict(to_hf(megatron, config))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    assert sum(t.numel() for t in megatron.values()) == sum(t.numel() for t in weights.values())


def in_memory_name(name: str) -> str:
    for classic, new in (("model.", "model.language_model."), ("visual.", "model.visual.")):
        if name.startswith(classic):
            return new + name.removeprefix(classic)
    return name


def test_in_memory_names_of_transformers_5_are_read(tiny_text, tiny_vl):
    for folder in (tiny_text, tiny_vl):
        weights, config = load(folder)
        expected = to_megatron(weights, config)
        got = to_megatron({in_memory_name(name): tensor for name, tensor in weights.items()}, config)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_plain_tensors_are_views(tiny_vl):
    weights, config = load(tiny_vl)
    megatron = to_megatron(weights, config)
    back = dict(to_hf(megatron, config))
    name = "model.layers.0.mlp.{}_proj.weight"
    joined = megatron["text_decoder.decoder.layers.0.mlp.linear_fc1.weight"]
    assert back[name.format("gate")].untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert back["model.norm.weight"].data_ptr() == megatron["text_decoder.decoder.final_layernorm.weight"].data_ptr()


def test_one_part_alone(tiny_vl):
    weights, config = load(tiny_vl)
    vision = to_megatron(weights, config, ("vision", "projector"))
    assert {name.split(".")[0] for name in vision} == {"image_encoder"}
    assert {name for name, _ in to_hf(vision, config, ("vision", "projector"))} == {n for n in weights if n.startswith("visual.")}


def test_missing_and_unexpected_weights_are_named(tiny_vl):
    weights, config = load(tiny_vl)
    weights["model.layers.0.mlp.gait_proj.weight"] = weights.pop("model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(ValueError, match=r"1 missing \(model.layers.0.mlp.gate_proj.weight\) and 1 unexpected \(model.layers.0.mlp.gait"):
        to_megatron(weights, config)


def test_another_shape_is_named_with_both(tiny_vl):
    weights, config = load(tiny_vl)
    wider = {**config, "text_config": {**config["text_config"], "intermediate_size": 320}}
    message = r"model.layers.0.mlp.gate_proj.weight has shape \[256, 128\] but config.json asks for \[320, 128\]"
    with pytest.raises(ValueError, match=message):
        to_megatron(weights, wider)
    with pytest.raises(ValueError, match=message):
        check_hf_shapes({name: tuple(t.shape) for name, t in weights.items()}, wider)
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \[512, 128\] but config.json asks for \[640, 128\]"):
        dict(to_hf(to_megatron(weights, config), wider))
    with pytest.raises(ValueError, match=r"linear_fc1.weight has shape \[512, 128\] but config.json asks for \[640, 128\]"):
        check_megatron_shapes({name: tuple(t.shape) for name, t in to_megatron(weights, config).items()}, wider)


def test_tied_output_layer_may_only_repeat_the_embedding(tiny_text):
    weights, config = load(tiny_text)
    assert is_tied(config) and "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    assert len(to_megatron({**weights, "lm_head.weight": embedding.clone()}, config)) == len(to_megatron(weights, config))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        to_megatron({**weights, "lm_head.weight": embedding + 1}, config)


def test_old_rotary_buffers_are_left_out(tiny_text):
    weights, config = load(tiny_text)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert not [name for name in to_megatron(weights, config) if "rotary" in name]
