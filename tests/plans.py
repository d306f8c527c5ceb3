"""Plans of tiny runs for tests: every field given, so that a test changes only what it is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.config.plan import (
    DataPlan,
    EvalPlan,
    OptimizerPlan,
    Plan,
    PreferencePlan,
    RecipePlan,
    RewardPlan,
    RolloutPlan,
    RunPlan,
    TrainPlan,
)

MIN_PIXELS, MAX_PIXELS = 28 * 28, 64 * 28 * 28


def optimizer_plan(**changes: Any) -> OptimizerPlan:
    plan = OptimizerPlan(
        lr=1e-3,
        min_lr=0.0,
        lr_decay_style="constant",
        warmup_updates=0,
        decay_updates=100,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        clip_grad=1.0,
        use_distributed_optimizer=False,
    )
    return replace(plan, **changes)


def train_plan(folder: Path, **changes: Any) -> TrainPlan:
    plan = TrainPlan(
        hf_path=str(folder),
        load=str(folder),
        reference_load=str(folder),
        dtype="float32",
        seed=7,
        freeze_vision=True,
        freeze_projector=True,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        context_parallel_size=1,
        expert_parallel_size=1,
        sequence_parallel=False,
        max_tokens_per_micro_batch=4096,
        max_samples_per_micro_batch=0,
        temperature=0.7,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        recompute=None,
        deterministic=True,
        optimizer=optimizer_plan(),
        no_load_optim=False,
        no_load_rng=False,
        finetune=False,
        timeout_seconds=120.0,
        threads=1,
        logprob_gap_bound=0.0,
    )
    return replace(plan, **changes)


def rollout_plan(folder: Path, **changes: Any) -> RolloutPlan:
    plan = RolloutPlan(
        hf_path=str(folder),
        dtype="float32",
        seed=7,
        temperature=0.7,
        max_tokens=24,
        max_model_len=256,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        gpu_memory_utilization=0.5,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
        enable_prefix_caching=True,
        max_images_per_prompt=3,
        image_embeds=True,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        tensor_parallel_size=1,
        trust_remote_code=False,
        threads=1,
        timeout_seconds=120.0,
    )
    return replace(plan, **changes)


def recipe_plan(**changes: Any) -> RecipePlan:
    plan = RecipePlan(
        algorithm="dapo",
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        token_level_loss=True,
        kl_penalty="low_var_kl",
        kl_coef=0.0,
        kl_ctrl_type="fixed",
        kl_target=0.1,
        kl_horizon=1000.0,
        entropy_coeff=0.0,
        rollout_is_cap=0.0,
        filter_groups=False,
        filter_metric="score",
        filter_max_batches=4,
        train_prompts=4,
        loss_length=0,
        use_kl_in_reward=False,
        gamma=1.0,
        lam=0.95,
        advantage_whiten=True,
        cliprange_value=0.5,
    )
    return replace(plan, **changes)


def reward_plan(**changes: Any) -> RewardPlan:
    plan = RewardPlan(
        verifiers=("geo3k",), weights=(1.0,), overlong_buffer=0, overlong_penalty_factor=1.0, max_tokens=24, workers=1, timeout_seconds=10.0
    )
    return replace(plan, **changes)


def data_plan(folder: Path, train_path: Path, **changes: Any) -> DataPlan:
    plan = DataPlan(
        train_path=str(train_path),
        hf_path=str(folder),
        seed=7,
        shuffle=True,
        max_prompt_length=200,
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        max_images_per_prompt=3,
        num_workers=1,
        skip_bad_rows=False,
        prompt_key="prompt",
        image_key="images",
        trust_remote_code=False,
    )
    return replace(plan, **changes)


def run_plan(output: Path, **changes: Any) -> RunPlan:
    plan = RunPlan(
        train_iters=2,
        prompts_per_generation=4,
        samples_per_prompt=4,
        mini_batch_prompts=2,
        epochs=1,
        shuffle_mini_batch=False,
        on_policy=False,
        save=str(output / "save"),
        save_interval=100,
        keep_last=0,
        resume="auto",
        output=str(output / "logs"),
        num_devices=1,
        device="cpu",
        timeout_seconds=120.0,
        use_tensorboard=True,
        log_max_throughput=False,
        seed=7,
    )
    return replace(plan, **changes)


def whole_plan(folder: Path, train_path: Path, output: Path) -> Plan:
    return Plan(
        run=run_plan(output),
        train=train_plan(folder),
        rollout=rollout_plan(folder),
        data=data_plan(folder, train_path),
        reward=reward_plan(),
        recipe=recipe_plan(),
        runtime_env=(),
        notes=(),
    )


def pairs_plan(folder: Path, train_path: Path, output: Path, **preference: Any) -> Plan:
    """DPO."""
    plan = whole_plan(folder, train_path, output)
    wanted = PreferencePlan("sigmoid", beta=0.1, label_smoothing=0.0, simpo_gamma=0.5, pref_ftx=0.0, cache_reference=True)
    return replace(
        plan,
        run=replace(plan.run, samples_per_prompt=2, mini_batch_prompts=4, on_policy=True),
        train=replace(plan.train, temperature=1.0, rows_together=2, bans_markers=False),
        data=replace(plan.data, max_pair_length=256),
        recipe=replace(plan.recipe, algorithm="dpo"),
        preference=replace(wanted, **preference),
    )


def eval_plan(*data: Path, **changes: Any) -> EvalPlan:
    files = tuple(map(str, data))
    plan = EvalPlan(files, interval=2, at_start=False, samples_per_prompt=1, temperature=0.0, max_rows=0, reward=reward_plan())
    return replace(plan, **changes)
