"""The user's sections: every key that acts, with its default. Defaults are written here and nowhere else.

Keys that are accepted without acting, or not offered, are in known_keys.py; other spellings in spellings.py.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mindspeed_mm_rl.config.profiler import ProfilerConfig
from mindspeed_mm_rl.config.section import Section


class MegatronConfig(Section):
    """`megatron_training`; `actor_config` has the same keys and overrides them for the actor."""

    stage: (
        Literal[
            "ray_grpo",
            "ray_dapo",
            "ray_ppo",
            "ray_dr_grpo",
            "ray_rloo",
            "ray_reinforce_plus_plus",
            "ray_reinforce_plus_plus_baseline",
            "ray_gspo",
            "ray_cispo",
            "dpo",
        ]
        | None
    ) = None
    """The algorithm. Some have other defaults than those below; the printed plan names them."""
    global_batch_size: int | None = Field(None, gt=0)
    """Prompts drawn at a time; without dynamic sampling, also the prompts that an iteration trains on."""
    train_iters: int | None = Field(None, gt=0)
    """Iterations of the whole run, the resumed ones included."""
    save_interval: int | None = Field(None, gt=0)
    """Iterations between saves; null = only the final one."""
    keep_last: int = Field(0, ge=0)
    """Saves to keep; 0 = all."""
    tokenizer_name_or_path: str | None = None
    """Hugging Face folder of the model: config.json, tokenizer, preprocessor_config.json. It is the architecture."""
    data_path: str | None = None
    """Parquet, jsonl or json, a folder that holds train.parquet, or the prefix of prepared columns; of dpo, with pairs."""
    seq_length: int = Field(4096, gt=0)
    """dpo: tokens of prompt and response, image tokens included; longer pairs are dropped and counted."""
    is_pairwise_dataset: bool | None = None
    """Whether rows are pairs; null = what the stage says, and it may not say anything else."""
    dpo_loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    """dpo: loss on the pairs (algorithms/preference.py names their papers); simpo and orpo have no reference."""
    dpo_beta: float = Field(0.1, gt=0)
    """dpo: how strongly the policy is held near the reference; of simpo the scale of the reward, of orpo the weight of the odds ratio."""
    dpo_label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo, loss sigmoid or robust: share of pairs whose labels are taken to be the wrong way round."""
    simpo_gamma: float = Field(0.5, ge=0)
    """dpo, loss simpo: margin that rewards should reach."""
    pref_ftx: float = Field(0.0, ge=0)
    """dpo: weight of a supervised loss on the chosen responses; 0 = none."""
    ref_model: str | None = None
    """dpo: weights of the reference; null = rl_config.integrated_mode_config.ref_model_load_path."""
    cache_ref_logprobs: bool = True
    """dpo: log-probs of the reference are computed once for each pair and kept in rl_config.output; false: in every epoch anew."""
    min_pixels: int = Field(512 * 512, gt=0)
    """Pictures are enlarged to at least this many pixels."""
    max_pixels: int = Field(2048 * 2048, gt=0)
    """Pictures are reduced to at most this many pixels."""
    skip_bad_rows: bool = False
    """true: corrupt rows are skipped and counted; false: the first one ends the run, named by file and row."""
    no_shuffle: bool = False
    """true: rows in file order."""
    num_workers: int = Field(2, ge=0)
    """Threads that decode pictures ahead of their use; 0 = when needed."""
    seed: int = Field(1234, ge=0, lt=2**32)
    """Of the data order, of random states, and of sampling unless sampling_config.seed is given."""
    bf16: bool = True
    """false: training in float32."""
    npu_deterministic: bool = False
    """Deterministic kernels on every device."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Most samples of one packed micro-batch (null or rl_config.use_dynamic_bsz: only max_packing_token_size bounds it)."""
    tensor_model_parallel_size: int = Field(1, gt=0)
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = Field(1, gt=0)
    """Processes that share the stack of layers."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage, as "7,7,7,6"; null = pipeline_num_layers of the model file, or stages as even as may be."""
    num_layers_per_virtual_pipeline_stage: int | None = Field(None, gt=0)
    """Interleaved schedule: layers of each piece; every process holds several. null = one piece per process."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, gt=0)
    """The same, said as the number of pieces that each process holds; null = one."""
    context_parallel_size: int = Field(1, gt=0)
    """Processes that share each sequence."""
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "ulysses", "all_gather"] = "ulysses_cp_algo"
    """How they attend: ulysses_cp_algo exchanges heads for tokens, megatron_cp_algo collects keys and values; the others mean the same."""
    expert_model_parallel_size: int = Field(1, gt=0)
    """Processes that share the experts."""
    expert_tensor_parallel_size: int | None = Field(None, gt=0)
    """Processes that share each expert; null = 1, without expert parallel tensor_model_parallel_size."""
    moe_tp_extend_ep: bool = False
    """true: whole experts are dealt out over expert x tensor parallel processes."""
    sequence_parallel: bool = False
    """Norms and dropout split over the sequence; needs tensor_model_parallel_size > 1, and mixtures of experts need it then."""
    use_distributed_optimizer: bool = False
    """Optimizer state split over data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Gradients are summed over data-parallel processes while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Parameters are collected while the next forward pass already runs; needs use_distributed_optimizer."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """full: layers are run again in the backward pass, for memory; selective: only the attention within them."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Of full: uniform (also null) = all layers, recompute_num_layers at a time; block = only the first recompute_num_layers of a stage."""
    recompute_num_layers: int | None = Field(None, gt=0)
    """See recompute_method; null = 1."""
    lr: float = Field(1e-6, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    """From lr to min_lr over all updates of the run."""
    lr_warmup_fraction: float | None = Field(None, ge=0, le=1)
    """Share of all updates with linear warm-up from 0; null = none."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's, on matrices."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient norm; 0 = no clipping."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    load: str | None = None
    """Weights: Hugging Face folder, mm-convert output or a training save; null = tokenizer_name_or_path."""
    save: str | None = None
    """Folder of the saves; null = none."""
    no_shared_storage: bool = False
    """true: nodes don't share folders. Saves are collected on the driver's node; models and data must be on every node at the same path."""
    finetune: bool = False
    """true: of a training save in `load` only the weights are taken; iteration, optimizer, data position and random state start anew."""
    no_load_optim: bool = False
    """true: a resumed run starts with a new optimizer and at the beginning of the learning-rate schedule. With finetune, which speaks of
    `load`, a run that continues its own save has all of it."""
    no_load_rng: bool = False
    """true: a resumed run starts with new random states; with finetune as no_load_optim."""

    @field_validator("num_layer_list", mode="before")
    @classmethod
    def _numbers_in_a_text(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else (value,) if isinstance(value, int) else value


class ActorResource(Section):
    num_npus: int = Field(1, gt=0)
    """Devices of the actor and of the rollout that takes turns with it (NPU, GPU, or process on CPU)."""


class IntegratedModeConfig(Section):
    ref_model_load_path: str | None = None
    """Weights of the KL reference; null = those the run began with (a save remembers where they are), at first actor_config.load."""


class RLConfig(Section):
    """`rl_config`: algorithm, rewards, resources, logs."""

    actor_resource: ActorResource = ActorResource()
    """Devices."""
    colocate_actor_and_vit: bool = False
    """true: the vision encoder has workers of its own on the actor's devices, with vit_config's weights and layout; false: it is a part
    of the actor's first pipeline stage."""
    integrated_mode_config: IntegratedModeConfig = IntegratedModeConfig()
    """The reference model."""
    resume: str = "auto"
    """auto: continue the save that actor_config.save names, if there is one, else begin with actor_config.load; off: never continue;
    or the path of a training save to continue."""
    runtime_env_path: str | None = None
    """YAML whose env_vars go to every worker process."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """A worker or collective that is silent for longer ends the run."""
    output: str | None = None
    """Folder of metrics.jsonl, tensorboard, table and picture; null = logs/<name of the YAML>."""
    n_samples_per_prompt: int = Field(1, gt=0)
    """Responses per prompt; at least 2 where they are compared, as in every stage but ray_ppo and ray_reinforce_plus_plus."""
    mini_batch_size: int | None = Field(None, gt=0)
    """Prompts per optimizer step; null = all of the iteration (on-policy)."""
    epochs: int = Field(1, gt=0)
    """Passes over the samples of an iteration."""
    critic_warmup: int = Field(0, ge=0)
    """ray_ppo: iterations at the start of the run that train the critic alone."""
    shuffle_mini_batch: bool = False
    """true: groups are shuffled before they are cut into mini-batches."""
    max_prompt_length: int = Field(512, gt=0)
    """Tokens, image tokens included; longer prompts are dropped and counted."""
    use_dynamic_bsz: bool = False
    """true: micro_batch_size is not used, max_packing_token_size alone bounds a micro-batch."""
    max_packing_token_size: int = Field(4096, gt=0)
    """Tokens of one packed micro-batch (of [forward, update] the second)."""
    adv_estimator: Literal["group_norm", "gae"] | None = None
    """What the stage says: gae for ray_ppo, group_norm for all others."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token of ray_ppo and ray_reinforce_plus_plus."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of ray_ppo's generalised advantage estimate (arXiv 1506.02438)."""
    advantage_whiten: bool = True
    """ray_ppo: advantages are normalised over the tokens of the iteration."""
    cliprange_value: float = Field(0.5, gt=0)
    """ray_ppo: a value may leave the one at the rollout by this much before its loss stops pulling."""
    clip_ratio: float = Field(0.2, gt=0, lt=1)
    """Clip of the probability ratio on both sides, unless clip_higher_enable."""
    clip_higher_enable: bool = False
    """true: clip_ratio_low and clip_ratio_high instead of clip_ratio (arXiv 2503.14476, section 3.1)."""
    clip_ratio_low: float = Field(0.1, gt=0, le=1)
    """Ratio is clipped below 1 - this."""
    clip_ratio_high: float = Field(0.1, gt=0)
    """Ratio is clipped above 1 + this."""
    token_level_loss: bool = True
    """true: mean over all response tokens of the mini-batch; false: mean of the sequences' means."""
    entropy_coeff: float = Field(0.0, ge=0)
    """Weight of the entropy bonus; 0 = none."""
    kl_penalty: Literal["kl", "abs", "mse", "low_var_kl"] = "low_var_kl"
    """Estimate of KL(policy, reference)."""
    use_kl_in_reward: bool = False
    """true: the KL term is taken off the reward of each token, not put into the loss; ray_rloo and ray_reinforce_plus_plus always do."""
    init_kl_coef: float = Field(0.01, ge=0)
    """Weight of the KL term; 0 = no reference model. ray_dapo has no KL term."""
    kl_ctrl_type: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: the weight follows kl_target (arXiv 1909.08593, section 2.2)."""
    kl_target: float = Field(100.0, gt=0)
    """KL that the adaptive controller aims at."""
    kl_horizon: float = Field(1000.0, gt=0)
    """Samples over which the adaptive controller acts."""
    rollout_is_cap: float = Field(0.0, ge=0)
    """Cap of the truncated importance weight exp(old - rollout log-prob); 0 = off."""
    logprob_gap_bound: float | None = Field(None, ge=0)
    """Largest |trainer - rollout| log-prob of a token before the run stops; 0 = no bound; null = 0.1 in float32, none in bfloat16."""
    filter_groups_enable: bool = False
    """Dynamic sampling: groups whose samples all score the same are dropped and refilled (arXiv 2503.14476, section 3.2)."""
    filter_groups_metric: str = "acc"
    """What must differ within a group: a verifier of verifier_function, or accuracy, or score."""
    filter_groups_max_batches: int = 1
    """Generation batches an iteration may draw before the run ends with an error; <= 0 = no limit."""
    filter_groups_train_batch_size: int | None = Field(None, gt=0)
    """Prompts an iteration trains on when filtering; null = global_batch_size."""
    overlong_buffer_enable: bool = False
    """Penalty for responses near the length limit (arXiv 2503.14476, section 3.4)."""
    rollout_max_tokens: int = Field(2048, gt=0)
    """Must equal sampling_config.max_tokens when the penalty is on."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before the limit over which the penalty grows from 0 to its factor."""
    overlong_buffer_penalty_factor: float = Field(1.0, ge=0)
    """Penalty at the limit."""
    verifier_function: tuple[str, ...] | None = None
    """Names of rewards, path/to/file.py:name, reward_model; null = geo3k for pictures (0.9 accuracy + 0.1 format), base_acc for text."""
    verifier_weight: tuple[float, ...] | None = None
    """One weight per verifier; null = 1.0 each."""
    verifier_by_source: dict[str, dict[str, float]] = {}
    """data_source -> name: weight of its verifiers (or a list of names, 1.0 each); rows of other sources go by verifier_function."""
    reward_model: str | None = None
    """Folder of a Hugging Face sequence classifier with one label, which scores where verifiers name reward_model; null = none."""
    reward_model_timeout: float = Field(120.0, gt=0)
    """Seconds in which the reward model must score the samples of one prompt."""
    verifier_parallel: int | None = Field(None, gt=0)
    """Processes that grade; null = half of the cores, 2 to 8."""
    verifier_timeout: float = Field(5.0, gt=0)
    """Seconds for one sample, which takes milliseconds; over it the sample gets the lowest score. Less when samples hang in a row."""
    use_tensorboard: bool = True
    """Scalars under <output>/tensorboard."""
    log_max_throughput: bool = False
    """true: tokens per second from the longest instead of the mean lengths."""

    @field_validator("resume", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare off as false.
        return "off" if value is False else value

    @field_validator("max_packing_token_size", mode="before")
    @classmethod
    def _of_two_the_update(cls, value: Any) -> Any:
        return value[-1] if isinstance(value, list) and value else value

    @field_validator("verifier_by_source", mode="before")
    @classmethod
    def _names_weigh_one(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        lists = {source: [names] if isinstance(names, str) else names for source, names in value.items()}
        return {source: dict.fromkeys(names, 1.0) if isinstance(names, list) else names for source, names in lists.items()}

    @field_validator("verifier_function", "verifier_weight", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value


class SamplingConfig(Section):
    max_tokens: int = Field(2048, gt=0)
    """Longest response, end token included."""
    temperature: float = Field(1.0, gt=0)
    """Logits are divided by it when sampling and in the loss."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Of sampling; null = megatron_training.seed."""


class GenerateConfig(Section):
    """`generate_config`: the rollout engine."""

    sampling_config: SamplingConfig = SamplingConfig()
    """How responses are sampled."""
    infer_tensor_parallel_size: int = Field(1, gt=0)
    """Processes that share each layer of the rollout engine."""
    enable_expert_parallel: bool = False
    """true: whole experts are dealt out over the processes of a rollout engine; false: each of them has a part of every expert."""
    infer_expert_parallel_size: int = Field(1, gt=0)
    """Tensor-parallel groups, with prompts of their own, that make up an engine and share its experts over all their processes."""
    limit_mm_image_per_prompt: int = Field(1, ge=0)
    """Pictures a prompt may hold."""
    trust_remote_code: bool = False
    """true: Python code in the model folder is run. No offered model needs it."""
    max_num_seqs: int = Field(64, gt=0)
    """Sequences the engine runs at a time."""
    max_model_len: int | None = Field(None, gt=0)
    """Tokens of prompt and response; null = max_prompt_length + max_tokens."""
    max_num_batched_tokens: int = Field(2048, gt=0)
    """Tokens of one engine step; raised to max_model_len where prompts may not be cut in pieces."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """null = as megatron_training.bf16 says, and it may not say anything else."""
    offload_train_param: bool = False
    """true: weights that are trained leave the device while others work there (not on CPU). The reference's always do."""
    offload_train_grad: bool = False
    """true: the memory of gradients is given back between updates."""
    offload_train_optimizer: bool = False
    """true: optimizer state leaves the device between updates."""
    weight_carrier: Literal["auto", "host", "device"] = "auto"
    """How weights reach the rollout engine: through the host's memory or the device's; auto: the device's where there is room for both."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of device memory (not on CPU)."""
    kv_cache_bytes: int = Field(256 * 2**20, gt=0)
    """KV cache on CPU."""
    enable_prefix_caching: bool = False
    """The prompt of a group is computed once."""
    enforce_eager: bool = True
    """false: graphs or compilation where the device has them."""


class EvalConfig(Section):
    """`eval`: accuracy on rows that are not trained on; without the section nothing is evaluated."""

    data_path: tuple[str, ...] | None = None
    """One file or a list: parquet, jsonl, json or the prefix of prepared columns, in the form that training reads."""
    interval: int | None = Field(None, gt=0)
    """Iterations between evaluations, which also follow the last one; null = after every save."""
    at_start: bool = False
    """true: also before the first iteration, logged as iteration 0."""
    n_samples_per_prompt: int = Field(1, gt=0)
    """Responses per prompt."""
    temperature: float | None = Field(None, ge=0)
    """0 = greedy; null = greedy for one sample per prompt, sampling_config.temperature for several."""
    held_out_rows: int | None = Field(None, gt=0)
    """dpo, instead of data_path: the last so many rows of megatron_training.data_path, which are then not trained on."""
    max_rows: int | None = Field(None, gt=0)
    """Of each file the first so many usable rows; null = all."""
    verifier_function: tuple[str, ...] | None = None
    """Verifiers that say what is right; null = those of rl_config."""

    @field_validator("data_path", "verifier_function", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Config(Section):
    """A checked user configuration."""

    name: str
    """Name of the YAML without its ending."""
    actor_config: MegatronConfig
    """`megatron_training`, overridden by what `actor_config` says."""
    critic_config: MegatronConfig
    """`megatron_training`, overridden by what `critic_config` says."""
    vit_config: MegatronConfig
    """`megatron_training`, overridden by what `vit_config` says; acts with rl_config.colocate_actor_and_vit."""
    rl_config: RLConfig
    generate_config: GenerateConfig
    eval: EvalConfig | None = None
    """None: no evaluation."""
    profiler_config: ProfilerConfig = ProfilerConfig()
    model: dict[str, Any]
    """Content of the model file; {} without one."""
    architecture: dict[str, Any]
    """Architecture keys among the megatron sections: compared with the Hugging Face config.json, never used."""
    folder: str
    """Folder of the YAML: relative paths of other configuration files are looked up there first."""
    notes: tuple[str, ...] = ()
    """One line per reason for which keys were accepted without acting."""
