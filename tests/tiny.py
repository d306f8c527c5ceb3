"""Random Hugging Face checkpoints of a few hundred thousand parameters, made offline: tokenizer, chat template and processor included."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import mindspeed_mm_rl  # noqa: F401  transformers' vision models import torchvision, which the package makes importable on CPU
from tests.hf_versions import IS_4

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c or 'image_url' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


@dataclass(frozen=True)
class TinySizes:
    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0
    """0 = hidden / heads; vLLM asks for at least 32. Qwen2 has no such key."""
    vocab: int = 512
    tied: bool = False
    vision_hidden: int = 64
    vision_layers: int = 3
    vision_heads: int = 2
    window_size: int = 56
    """Pixels: windows of 4 x 4 patches, so that any picture above 56 pixels is really cut into windows."""
    full_attention_layers: tuple[int, ...] = (1,)
    weight_std: float = 0.05


_TEXT_MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
}
_OF_FAMILY = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 40,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
    },
}
"""Keys of config.json that a family has besides those of TinySizes."""


@functools.cache
def _tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    pairs = [(rng.randint(0, 99), rng.randint(0, 99)) for _ in range(500)]
    corpus = [f"user assistant system Find x. What is {a} + {b} = {a + b}? The answer is {a * b}. \\boxed{{{b}}}" for a, b in pairs]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # Late 4.x processors take only the class of their own family.
    kind = transformers.Qwen2TokenizerFast if IS_4 else transformers.PreTrainedTokenizerFast
    fast = kind(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _text_config(sizes: TinySizes, tokenizer: transformers.PreTrainedTokenizerBase) -> dict:
    vocab = max(sizes.vocab, len(tokenizer))
    return {
        "vocab_size": vocab + -vocab % 64,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": sizes.weight_std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "tie_word_embeddings": sizes.tied,
    }


def _save(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    with torch.no_grad():
        # Hugging Face starts biases at 0 and norms at 1: a name mixed up between two of them would go unseen.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=pad)
    folder.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny_text(
    folder: Path | str, seed: int = 0, family: str = "qwen2", rope: dict | None = None, more: dict | None = None, **sizes
) -> Path:
    """A random text model in `folder`; family: a key of _TEXT_MODELS; rope: keys of rope_scaling, and rope_theta; more: other keys
    of config.json; `sizes` are fields of TinySizes."""
    chosen = TinySizes(**sizes)
    tokenizer = _tokenizer(min(chosen.vocab, 2048))
    config_class, model_class = _TEXT_MODELS[family]
    config = _text_config(chosen, tokenizer) | ({"head_dim": chosen.head_dim} if chosen.head_dim else {})
    config |= _OF_FAMILY.get(family, {}) | (more or {})
    # Flat, as transformers 4 has it and 5 reads it.
    scaling = dict(rope or {})
    config["rope_theta"] = scaling.pop("rope_theta", 10000.0)
    torch.manual_seed(seed)
    _save(model_class(config_class(**config, rope_scaling=scaling or None)), tokenizer, Path(folder))
    return Path(folder)


def make_tiny_classifier(folder: Path, text_model: Path, seed: int = 3) -> Path:
    """A reward model: a random sequence classifier with one label, of the sizes and with the tokenizer of a tiny text model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
    config = transformers.AutoConfig.from_pretrained(text_model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config).float()
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_vl(folder: Path | str, seed: int = 0, tokenizer: transformers.PreTrainedTokenizerBase | None = None, **sizes) -> Path:
    """A random Qwen2.5-VL in `folder`, window attention in use; `sizes` are fields of TinySizes."""
    chosen = TinySizes(**sizes)
    tokenizer = tokenizer or _tokenizer(min(chosen.vocab, 2048))
    half = chosen.hidden // chosen.heads // 2
    sections = [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            _text_config(chosen, tokenizer),
            rope_theta=10000.0,
            rope_scaling={"rope_type": "default", "mrope_section": sections},
        ),
        vision_config={
            "depth": chosen.vision_layers,
            "hidden_size": chosen.vision_hidden,
            "intermediate_size": 2 * chosen.vision_hidden,
            "num_heads": chosen.vision_heads,
            "out_hidden_size": chosen.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": chosen.window_size,
            "fullatt_block_indexes": list(chosen.full_attention_layers),
            "tokens_per_second": 2,
            "initializer_range": chosen.weight_std,
        },
        tie_word_embeddings=chosen.tied,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    _save(transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer, Path(folder))
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(_preprocessor(), indent=1))
    return Path(folder)


def _preprocessor() -> dict:
    return {
        "min_pixels": 28 * 28,
        "max_pixels": 64 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
