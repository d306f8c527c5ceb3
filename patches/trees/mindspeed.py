"""MindSpeed: attention inside packed sequences, and the Hugging Face tokenizer for workers that patch before they know their arguments."""

from __future__ import annotations

from patches.trees.edits import Edit, Kind, Read, Release, Replacement

PLAIN_ATTENTION = "core/transformer/flash_attention/flash_attention/adaptor.py"
CONTEXT_PARALLEL_ATTENTION = "core/context_parallel/dot_product_attention.py"
EXPECTED = (
    "MindSpeed for core 0.12.1 (git checkout 5176c6f5f133111e55a404d82bd2dc14a809a6ab, or the branch 2.1.0_core_r0.12.1, "
    "2.2.0_core_r0.12.1, 2.3.0_core_r0.12.1, 26.0.0_core_r0.12.1 or 26.1.0_core_r0.12.1)"
)


def identify(read: Read) -> Release:
    """By the constructor that its attention copies from megatron-core, and by files that came with a release: setup.py keeps the number
    0.12.1 in versions for much newer cores, and is not copied."""
    attention = read(CONTEXT_PARALLEL_ATTENTION)
    if not read(PLAIN_ATTENTION) and not attention:
        return Release("core 0.8 or older", "0.8", refusal="attention is built in another way there")
    if "pg_collection" in attention or "model_comm_pgs" in attention:
        return Release("core 0.13 or newer", "0.13 or newer", refusal="the edits are for core 0.12")
    if "cp_comm_type: str = None):" not in attention:
        return Release("unknown", core="", refusal="its attention is of no known version")
    if read("core/qat/layers.py"):
        return Release("core 0.12.1, 26.0.0 or newer")
    if read("core/optimizer/fix_duplicate_allgather.py"):
        return Release("core 0.12.1, 2.2.0 or 2.3.0")
    if read("args_utils.py"):
        return Release("core 0.12.1, after 2.1.0 (as 5176c6f)")
    return Release("core 0.12.1, 2.1.0")


PACKED_ATTENTION = '''def packed_causal_attention(attention, query, key, value):
    """Causal attention inside each of the packed sequences that actual_seq_len bounds; [s, b, h, d] to [s, b, h * d]."""
    import torch
    from mindspeed.utils import get_actual_seq_len

    actual_seq_len = get_actual_seq_len()
    batch_size, tokens = query.shape[1], query.shape[0] * query.shape[1]
    if actual_seq_len is None:
        raise ValueError("use_remove_padding is true and set_actual_seq_len was not called: the packed sequences have no boundaries")
    ends = [int(end) for end in actual_seq_len]
    if ends[-1] != tokens:
        raise ValueError(f"actual_seq_len ends at {ends[-1]} and the packed batch has {tokens} tokens: they must be equal")
    query, key, value = [rearrange(x, 's b h d -> (b s) h d') for x in [query, key, value]]
    # With sparse_mode 3 the kernel reads this one triangle for sequences of any length.
    triangle = torch.triu(torch.ones([2048, 2048], dtype=torch.bool, device=query.device), diagonal=1)
    output = torch_npu.npu_fusion_attention(
        query, key, value, query.shape[1], 'TND',
        atten_mask=triangle,
        scale=attention.softmax_scale,
        keep_prob=1.0,
        sparse_mode=3,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]
    return rearrange(output, '(b s) h d -> s b (h d)', b=batch_size)


'''

PLAIN = Edit(
    path=PLAIN_ATTENTION,
    title="packed attention",
    reason="use_remove_padding joins the sequences of a batch into one; without their boundaries a token would attend to another sample.",
    contained="use_remove_padding",
    replacements=(
        Replacement("def dot_product_attention_forward_impl(\n", f"{PACKED_ATTENTION}def dot_product_attention_forward_impl(\n"),
        Replacement(
            '        "Attention bias is not supported for DotProductAttention."\n',
            '        "Attention bias is not supported for DotProductAttention."\n'
            "\n"
            "    if packed_seq_params is None and getattr(self.config, 'use_remove_padding', False):\n"
            "        return packed_causal_attention(self, query, key, value)\n",
        ),
    ),
)

CONTEXT_PARALLEL = Edit(
    path=CONTEXT_PARALLEL_ATTENTION,
    title="packed attention with context parallelism",
    reason="The same for the class that stands in for attention when context_parallel_size > 1, where Ulysses has brought whole sequences "
    "to the rank. Ring attention and cached keys split the sequence themselves and keep their own paths. The function is here again, so "
    "that neither file needs the edit of the other.",
    contained="use_remove_padding",
    replacements=(
        Replacement("class CPDotProductAttentionImpl:\n", f"{PACKED_ATTENTION}class CPDotProductAttentionImpl:\n"),
        Replacement(
            '        assert attention_bias is None, "Attention bias is not supported for DotProductAttention."\n',
            '        assert attention_bias is None, "Attention bias is not supported for DotProductAttention."\n'
            "\n"
            "        whole_sequences = self.config.context_parallel_size == 1 and not getattr(self.config, 'tp_2d', False) or (\n"
            "            self.config.context_parallel_size > 1 and self.config.context_parallel_algo == 'ulysses_cp_algo'\n"
            "            and not self.config.context_parallel_kv_cache_policy)\n"
            "        if whole_sequences and packed_seq_params is None and getattr(self.config, 'use_remove_padding', False):\n"
            "            return packed_causal_attention(self, query, key, value)\n",
        ),
    ),
)

BUILD_TOKENIZER = '''def by_tokenizer_type_wrapper(build_tokenizer):
    """The Hugging Face tokenizer for PretrainedFromHF, Megatron's own for the other types, decided when it is built."""
    def build_tokenizer_by_type(args, **kwargs):
        if args.tokenizer_type == "PretrainedFromHF":
            from mindspeed.tokenizer.build_tokenizer.adaptor import build_tokenizer_HF
            return build_tokenizer_HF(args, **kwargs)
        return build_tokenizer(args, **kwargs)

    return build_tokenizer_by_type


'''

TOKENIZER = Edit(
    path="features_manager/tokenizer/build_tokenizer.py",
    title="tokenizer patch without arguments",
    reason="Ray workers import MindSpeed, and thereby patch Megatron, before tokenizer_type is known: the patch would be missing when "
    "the tokenizer is built. As a wrapper it stands beside the patch that MindSpeed-LLM makes for text models.",
    contained="def is_need_apply",
    replacements=(
        Replacement(
            "class BuildTokenizerFeature(MindSpeedFeature):\n", f"{BUILD_TOKENIZER}class BuildTokenizerFeature(MindSpeedFeature):\n"
        ),
        Replacement(
            '        if args.tokenizer_type == "PretrainedFromHF":\n'
            "            from mindspeed.tokenizer.build_tokenizer.adaptor import build_tokenizer_HF\n"
            "            patch_manager.register_patch('megatron.training.tokenizer.tokenizer.build_tokenizer', build_tokenizer_HF)",
            "        patch_manager.register_patch('megatron.training.tokenizer.tokenizer.build_tokenizer', by_tokenizer_type_wrapper)\n"
            "\n"
            "    def is_need_apply(self, args):\n"
            "        return True",
        ),
    ),
)

MINDSPEED = Kind("MindSpeed", "mindspeed", "megatron_adaptor.py", identify, EXPECTED, (PLAIN, CONTEXT_PARALLEL, TOKENIZER))
