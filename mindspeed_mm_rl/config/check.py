"""Rules over several keys. Each is one function that raises ValueError with the names, the values, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm_rl.config.layout_rules import check_rollout_layout
from mindspeed_mm_rl.config.model_file import text_config
from mindspeed_mm_rl.config.plan import RolloutPlan
from mindspeed_mm_rl.config.preference import check_preference
from mindspeed_mm_rl.config.schema import Config
from mindspeed_mm_rl.config.stages import STAGES, has_critic, on_pairs

_REQUIRED = ("stage", "global_batch_size", "train_iters", "tokenizer_name_or_path", "data_path")
_LOWEST_TEMPERATURE = 0.01
"""The rollout engine silently samples with this where less is asked for."""
REWARD_MODEL = "reward_model"
"""The verifier that stands for rl_config.reward_model."""
_SWITCHES = {
    "clip_higher_enable": ("clip_ratio_low", "clip_ratio_high"),
    "overlong_buffer_enable": ("overlong_buffer", "overlong_buffer_penalty_factor"),
    "filter_groups_enable": ("filter_groups_metric", "filter_groups_max_batches", "filter_groups_train_batch_size"),
}
"""Off unless given; who gives the keys behind one must have thought that they act."""
_KV_BLOCK_TOKENS = 128
"""On CPU, at most."""


def check(config: Config) -> None:
    """Every rule that the configuration alone decides. Raises ValueError for the first one that is broken."""
    for rule in (
        _required, _stage, _lengths, _sequences, _sampling, _groups, _batches, _dtype, _learning_rate, _pixels, _rewards, _sources,
        _switches, _overlong, _clip, _parallel, _critic, check_preference, _evaluation, _kl_in_reward,
    ):  # fmt: skip
        rule(config)


def _required(config: Config) -> None:
    for key in _REQUIRED:
        if getattr(config.actor_config, key) is None:
            raise ValueError(f"megatron_training.{key} is missing and has no default; add it to the YAML")


def _stage(config: Config) -> None:
    stage = config.actor_config.stage
    given, own = config.rl_config.adv_estimator, "gae" if STAGES[stage].has_critic else "group_norm"
    if given not in (None, own):
        raise ValueError(f"rl_config.adv_estimator ({given}) must be {own} for megatron_training.stage {stage}; set it or remove it")


def _kl_in_reward(config: Config) -> None:
    rl = config.rl_config
    if rl.use_kl_in_reward and not kl_coef(config):
        raise ValueError(
            f"rl_config.use_kl_in_reward (true) needs rl_config.init_kl_coef > 0, but {config.actor_config.stage} "
            + (
                f"has {rl.init_kl_coef}; set init_kl_coef, for example to 0.001"
                if config.actor_config.stage != "ray_dapo"
                else "has no KL term; set use_kl_in_reward to false or take ray_grpo"
            )
        )


def kl_coef(config: Config) -> float:
    """ray_dapo has no KL term, whatever init_kl_coef says."""
    return 0.0 if config.actor_config.stage == "ray_dapo" else config.rl_config.init_kl_coef


def _lengths(config: Config) -> None:
    limit, prompt = config.generate_config.max_model_len, config.rl_config.max_prompt_length
    response = config.generate_config.sampling_config.max_tokens
    if limit is not None and limit < prompt + response:
        raise ValueError(
            f"generate_config.max_model_len ({limit}) must be >= rl_config.max_prompt_length ({prompt}) + "
            f"generate_config.sampling_config.max_tokens ({response}) = {prompt + response}; raise it or remove it"
        )


def _sequences(config: Config) -> None:
    generate, prompt = config.generate_config, config.rl_config.max_prompt_length
    model_len = generate.max_model_len or prompt + generate.sampling_config.max_tokens
    tokens = max(generate.max_num_batched_tokens, model_len)
    if generate.max_num_seqs > tokens:
        raise ValueError(
            f"generate_config.max_num_seqs ({generate.max_num_seqs}) must be <= generate_config.max_num_batched_tokens ({tokens}), as "
            "every sequence takes a token of each step; lower the first or raise the second"
        )


def _sampling(config: Config) -> None:
    temperature = config.generate_config.sampling_config.temperature
    if temperature < _LOWEST_TEMPERATURE:
        raise ValueError(
            f"generate_config.sampling_config.temperature ({temperature}) must be >= {_LOWEST_TEMPERATURE}, the lowest that the rollout "
            "engine samples with; raise it"
        )


def _groups(config: Config) -> None:
    rl, stage = config.rl_config, config.actor_config.stage
    if rl.n_samples_per_prompt < 2 and (rl.filter_groups_enable or STAGES[stage].compares_samples):
        reason = "filter_groups_enable drops groups without differences" if rl.filter_groups_enable else f"{stage} compares samples"
        raise ValueError(f"rl_config.n_samples_per_prompt ({rl.n_samples_per_prompt}) must be >= 2: {reason} of a prompt; raise it")


def _batches(config: Config) -> None:
    mini, prompts, key = config.rl_config.mini_batch_size, train_prompts(config), "megatron_training.global_batch_size"
    if config.rl_config.filter_groups_enable and config.rl_config.filter_groups_train_batch_size:
        key = "rl_config.filter_groups_train_batch_size"
    if mini is not None and mini > prompts:
        raise ValueError(f"rl_config.mini_batch_size ({mini} prompts) must be <= {key} ({prompts} prompts); lower it")

    drawn, limit = config.actor_config.global_batch_size or 0, config.rl_config.filter_groups_max_batches
    if config.rl_config.filter_groups_enable and 0 < limit * drawn < prompts:
        raise ValueError(
            f"rl_config.filter_groups_max_batches ({limit}) x megatron_training.global_batch_size ({drawn}) = {limit * drawn} prompts must "
            f"be >= rl_config.filter_groups_train_batch_size ({prompts}); raise the limit (-1 = none)"
        )


def train_prompts(config: Config) -> int:
    """Prompts that one iteration trains on."""
    rl = config.rl_config
    return (rl.filter_groups_train_batch_size if rl.filter_groups_enable else None) or config.actor_config.global_batch_size or 0


def _dtype(config: Config) -> None:
    wanted, dtype = ("bfloat16" if config.actor_config.bf16 else "float32"), config.generate_config.dtype
    if dtype is not None and dtype != wanted:
        raise ValueError(
            f"generate_config.dtype ({dtype}) must be {wanted}, as bf16 is {str(config.actor_config.bf16).lower()}: "
            "trainer and rollout engine run the same policy; change one of the two"
        )


def _learning_rate(config: Config) -> None:
    actor = config.actor_config
    if actor.min_lr > actor.lr:
        raise ValueError(f"actor_config.min_lr ({actor.min_lr}) must be <= actor_config.lr ({actor.lr}); lower it")


def _pixels(config: Config) -> None:
    low, high = config.actor_config.min_pixels, config.actor_config.max_pixels
    if low > high:
        raise ValueError(f"megatron_training.min_pixels ({low}) must be <= megatron_training.max_pixels ({high}); lower it")


def _rewards(config: Config) -> None:
    names, weights = config.rl_config.verifier_function, config.rl_config.verifier_weight
    count = 1 if names is None else len(names)
    if not count:
        raise ValueError("rl_config.verifier_function is empty; name a verifier, for example geo3k")
    if weights is not None and len(weights) != count:
        raise ValueError(
            f"rl_config.verifier_weight has {len(weights)} value(s) {list(weights)} for {count} verifier(s) "
            f"{list(names or ('the default one',))}; give one weight each"
        )
    if weights is not None and not any(weights):
        raise ValueError(f"rl_config.verifier_weight is {list(weights)}: every reward would be 0; give a weight other than 0")
    if twice := [name for name in names or () if (names or ()).count(name) > 1]:
        raise ValueError(f"rl_config.verifier_function names {twice[0]} twice ({list(names or ())}); name it once and raise its weight")


def _sources(config: Config) -> None:
    rl = config.rl_config
    for source, weights in rl.verifier_by_source.items():
        if not any(weights.values()):
            raise ValueError(
                f"rl_config.verifier_by_source: {source} has {dict(weights) or 'no verifiers'}, so every reward would be 0; "
                "give a verifier a weight other than 0"
            )
    named = REWARD_MODEL in {*(rl.verifier_function or ()), *(name for weights in rl.verifier_by_source.values() for name in weights)}
    if named != bool(rl.reward_model):
        raise ValueError(
            "rl_config.verifier_function names reward_model, but rl_config.reward_model is not given; give a sequence classifier's folder"
            if named
            else f"rl_config.reward_model ({rl.reward_model}) would never be asked; name reward_model in rl_config.verifier_function"
        )


def _switches(config: Config) -> None:
    given = config.rl_config.model_fields_set
    for switch, keys in _SWITCHES.items() if not on_pairs(config.actor_config.stage) else ():
        if switch not in given and (idle := [key for key in keys if key in given]):
            raise ValueError(
                f"rl_config.{idle[0]} ({getattr(config.rl_config, idle[0])}) would not be used, as rl_config.{switch} is not given; set "
                f"{switch} to true, or to false to say that it is off"
            )


def _overlong(config: Config) -> None:
    rl, response = config.rl_config, config.generate_config.sampling_config.max_tokens
    if not rl.overlong_buffer_enable:
        return
    if rl.rollout_max_tokens != response:
        raise ValueError(
            f"rl_config.rollout_max_tokens ({rl.rollout_max_tokens}) must equal generate_config.sampling_config.max_tokens ({response}) "
            "when overlong_buffer_enable is true; set one to the other"
        )
    if not 0 < rl.overlong_buffer < response:
        raise ValueError(
            f"rl_config.overlong_buffer ({rl.overlong_buffer}) must be > 0 and < generate_config.sampling_config.max_tokens ({response}) "
            "when overlong_buffer_enable is true; change it or set overlong_buffer_enable to false"
        )


def _clip(config: Config) -> None:
    rl = config.rl_config
    if rl.clip_higher_enable and rl.clip_ratio_low > rl.clip_ratio_high:
        raise ValueError(
            f"rl_config.clip_ratio_low ({rl.clip_ratio_low}) must be <= rl_config.clip_ratio_high ({rl.clip_ratio_high}); change one"
        )


def _parallel(config: Config) -> None:
    devices, generate = config.rl_config.actor_resource.num_npus, config.generate_config
    tensor, groups = generate.infer_tensor_parallel_size, generate.infer_expert_parallel_size
    if groups > 1 and not generate.enable_expert_parallel:
        raise ValueError(
            f"generate_config.infer_expert_parallel_size ({groups}) needs generate_config.enable_expert_parallel (true), which is false; "
            "set it to true, or infer_expert_parallel_size to 1"
        )
    if devices % (tensor * groups):
        raise ValueError(
            f"rl_config.actor_resource.num_npus ({devices}) must be a multiple of generate_config.infer_tensor_parallel_size ({tensor})"
            + (f" x generate_config.infer_expert_parallel_size ({groups}) = {tensor * groups}" if groups > 1 else "")
            + "; change one of them"
        )


def _critic(config: Config) -> None:
    stage, warmup, iterations = config.actor_config.stage, config.rl_config.critic_warmup, config.actor_config.train_iters
    if not has_critic(stage):
        if warmup:
            raise ValueError(f"rl_config.critic_warmup ({warmup}) must be 0: megatron_training.stage {stage} has no critic; remove it")
        return
    if warmup >= iterations:
        raise ValueError(
            f"rl_config.critic_warmup ({warmup}) must be < megatron_training.train_iters ({iterations}), or the actor is never trained; "
            "lower it"
        )
    critic, actor = config.critic_config, config.actor_config
    if critic.save not in (None, actor.save):
        raise ValueError(
            f"critic_config.save ({critic.save}) must be actor_config.save ({actor.save}): the two are one save; set one to the other, or "
            "remove critic_config.save"
        )
    if critic.min_lr > critic.lr:
        raise ValueError(f"critic_config.min_lr ({critic.min_lr}) must be <= critic_config.lr ({critic.lr}); lower it")


def _evaluation(config: Config) -> None:
    given = config.eval
    if given is None:
        return
    if given.held_out_rows is not None:
        return
    if not given.data_path:
        raise ValueError("eval.data_path is missing and has no default; name a file, or remove the section eval")
    if twice := [path for path in given.data_path if given.data_path.count(path) > 1]:
        raise ValueError(f"eval.data_path names {twice[0]} twice; name it once")
    if given.temperature is not None and 0 < given.temperature < _LOWEST_TEMPERATURE:
        raise ValueError(
            f"eval.temperature ({given.temperature}) must be 0 (greedy) or >= {_LOWEST_TEMPERATURE}, the lowest that the rollout engine "
            "samples with; change it"
        )
    if given.temperature == 0 and given.n_samples_per_prompt > 1:
        raise ValueError(
            f"eval.n_samples_per_prompt ({given.n_samples_per_prompt}) must be 1 when eval.temperature is 0: greedy responses to a prompt "
            "are all the same; lower the first or raise the second"
        )
    if given.verifier_function == ():
        raise ValueError("eval.verifier_function is empty; name a verifier, or remove the key to grade as rl_config.verifier_function does")
    names, only_model = given.verifier_function, config.rl_config.verifier_function == (REWARD_MODEL,)
    if REWARD_MODEL in (names or ()) or (names is None and only_model):
        raise ValueError(
            f"eval.verifier_function ({list(names) if names else 'null = rl_config.verifier_function'}) names {REWARD_MODEL}, whose score "
            "doesn't say what is right; name rules, for example acc"
        )


def check_model(plan: RolloutPlan, hf: Mapping[str, Any], on_cpu: bool) -> None:
    """What the rollout engine needs for the model of a config.json. Raises ValueError with both values."""
    check_rollout_layout(plan, hf)
    text = text_config(hf)
    positions = text.get("max_position_embeddings")
    is_scaled = any((text.get(key) or {}).get("factor") for key in ("rope_scaling", "rope_parameters"))
    if positions and plan.max_model_len > positions and not is_scaled:
        raise ValueError(
            f"generate_config.max_model_len ({plan.max_model_len}; unless given, rl_config.max_prompt_length + max_tokens) must be <= "
            f"max_position_embeddings ({positions}) of {plan.hf_path}/config.json; lower it"
        )
    if not on_cpu or "num_hidden_layers" not in text or not {"head_dim", "qk_rope_head_dim"} & text.keys():
        return
    per_token = text["num_hidden_layers"] * _cached_numbers(plan, text) * {"float32": 4, "bfloat16": 2}[plan.dtype]
    # The engine keeps one block empty.
    needed = (-(-plan.max_model_len // _KV_BLOCK_TOKENS) + 1) * _KV_BLOCK_TOKENS * per_token
    if plan.kv_cache_bytes < needed:
        raise ValueError(
            f"generate_config.kv_cache_bytes ({plan.kv_cache_bytes}) must be >= {needed}, the keys and values of one sequence of "
            f"{plan.max_model_len} tokens (max_model_len); raise it"
        )


def _cached_numbers(plan: RolloutPlan, text: Mapping[str, Any]) -> int:
    """That a process keeps of a token in each layer. Latent attention keeps the small vector that all heads are made of."""
    if text.get("kv_lora_rank"):
        return text["kv_lora_rank"] + text["qk_rope_head_dim"]
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    return 2 * heads * text["head_dim"] // min(heads, plan.tensor_parallel_size)
