"""MindSpeed attends over packed sequences only after files of it are replaced: its attention (one kernel call for a pack, lengths in a
global variable), megatron's recomputation (which must bring that variable back), and the registration of its tokenizer."""

from __future__ import annotations

from mindspeed_mm_rl.platforms.patching import Patch

PATCH = Patch(
    package="mindspeed",
    versions="",
    process="train",
    devices=("npu",),
    changes=(
        "mindspeed.core.context_parallel.dot_product_attention",
        "mindspeed.core.transformer.flash_attention.flash_attention.adaptor",
        "mindspeed.features_manager.tokenizer.build_tokenizer",
        "megatron.core.tensor_parallel.random",
    ),
    until="nobody comes from trees with these files; they are mended by examples/rl/scripts/apply_dapo_mindspeed_patches.sh",
    condition="attention, recomputation and tokenizers are of this package, and lengths are arguments",
)
