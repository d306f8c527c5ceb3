"""From the user's Config to the Plan: every derived value is computed here, once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mindspeed_mm_rl.config.check import REWARD_MODEL, check, check_model, kl_coef, train_prompts
from mindspeed_mm_rl.config.layout import expert_sizes, pipeline_layers
from mindspeed_mm_rl.config.layout_rules import check_layout
from mindspeed_mm_rl.config.memory import check_recompute, memory_notes, offload_parts, recompute_fields, weight_carrier
from mindspeed_mm_rl.config.model_file import ModelChoices, compare_architecture, find_file, is_vision_model, model_choices, read_hf_config
from mindspeed_mm_rl.config.plan import (
    DataPlan,
    Dtype,
    EvalPlan,
    OptimizerPlan,
    Plan,
    RecipePlan,
    RewardPlan,
    RolloutPlan,
    RunPlan,
    TrainPlan,
)
from mindspeed_mm_rl.config.preference import check_pair_length, preference_notes, with_pairs
from mindspeed_mm_rl.config.profiler import trace_settings
from mindspeed_mm_rl.config.runtime_env import RuntimeEnv, read_runtime_env
from mindspeed_mm_rl.config.schema import Config
from mindspeed_mm_rl.config.stages import STAGES, has_critic, on_pairs, with_stage_defaults
from mindspeed_mm_rl.config.vision import check_vision, vision_notes, vision_plan
from mindspeed_mm_rl.platforms import device, resources

_PROMPT_KEY, _IMAGE_KEY = "prompt", "images"
_ADAM_EPS = 1e-8
_SHARED_WITH_CRITIC = ("train_iters", "global_batch_size", "bf16", "min_pixels", "max_pixels", "npu_deterministic")
_OF_CRITIC_ALONE = {
    "load", "save", "seed", "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layer_list",
    "num_layers_per_virtual_pipeline_stage", "virtual_pipeline_model_parallel_size", "context_parallel_size", "context_parallel_algo",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "moe_tp_extend_ep", "sequence_parallel", "use_distributed_optimizer",
    "overlap_grad_reduce", "overlap_param_gather", "recompute_granularity", "recompute_method", "recompute_num_layers", "micro_batch_size",
    "lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "no_load_optim",
    "no_load_rng",
}  # fmt: skip
"""Keys that act in critic_config; the others are the actor's."""
_ULYSSES = ("ulysses_cp_algo", "ulysses")
_FLOAT32_GAP_BOUND = 0.1
"""In float32 the two engines agree to about 1e-4; a tenth means that one of them computes something else."""
_OF_TEXT = ("acc", "base_acc", "acc_for_dapo", "math_verify_reward", "format", "strict_format")
_LEAST_GRADERS, _MAX_GRADERS = 2, 8
"""While a response makes one hang, another one goes on."""


