"""Keys that users' files hold and that don't act here: accepted with a reason, compared with the model, or refused when set to act.

A section is a dotted path below the YAML's top; `megatron_training` stands for the role sections too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NotOffered:
    """Refused unless the value is one of `neutral` (null always is). Example: NotOffered((False,), "train without it")."""

    neutral: tuple[Any, ...]
    instead: str


_KERNELS = "kernels and memory tricks are chosen for the device; they don't change results"
_SIZES = "work is cut by tokens and balanced over processes; this size isn't needed"
_FLOW = "the loop's order is fixed and replay is exact; this switch isn't needed"
_DEVICES = "processes take turns on the devices of actor_resource"

_DERIVED_BY_REASON: dict[str, dict[str, str]] = {
    "megatron_training": {
        _KERNELS: "use_mcore_models spec use_flash_attn use_fused_rmsnorm use_fused_swiglu use_fused_rotary_pos_emb shape_order "
        "no_bias_dropout_fusion no_masked_softmax_fusion attention_softmax_in_fp32 no_gradient_accumulation_fusion "
        "gemm_gradient_accumulation_fusion reuse_fp32_param swap_attention swap_optimizer "
        "recompute_activation_function accumulate_allreduce_grads_in_fp32 ddp_bucket_size "
        "use_ascend_coc coc_mode coc_parallel_num coc_fused_kernel transformer_impl use_cp_send_recv_overlap "
        "use_fused_ring_attention_update moe_grouped_gemm moe_permutation_async_comm moe_alltoall_overlap_comm "
        "use_fused_moe_token_permute_and_unpermute moe_token_dispatcher_type initial_loss_scale",
        "sequences are always packed": "variable_seq_lengths no_pad_to_seq_lengths reset_attention_mask reset_position_ids "
        "attention_mask_type cp_attention_mask_type pad_to_multiple_of use_remove_padding variable_seq_length",
        "policies are trained without a load-balancing loss": "moe_router_load_balancing_type moe_aux_loss_coeff seq_aux",
        "the tokenizer and its chat template come from tokenizer_name_or_path": "tokenizer_type tokenizer_not_use_fast "
        "tokenizer_padding_side prompt_type prompt_type_path",
        "columns are found by name; train.parquet is used whole": "split dataset_additional_keys dataloader_type "
        "full_shuffle_instruction_dataset is_instruction_dataset",
        "chosen for the device": "distributed_backend use_tp_pp_dp_mapping",
        "a folder of weights says it": "refer_model_iter ref_model_iter",
        "saves are always complete": "no_save_optim no_save_rng",
        "the model file and config.json say it": "model mm_model algorithm make_vocab_size_divisible_by",
        "every iteration is logged": "log_interval log_throughput",
        "section eval says what is evaluated, and when": "eval_iters eval_interval",
        "not part of this loop": "do_sample use_kv_cache init_method_std "
        "lora_r lora_alpha lora_ckpt_filter lora_fusion no_check_for_nan_in_loss_and_grad",
    },
    "rl_config": {
        _SIZES: "actor_forward_micro_batch_size ref_forward_micro_batch_size vit_forward_micro_batch_size update_micro_batch_size "
        "actor_rollout_dispatch_size actor_logprob_dispatch_size ref_dispatch_size reward_dispatch_size adv_dispatch_size "
        "actor_update_dispatch_size critic_value_dispatch_size critic_update_dispatch_size kl_dispatch_size "
        "dynamic_sampling_dispatch_size actor_image_embeds_dispatch_size num_samples_per_step use_remove_padding "
        "ref_max_packing_token_size actor_max_packing_token_size ref_dynamic_max_batch_size actor_dynamic_max_batch_size "
        "update_dynamic_max_batch_size dynamic_max_batch_size use_dp_batch_balance",
        _FLOW: "blocking guarantee_order async_engine zmq_communication data_strategy transfer_queue_data_shard_num "
        "transfer_queue_data_shard_port_base require_max_age_all_finished enable_sharding_validate",
        _DEVICES: "vit_resource num_cpus_for_local_task num_cpus_for_placement_group hccl_buffersize critic_resource",
        "a frozen vision encoder runs once per picture and iteration, and everyone shares its output": "reuse_image_embeds",
        "the model's config.json says it": "is_multimodal",
        "no algorithm here uses it": "beta tp_split_expert",
        "multi_turn_enable isn't offered in this version": "tool_config_path max_tool_calls max_parallel_calls max_total_response_length "
        "max_tool_response_length tool_response_truncate_side tool_parser_format",
        "use_wandb and use_swanlab aren't offered in this version": "wandb_project wandb_exp_name wandb_save_dir swanlab_mode "
        "swanlab_project swanlab_exp_name swanlab_save_dir",
    },
    "generate_config": {
        "the rollout engine's own choice": "num_scheduler_steps torchair_graph ascend_scheduler_config_enabled "
        "eplb_token_collects eplb_token_save_path expert_map_path data_parallel_size",
        "megatron_training.tokenizer_name_or_path is used": "tokenizer_name_or_path",
    },
    "generate_config.sampling_config": {
        "log-probs of the sampled tokens are always kept, text is never re-tokenised": "logprobs detokenize",
        "rl_config.n_samples_per_prompt is used": "num_completions best_of n",
    },
    "profiler_config.integrated": {
        "traces are written whole, in the format of ui.perfetto.dev": "mstx profile_export_type profile_level profile_analysis",
    },
    "msprobe_config": {
        "msprobe isn't offered in this version": "dump_path key_data_dump configurations_dump actor_train_dump "
        "actor_infer_dump token_range_start token_range_end reference_dump critic_train_dump step_start step_end",
    },
}

DERIVED: dict[str, dict[str, str]] = {
    section: {key: reason for reason, keys in table.items() for key in keys.split()} for section, table in _DERIVED_BY_REASON.items()
}
"""Section -> key -> why it needn't act."""

