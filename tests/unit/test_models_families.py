"""config.json as users have it: transformers 4 (flat) and 5 (nested), and what isn't offered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from mindspeed_mm_rl.cli.preflight import check_rope
from mindspeed_mm_rl.models.families import read_architecture

FLAT_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def write(folder: Path, config: dict, generation: dict | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_flat_config_of_the_7b_model(tmp_path: Path):
    architecture = read_architecture(write(tmp_path, FLAT_7B, {"eos_token_id": [151645, 151643]}))
    text, vision = architecture.text, architecture.vision
    assert (text.num_layers, text.head_dim, text.num_kv_heads, text.rope_theta) == (28, 128, 4, 1e6)
    assert text.mrope_section == (16, 24, 24)
    assert not text.tie_word_embeddings
    assert (vision.num_layers, vision.in_channels, vision.window_size) == (32, 3, 112)
    assert vision.full_attention_layers == (7, 15, 23, 31)
    assert vision.patch_values == 3 * 2 * 14 * 14
    assert architecture.eos_token_ids == (151643, 151645)
    assert architecture.banned_token_ids == (151652, 151653, 151655, 151656)


def test_nested_config_says_the_same(tmp_path: Path):
    outer = ("model_type", "vision_config", "tie_word_embeddings", "eos_token_id", *(key for key in FLAT_7B if key.endswith("_token_id")))
    text = {key: value for key, value in FLAT_7B.items() if key not in (*outer, "rope_scaling", "rope_theta")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    nested = {key: FLAT_7B[key] for key in outer} | {"text_config": text}
    (tmp_path / "flat").mkdir()
    (tmp_path / "nested").mkdir()
    assert read_architecture(write(tmp_path / "nested", nested)) == read_architecture(write(tmp_path / "flat", FLAT_7B))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_moe"])
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path: Path, model_type: str):
    config = {key: value for key, value in FLAT_7B.items() if key != "rope_theta"} | {"model_type": model_type}
    config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    if model_type != "qwen2_5_vl":
        del config["rope_scaling"]
    theirs = transformers.AutoConfig.from_pretrained(write(tmp_path, config)).get_text_config()
    rope = theirs.to_dict().get("rope_parameters") or theirs.to_dict()
    assert read_architecture(tmp_path).text.rope_theta == rope["rope_theta"]


def test_rope_under_both_of_its_keys_must_be_one_rope(tmp_path: Path):
    """Users add rope_scaling to a folder that transformers 5 wrote, as the pages of models say; transformers then reads it alone."""
    both = FLAT_7B | {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    assert read_architecture(write(tmp_path, both)).text.rope_theta == 1e6
    longer = both | {"rope_scaling": FLAT_7B["rope_scaling"] | {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    with pytest.raises(ValueError, match="are two answers; put all keys into rope_parameters"):
        read_architecture(write(tmp_path, longer))


def test_a_rope_that_an_older_transformers_passes_over_is_refused(tmp_path: Path):
    """What transformers 4.52 has of a folder that transformers 5 wrote: its defaults, and rope_parameters untouched."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    kept = {key: value for key, value in FLAT_7B.items() if key not in ("rope_theta", "rope_scaling")} | {"model_type": "qwen2"}
    written = kept | {"rope_parameters": rope}
    folder = str(write(tmp_path, written))
    check_rope(folder, written, "transformers 5.19.0")
    with pytest.raises(ValueError, match=r"rope_theta 1e\+06 and scaling YarnScaling.* transformers 4.52.4, .* finds 10000 and None"):
        check_rope(folder, written | {"rope_theta": 10000.0}, "transformers 4.52.4")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    mended = written | {"rope_theta": 1e6, "rope_scaling": scaling}
    check_rope(str(write(tmp_path, mended)), mended, "transformers 4.52.4")


def test_text_model_has_no_vision_and_bans_nothing(tiny_text: Path):
    architecture = read_architecture(tiny_text)
    assert architecture.vision is None
    assert architecture.banned_token_ids == ()
    assert architecture.text.mrope_section is None
    assert architecture.text.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not offered; the nearest is 'qwen2_5_vl'"),
        ({"model_type": None}, "model_type None is not offered"),
        ({"num_hidden_layers": ...}, "key 'num_hidden_layers' is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not offered"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "key 'mrope_section' is missing for model_type 'qwen2_5_vl'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, r"must sum to half of the head size \(128\)"),
        ({"use_sliding_window": True}, "use_sliding_window true is not offered"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" is not offered'),
    ],
)
def test_what_is_not_offered_is_one_sentence(tmp_path: Path, change: dict, message: str):
    config = {key: value for key, value in (FLAT_7B | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        read_architecture(write(tmp_path, config))


def test_missing_or_broken_config(tmp_path: Path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_architecture(tmp_path)
