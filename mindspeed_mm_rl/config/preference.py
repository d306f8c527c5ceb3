"""The stage that trains on pairs of responses: its keys, its rules, and what its plan has otherwise than that of training on prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindspeed_mm_rl.config.model_file import text_config
from mindspeed_mm_rl.config.plan import Plan, PreferencePlan
from mindspeed_mm_rl.config.schema import Config
from mindspeed_mm_rl.config.stages import on_pairs

_KEYS = (
    "dpo_loss_type", "dpo_beta", "dpo_label_smoothing", "simpo_gamma", "pref_ftx", "ref_model", "cache_ref_logprobs", "seq_length",
)  # fmt: skip
"""Of megatron_training; they act on pairs alone."""
_SMOOTHED = ("sigmoid", "robust")
_RL_KEYS = {
    "actor_resource", "colocate_actor_and_vit", "integrated_mode_config", "resume", "runtime_env_path", "timeout_seconds", "output",
    "mini_batch_size", "epochs", "shuffle_mini_batch", "max_prompt_length", "use_dynamic_bsz", "max_packing_token_size", "use_tensorboard",
    "log_max_throughput",
}  # fmt: skip
"""Of rl_config; the others speak of sampling, grading and credit."""
_GENERATE_KEYS = {
    "limit_mm_image_per_prompt", "trust_remote_code", "offload_train_param", "offload_train_grad", "offload_train_optimizer",
}  # fmt: skip
_EVAL_KEYS = {"data_path", "held_out_rows", "interval", "at_start", "max_rows"}
_ROWS_OF_A_PAIR = 2


def check_preference(config: Config) -> None:
    """Raises ValueError for the first rule that is broken."""
    keys, stage = config.actor_config, config.actor_config.stage
    pairs = on_pairs(stage)
    if keys.is_pairwise_dataset is not None and keys.is_pairwise_dataset != pairs:
        raise ValueError(
            f"megatron_training.is_pairwise_dataset ({str(keys.is_pairwise_dataset).lower()}) must be {str(pairs).lower()} for "
            f"megatron_training.stage {stage}, which trains on {'pairs' if pairs else 'prompts'}; set it or remove it"
        )
    _check_held_out(config, pairs)
    if pairs:
        _check_loss(config)
        _check_reference(config)


def _check_loss(config: Config) -> None:
    keys = config.actor_config
    if keys.dpo_label_smoothing and keys.dpo_loss_type not in _SMOOTHED:
        raise ValueError(
            f"megatron_training.dpo_label_smoothing ({keys.dpo_label_smoothing}) must be 0 for dpo_loss_type {keys.dpo_loss_type}: "
            f"{' and '.join(_SMOOTHED)} alone know wrong labels; set it to 0 or take one of these"
        )
    if keys.dpo_loss_type == "robust" and not keys.dpo_label_smoothing:
        raise ValueError(
            "megatron_training.dpo_label_smoothing (0) must be > 0 for dpo_loss_type robust, which corrects that share of wrong labels: "
            "set it, for example to 0.1, or take sigmoid"
        )


def _check_held_out(config: Config, pairs: bool) -> None:
    rows, files = (config.eval.held_out_rows, config.eval.data_path) if config.eval else (None, None)
    if rows is None:
        return
    if not pairs:
        raise ValueError(f"eval.held_out_rows ({rows}) is for megatron_training.stage dpo; name a file in eval.data_path instead")
    if files:
        raise ValueError(f"eval.held_out_rows ({rows}) and eval.data_path ({', '.join(files)}) are two answers; remove one of them")


def _check_reference(config: Config) -> None:
    keys, own = config.actor_config, config.rl_config.integrated_mode_config.ref_model_load_path
    if keys.ref_model and own not in (None, keys.ref_model):
        raise ValueError(
            f"megatron_training.ref_model ({keys.ref_model}) and rl_config.integrated_mode_config.ref_model_load_path ({own}) name two "
            "references; remove one of them"
        )


def check_pair_length(config: Config, hf: Mapping[str, Any], hf_path: str) -> None:
    """hf: config.json. Raises ValueError where sequences may be longer than the model has positions for."""
    text = text_config(hf)
    positions, length = text.get("max_position_embeddings"), config.actor_config.seq_length
    is_scaled = any((text.get(key) or {}).get("factor") for key in ("rope_scaling", "rope_parameters"))
    if positions and length > positions and not is_scaled:
        raise ValueError(
            f"megatron_training.seq_length ({length}) must be <= max_position_embeddings ({positions}) of {hf_path}/config.json; lower it"
        )


def with_pairs(plan: Plan, config: Config, reference: str) -> Plan:
    """The plan of a run on pairs. reference: folder of megatron_training.ref_model, empty for that of the other keys."""
    keys, rl = config.actor_config, config.rl_config
    held_out = config.eval.held_out_rows if config.eval else None
    train = replace(
        plan.train,
        reference_load=reference or plan.train.reference_load,
        reference_key=plan.train.reference_key if rl.integrated_mode_config.ref_model_load_path else "megatron_training.ref_model",
        rows_together=_ROWS_OF_A_PAIR,
        max_samples_per_micro_batch=plan.train.max_samples_per_micro_batch * _ROWS_OF_A_PAIR,
        # The responses are given: their probability is the model's own, as it stands.
        temperature=1.0,
        bans_markers=False,
        logprob_gap_bound=0.0,
    )
    return replace(
        plan,
        run=replace(plan.run, samples_per_prompt=_ROWS_OF_A_PAIR),
        train=train,
        vision=plan.vision and replace(plan.vision, reference_load=train.reference_load),
        data=replace(
            plan.data,
            max_pair_length=keys.seq_length,
            max_prompt_length=rl.max_prompt_length if "max_prompt_length" in rl.model_fields_set else keys.seq_length,
            row_slice=(None, -held_out) if held_out else (None, None),
        ),
        recipe=replace(plan.recipe, kl_coef=0.0),
        eval=plan.eval and replace(plan.eval, data=plan.eval.data or (plan.data.train_path,), held_out_rows=held_out or 0),
        preference=PreferencePlan(
            loss_type=keys.dpo_loss_type,
            beta=keys.dpo_beta,
            label_smoothing=keys.dpo_label_smoothing,
            simpo_gamma=keys.simpo_gamma,
            pref_ftx=keys.pref_ftx,
            cache_reference=keys.cache_ref_logprobs,
        ),
    )


def preference_notes(config: Config) -> list[str]:
    """Keys that have no say in this stage."""
    stage, keys = config.actor_config.stage, config.actor_config
    if not on_pairs(stage):
        given = [key for key in _KEYS if key in keys.model_fields_set]
        return [f"megatron_training: {', '.join(given)}: {stage} trains on prompts, not on pairs"] if given else []
    notes = [("rl_config", config.rl_config, _RL_KEYS), ("generate_config", config.generate_config, _GENERATE_KEYS)]
    notes += [("eval", config.eval, _EVAL_KEYS)] if config.eval else []
    unused = [(name, sorted(section.model_fields_set - acting)) for name, section, acting in notes]
    told = [f"{name}: {', '.join(given)}: {stage} neither samples nor grades" for name, given in unused if given]
    if keys.dpo_loss_type in ("simpo", "orpo") and keys.ref_model:
        told.append(f"megatron_training: ref_model: {keys.dpo_loss_type} has no reference")
    if keys.dpo_loss_type != "simpo" and "simpo_gamma" in keys.model_fields_set:
        told.append(f"megatron_training: simpo_gamma: dpo_loss_type is {keys.dpo_loss_type}")
    return told