_ARCHITECTURE_KEYS = """
num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups rotary_base
use_rotary_position_embeddings position_embedding_type rope_scaling_type rope_scaling_factor low_freq_factor high_freq_factor
original_max_position_embeddings max_position_embeddings beta_fast beta_slow rope_scaling_mscale rope_scaling_mscale_all_dim
rope_scaling_original_max_position_embeddings rope_scaling_beta_fast rope_scaling_beta_slow normalization norm_epsilon swiglu
add_qkv_bias attention_bias disable_bias_linear untie_embeddings_and_output_weights padded_vocab_size qk_layernorm
multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim num_experts n_shared_experts
moe_ffn_hidden_size moe_intermediate_size first_k_dense_replace moe_layer_freq moe_router_topk moe_router_num_groups
moe_router_group_topk moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias
norm_topk_prob
"""
ARCHITECTURE = frozenset(_ARCHITECTURE_KEYS.split())
"""Keys of the megatron sections that describe the model: config.json decides, numbers that differ are an error."""

_NO_DROPOUT = NotOffered((0,), "remove it: policies are trained without dropout, as they sample without")
_OFF = (False,)

NOT_OFFERED: dict[str, dict[str, NotOffered]] = {
    "megatron_training": {
        "attention_dropout": _NO_DROPOUT,
        "hidden_dropout": _NO_DROPOUT,
        "optimizer": NotOffered(("adam",), "adam is the optimizer"),
        "ai_framework": NotOffered(("",), "PyTorch is the framework"),
        "pretrained_checkpoint": NotOffered(("",), "use actor_config.load"),
        "load_checkpoint_loosely": NotOffered(_OFF, "convert the checkpoint so that every weight has its place"),
        "noop_layers": NotOffered(("",), "write the layers of each pipeline stage, without the empty ones, in num_layer_list"),
        "lora_target_modules": NotOffered(("", []), "train all weights"),
        "skip_train": NotOffered(_OFF, "remove it"),
        "enable_high_availability": NotOffered(_OFF, "save often and start again from the last save"),
        "vocab_extra_ids": NotOffered((0,), "add the tokens to the tokenizer and the model"),
    },
    "rl_config": {
        "use_integrated_worker": NotOffered((True,), "set it to true: actor, reference and rollout share the devices"),
        "reference_resource": NotOffered(({},), "remove it: the reference shares actor_resource"),
        "reward_resource": NotOffered(({},), "remove it: rules are graded on CPU, a reward model shares the devices of actor_resource"),
        "rule_reward": NotOffered((True,), "name reward_model alone in verifier_function"),
        "partial_rollout_max_split": NotOffered((0, 1), "set it to 1: a response is finished in the iteration that began it"),
        "multi_turn_enable": NotOffered(_OFF, "set it to false: one response per prompt"),
        "share_backbone": NotOffered(_OFF, "set it to false: it needs LoRA"),
        "use_wandb": NotOffered(_OFF, "use metrics.jsonl or use_tensorboard"),
        "use_swanlab": NotOffered(_OFF, "use metrics.jsonl or use_tensorboard"),
    },
    "generate_config": {
        "limit_mm_video_per_prompt": NotOffered((0,), "set it to 0: pictures only"),
        "infer_pipeline_parallel_size": NotOffered((1,), "set it to 1"),
    },
    "generate_config.sampling_config": {
        key: NotOffered(neutral, f"set it to {neutral[0]}: the loss needs the distribution that was sampled from, whole")
        for key, neutral in {
            "top_k": (-1, 0),
            "top_p": (1,),
            "min_p": (0,),
            "repetition_penalty": (1,),
            "presence_penalty": (0,),
            "frequency_penalty": (0,),
        }.items()
    },
    "msprobe_config": {"msprobe": NotOffered(_OFF, "set it to false")},
}

NO_VISION_WORKERS = (
    "rl_config.colocate_actor_and_vit is false, so the vision encoder's weights come with actor_config.load and its layout is the actor's"
)
"""Why vit_config isn't used."""

REFUSED_SECTIONS: dict[str, str] = {
    "ref_config": "the reference has the actor's layout; give its weights in rl_config.integrated_mode_config.ref_model_load_path",
    "reward_config": "give a sequence classifier's folder in rl_config.reward_model and name reward_model in rl_config.verifier_function",
    "data": "it is verl's; write megatron_training.data_path and global_batch_size, rl_config.max_prompt_length, and "
    "generate_config.sampling_config.max_tokens",
    "actor_rollout_ref": "it is verl's; write actor_config.lr and its parallel sizes, rl_config.n_samples_per_prompt and mini_batch_size, "
    "and generate_config",
    "algorithm": "it is verl's; write megatron_training.stage (ray_grpo for adv_estimator grpo), rl_config.init_kl_coef, gamma and lam",
    "trainer": "it is verl's; write megatron_training.train_iters and save_interval, actor_config.save, rl_config.actor_resource.num_npus "
    "(of all machines), and section eval",
    "critic": "it is verl's; write critic_config, and megatron_training.stage ray_ppo",
    "reward_model": "it is verl's; write rl_config.reward_model and name reward_model in rl_config.verifier_function",
    "custom_reward_function": "it is verl's; write rl_config.verifier_function: [path/to/file.py:name]",
}
"""Section -> what to write instead."""