def make_plan(config: Config) -> Plan:
    """Checks every rule and derives every value. Paths become absolute (relative ones: to the cwd); weights and data aren't opened.

    Raises ValueError with one sentence.
    """
    config = with_stage_defaults(config)
    check(config)
    hf_path = _absolute(config.actor_config.tokenizer_name_or_path)
    hf = read_hf_config(hf_path)
    if hf is not None:
        compare_architecture(config.model, config.architecture, hf, hf_path)
    choices, vision = model_choices(config.model, hf), is_vision_model(hf, config.model)
    rollout = _rollout(config, hf_path, vision and choices.freeze_vision and choices.freeze_projector)
    pairs = on_pairs(config.actor_config.stage)
    if hf is not None and pairs:
        check_pair_length(config, hf, hf_path)
    elif hf is not None:
        check_model(rollout, hf, on_cpu=device.kind() == "cpu")
    check_vision(config, hf, vision)
    train = _train(config, hf_path, choices)
    critic = _critic(config, hf_path, choices) if has_critic(config.actor_config.stage) else None
    for section, role in (("actor_config", train), ("critic_config", critic)):
        if role is not None:
            check_layout(section, role, config.rl_config.actor_resource.num_npus, hf)
            check_recompute(section, role, hf)
    workers = vision_plan(config, train, _absolute(config.vit_config.load))
    given = _given_environment(config)
    environment = resources.worker_environment(device.kind(), train.deterministic, given.variables)
    plan = Plan(
        run=_run(config),
        train=replace(train, with_vision=workers is None),
        rollout=replace(rollout, weight_carrier=weight_carrier(config.generate_config, device.kind(), environment)),
        data=_data(config, hf_path),
        reward=_reward(config, vision),
        recipe=_recipe(config),
        runtime_env=tuple(sorted(environment.items())),
        notes=(*config.notes, *given.notes, *_notes(config, vision), *vision_notes(config), *_other_notes(config, choices)),
        eval=_eval(config, vision),
        # One that is trained is each network's own: the workers train the actor's.
        critic=critic and replace(critic, with_vision=workers is None or not rollout.image_embeds),
        vision=workers,
    )
    return with_pairs(plan, config, _absolute(config.actor_config.ref_model)) if pairs else plan


def _other_notes(config: Config, choices: ModelChoices) -> list[str]:
    return [*preference_notes(config), *memory_notes(config, choices)]


def _given_environment(config: Config) -> RuntimeEnv:
    path = config.rl_config.runtime_env_path
    return read_runtime_env(path, config.folder, device.kind()) if path else RuntimeEnv({})


def _absolute(path: str | None) -> str:
    """Workers have another working directory."""
    return str(Path(path).expanduser().absolute()) if path else ""


def _cores() -> int:
    """Those this process may use; a container's share is often smaller than the machine."""
    return len(os.sched_getaffinity(0))


def _threads(config: Config) -> int:
    # Train and rollout take turns, so the processes of the phase that computes share every core.
    return max(1, _cores() // config.rl_config.actor_resource.num_npus) if device.kind() == "cpu" else 0


def _dtype(config: Config) -> Dtype:
    return "bfloat16" if config.actor_config.bf16 else "float32"


def _mini_batch_prompts(config: Config) -> int:
    return config.rl_config.mini_batch_size or train_prompts(config)


def _updates(config: Config, iterations: int) -> int:
    """Optimizer steps of so many iterations."""
    mini_batches = -(-train_prompts(config) // _mini_batch_prompts(config))
    return iterations * config.rl_config.epochs * mini_batches


def _run(config: Config) -> RunPlan:
    megatron, rl, prompts = config.actor_config, config.rl_config, train_prompts(config)
    return RunPlan(
        train_iters=megatron.train_iters or 0,
        prompts_per_generation=megatron.global_batch_size or 0,
        samples_per_prompt=rl.n_samples_per_prompt,
        mini_batch_prompts=_mini_batch_prompts(config),
        epochs=rl.epochs,
        shuffle_mini_batch=rl.shuffle_mini_batch,
        on_policy=_mini_batch_prompts(config) == prompts and rl.epochs == 1,
        save=_absolute(config.actor_config.save),
        save_interval=config.actor_config.save_interval or megatron.train_iters or 0,
        keep_last=config.actor_config.keep_last,
        resume=rl.resume if rl.resume in ("auto", "off") else _absolute(rl.resume),
        output=_output(config),
        num_devices=rl.actor_resource.num_npus,
        device=device.kind(),
        timeout_seconds=rl.timeout_seconds,
        use_tensorboard=rl.use_tensorboard,
        log_max_throughput=rl.log_max_throughput,
        seed=megatron.seed,
        no_shared_storage=megatron.no_shared_storage,
        critic_warmup=rl.critic_warmup,
    )


def _output(config: Config) -> str:
    return _absolute(config.rl_config.output or f"logs/{config.name}")


def _train(config: Config, hf_path: str, choices: ModelChoices, section: str = "actor_config") -> TrainPlan:
    """section: whose keys stand in config.actor_config, for messages."""
    actor, rl = config.actor_config, config.rl_config
    load = _absolute(actor.load) or hf_path
    expert, expert_tensor = expert_sizes(section, actor)
    bound = rl.logprob_gap_bound
    return TrainPlan(
        hf_path=hf_path,
        load=load,
        reference_load=_absolute(rl.integrated_mode_config.ref_model_load_path) or load,
        dtype=_dtype(config),
        seed=config.actor_config.seed,
        freeze_vision=choices.freeze_vision,
        freeze_projector=choices.freeze_projector,
        tensor_parallel_size=actor.tensor_model_parallel_size,
        pipeline_parallel_size=actor.pipeline_model_parallel_size,
        context_parallel_size=actor.context_parallel_size,
        expert_parallel_size=expert,
        sequence_parallel=actor.sequence_parallel,
        max_tokens_per_micro_batch=rl.max_packing_token_size,
        max_samples_per_micro_batch=0 if rl.use_dynamic_bsz else actor.micro_batch_size or 0,
        temperature=config.generate_config.sampling_config.temperature,
        min_pixels=config.actor_config.min_pixels,
        max_pixels=config.actor_config.max_pixels,
        **recompute_fields(actor, choices),
        offload=offload_parts(config.generate_config, device.kind()),
        deterministic=actor.npu_deterministic,
        optimizer=_optimizer(config, config.actor_config.train_iters - rl.critic_warmup),
        no_load_optim=actor.no_load_optim,
        no_load_rng=actor.no_load_rng,
        finetune=actor.finetune,
        timeout_seconds=rl.timeout_seconds,
        threads=_threads(config),
        logprob_gap_bound=bound if bound is not None else _FLOAT32_GAP_BOUND if not actor.bf16 else 0.0,
        pipeline_layers=pipeline_layers(section, actor, choices.pipeline_num_layers, choices.num_layers),
        context_parallel_algorithm="ulysses" if actor.context_parallel_algo in _ULYSSES else "all_gather",
        expert_tensor_parallel_size=expert_tensor,
        trace=trace_settings(config.profiler_config, _output(config), rl.actor_resource.num_npus),
    )


def _critic(config: Config, hf_path: str, choices: ModelChoices) -> TrainPlan:
    """The critic's plan is that of an actor whose section is critic_config, but for what the two share."""
    actor = config.actor_config
    shared = {key: getattr(actor, key) for key in _SHARED_WITH_CRITIC} | {"load": config.critic_config.load or actor.load}
    own = config.model_copy(update={"actor_config": config.critic_config.model_copy(update=shared)})
    if config.critic_config.pipeline_model_parallel_size != actor.pipeline_model_parallel_size:
        choices = replace(choices, pipeline_num_layers=None)  # The model file's split is the actor's.
    train = _train(own, hf_path, choices, "critic_config")
    return replace(train, reference_load=train.load, optimizer=_optimizer(own, actor.train_iters), logprob_gap_bound=0.0, trace=None)


def _optimizer(config: Config, iterations: int) -> OptimizerPlan:
    actor, updates = config.actor_config, _updates(config, iterations)
    return OptimizerPlan(
        lr=actor.lr,
        min_lr=actor.min_lr,
        lr_decay_style=actor.lr_decay_style,
        warmup_updates=round((actor.lr_warmup_fraction or 0.0) * updates),
        decay_updates=updates,
        weight_decay=actor.weight_decay,
        adam_beta1=actor.adam_beta1,
        adam_beta2=actor.adam_beta2,
        adam_eps=_ADAM_EPS,
        clip_grad=actor.clip_grad,
        use_distributed_optimizer=actor.use_distributed_optimizer,
        overlap_grad_reduce=actor.overlap_grad_reduce,
        overlap_param_gather=actor.overlap_param_gather,
    )


def _rollout(config: Config, hf_path: str, image_embeds: bool) -> RolloutPlan:
    generate, megatron = config.generate_config, config.actor_config
    sampling = generate.sampling_config
    max_model_len = generate.max_model_len or config.rl_config.max_prompt_length + sampling.max_tokens
    return RolloutPlan(
        hf_path=hf_path,
        dtype=_dtype(config),
        seed=sampling.seed if sampling.seed is not None else megatron.seed,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        max_model_len=max_model_len,
        max_num_seqs=generate.max_num_seqs,
        max_num_batched_tokens=max(generate.max_num_batched_tokens, max_model_len),
        gpu_memory_utilization=generate.gpu_memory_utilization,
        kv_cache_bytes=generate.kv_cache_bytes,
        enforce_eager=generate.enforce_eager,
        enable_prefix_caching=generate.enable_prefix_caching,
        max_images_per_prompt=generate.limit_mm_image_per_prompt,
        image_embeds=image_embeds,
        min_pixels=megatron.min_pixels,
        max_pixels=megatron.max_pixels,
        tensor_parallel_size=generate.infer_tensor_parallel_size,
        trust_remote_code=generate.trust_remote_code,
        threads=_threads(config),
        timeout_seconds=config.rl_config.timeout_seconds,
        expert_parallel=generate.enable_expert_parallel,
        data_parallel_size=generate.infer_expert_parallel_size,
    )


def _data(config: Config, hf_path: str) -> DataPlan:
    megatron, generate = config.actor_config, config.generate_config
    return DataPlan(
        train_path=_absolute(megatron.data_path),
        hf_path=hf_path,
        seed=megatron.seed,
        shuffle=not megatron.no_shuffle,
        max_prompt_length=config.rl_config.max_prompt_length,
        min_pixels=megatron.min_pixels,
        max_pixels=megatron.max_pixels,
        max_images_per_prompt=generate.limit_mm_image_per_prompt,
        num_workers=config.actor_config.num_workers,
        skip_bad_rows=megatron.skip_bad_rows,
        prompt_key=_PROMPT_KEY,
        image_key=_IMAGE_KEY,
        trust_remote_code=generate.trust_remote_code,
    )


def _reward(config: Config, vision: bool) -> RewardPlan:
    rl = config.rl_config
    verifiers = _verifiers(config, rl.verifier_function or ("geo3k" if vision else "base_acc",))
    return RewardPlan(
        verifiers=verifiers,
        weights=rl.verifier_weight or (1.0,) * len(verifiers),
        overlong_buffer=rl.overlong_buffer if rl.overlong_buffer_enable else 0,
        overlong_penalty_factor=rl.overlong_buffer_penalty_factor,
        max_tokens=config.generate_config.sampling_config.max_tokens,
        workers=rl.verifier_parallel or min(_MAX_GRADERS, max(_LEAST_GRADERS, _cores() // 2)),
        timeout_seconds=rl.verifier_timeout,
        by_source=tuple(
            (source, _verifiers(config, tuple(weights)), tuple(weights.values())) for source, weights in rl.verifier_by_source.items()
        ),
        reward_model=_absolute(rl.reward_model),
        reward_model_timeout=rl.reward_model_timeout,
    )


def _verifiers(config: Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """Files of users' functions become absolute: they are looked up as other files of the configuration are."""
    parts = [name.rpartition(":") for name in names]
    return tuple(
        f"{find_file(file, Path(config.folder), 'rl_config.verifier_function').resolve()}:{function}" if file.endswith(".py") else name
        for name, (file, _, function) in zip(names, parts, strict=True)
    )


def _rules_alone(plan: RewardPlan) -> RewardPlan:
    """For evaluation: a reward model's score says nothing of right or wrong, and a second copy of it would take as much memory again."""

    def rules(verifiers: tuple[str, ...], weights: tuple[float, ...]) -> list[tuple[str, float]]:
        return [(name, weight) for name, weight in zip(verifiers, weights, strict=True) if name != REWARD_MODEL]

    own, others = rules(plan.verifiers, plan.weights), [(source, rules(names, weights)) for source, names, weights in plan.by_source]
    return replace(
        plan,
        verifiers=tuple(name for name, _ in own),
        weights=tuple(weight for _, weight in own),
        by_source=tuple((source, tuple(n for n, _ in pairs), tuple(w for _, w in pairs)) for source, pairs in others if pairs),
        reward_model="",
    )


def _eval(config: Config, vision: bool) -> EvalPlan | None:
    given, actor = config.eval, config.actor_config
    if given is None:
        return None
    reward, n = _rules_alone(replace(_reward(config, vision), overlong_buffer=0)), given.n_samples_per_prompt
    if given.verifier_function:
        verifiers = _verifiers(config, given.verifier_function)
        reward = replace(reward, verifiers=verifiers, weights=(1.0,) * len(verifiers), by_source=())
    temperature = 0.0 if n == 1 else config.generate_config.sampling_config.temperature
    return EvalPlan(
        data=tuple(_absolute(path) for path in given.data_path or ()),
        interval=given.interval or actor.save_interval or actor.train_iters or 0,
        at_start=given.at_start,
        samples_per_prompt=n,
        temperature=temperature if given.temperature is None else given.temperature,
        max_rows=given.max_rows or 0,
        reward=reward,
    )


def _recipe(config: Config) -> RecipePlan:
    rl, algorithm = config.rl_config, STAGES[config.actor_config.stage].algorithm
    return RecipePlan(
        algorithm=algorithm,
        clip_ratio_low=rl.clip_ratio_low if rl.clip_higher_enable else rl.clip_ratio,
        clip_ratio_high=rl.clip_ratio_high if rl.clip_higher_enable else rl.clip_ratio,
        token_level_loss=rl.token_level_loss,
        kl_penalty=rl.kl_penalty,
        kl_coef=kl_coef(config),
        kl_ctrl_type=rl.kl_ctrl_type,
        kl_target=rl.kl_target,
        kl_horizon=rl.kl_horizon,
        entropy_coeff=rl.entropy_coeff,
        rollout_is_cap=rl.rollout_is_cap,
        filter_groups=rl.filter_groups_enable,
        filter_metric=rl.filter_groups_metric,
        filter_max_batches=rl.filter_groups_max_batches,
        train_prompts=train_prompts(config),
        loss_length=config.generate_config.sampling_config.max_tokens if algorithm == "dr_grpo" else 0,
        use_kl_in_reward=rl.use_kl_in_reward,
        gamma=rl.gamma,
        lam=rl.lam,
        advantage_whiten=rl.advantage_whiten,
        cliprange_value=rl.cliprange_value,
    )


def _notes(config: Config, vision: bool) -> list[str]:
    """What a user of the reference system may not expect."""
    rl, notes = config.rl_config, []
    if config.actor_config.stage == "ray_dapo" and rl.init_kl_coef and "init_kl_coef" in rl.model_fields_set:
        notes.append(f"rl_config: init_kl_coef ({rl.init_kl_coef}) isn't used: ray_dapo has no KL term")
    actor, critic = config.actor_config, config.critic_config
    given = [key for key in critic.model_fields_set - _OF_CRITIC_ALONE if getattr(critic, key) != getattr(actor, key)]
    if given and has_critic(actor.stage):
        told = ", ".join(f"{key} ({getattr(critic, key)})" for key in sorted(given))
        notes.append(f"critic_config: {told} isn't used: the actor's acts on both")
    tagged = [name for name in rl.verifier_function or () if name in _OF_TEXT]
    if vision and tagged:
        notes.append(
            f"rl_config: verifier_function {', '.join(tagged)} acts on pictures too, and asks for the text data sets' answer format; "
            "geo3k (0.9 accuracy + 0.1 format) is what geo3k.py's instruction asks for"
        )
    return notes
