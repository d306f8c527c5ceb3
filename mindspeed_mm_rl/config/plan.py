"""All values that a run works with, derived once from the user's configuration, frozen, and printed at the start.

Everything below the configuration reads these dataclasses, never the user's sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mindspeed_mm_rl.platforms.profiling import TraceSettings

Dtype = Literal["float32", "bfloat16"]
OffloadPart = Literal["param", "grad", "optimizer", "reference"]


@dataclass(frozen=True)
class OptimizerPlan:
    lr: float
    min_lr: float
    lr_decay_style: Literal["constant", "linear", "cosine"]
    warmup_updates: int
    """Optimizer steps of linear warm-up from 0."""
    decay_updates: int
    """Optimizer steps of the whole run; min_lr is what the one after the last would have."""
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float
    """Global gradient norm; 0 = no clipping."""
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool = False
    """Gradients are summed over ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Parameters are collected while the forward pass already runs; needs the distributed optimizer."""


@dataclass(frozen=True)
class TrainPlan:
    """The megatron engine of the actor, or of the critic."""

    hf_path: str
    """Folder with config.json, tokenizer and preprocessor_config.json: the architecture."""
    load: str
    """Weights: Hugging Face folder, mm-convert output, or a training save (recognised by content)."""
    reference_load: str
    """Weights of the KL reference: the same kinds of folder."""
    dtype: Dtype
    seed: int
    freeze_vision: bool
    freeze_projector: bool
    tensor_parallel_size: int
    pipeline_parallel_size: int
    context_parallel_size: int
    expert_parallel_size: int
    sequence_parallel: bool
    max_tokens_per_micro_batch: int
    """Packed tokens of one micro-batch; a single longer sample still gets a micro-batch of its own."""
    max_samples_per_micro_batch: int
    """0 = no bound but the tokens."""
    temperature: float
    """Logits are divided by it: the one policy of trainer and rollout engine."""
    min_pixels: int
    max_pixels: int
    recompute: Literal["full", "selective"] | None
    """What is run again in the backward pass instead of being kept: layers, or only the attention within them; None: nothing."""
    deterministic: bool
    optimizer: OptimizerPlan
    no_load_optim: bool
    no_load_rng: bool
    finetune: bool
    """True: `load` gives weights only, also where it is a training save."""
    timeout_seconds: float
    threads: int
    """Intra-op threads of the process; 0 = leave torch's choice."""
    logprob_gap_bound: float
    """The run stops before the optimizer step when a token's |trainer - rollout| log-prob exceeds it; 0 = no bound."""
    pipeline_layers: tuple[tuple[int, ...], ...] = ()
    """Text layers by virtual stage, then by pipeline rank, as ((14, 14),); empty = one virtual stage, split evenly."""
    context_parallel_algorithm: Literal["ulysses", "all_gather"] = "ulysses"
    """How attention sees whole sequences: heads are exchanged for tokens, or keys and values are collected."""
    expert_tensor_parallel_size: int = 1
    """Processes that share each expert."""
    with_vision: bool = True
    """False: pictures come encoded, from workers of their own; the network has no vision encoder."""
    rows_together: int = 1
    """Neighbouring rows of a batch that a micro-batch never tears apart: 2 where they are pairs."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of full: every layer, or the first recompute_num_layers of each (virtual) stage."""
    recompute_num_layers: int = 1
    """Of uniform: layers of which only the first one's input is kept."""
    offload: tuple[OffloadPart, ...] = ()
    """What leaves the device while nobody needs it; on CPU, whose memory is one, it is only moved about."""
    reference_key: str = "rl_config.integrated_mode_config.ref_model_load_path"
    """Where a user names the reference."""
    bans_markers: bool = True
    """The rollout engine never samples image and video markers, so they have no probability; False where responses are given."""
    trace: TraceSettings | None = None
    """Of the actor's processes."""

    def replicas(self, world_size: int) -> int:
        """Copies of the network among so many ranks; each sees samples of its own."""
        return world_size // (self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size)

    def replica(self, rank: int, world_size: int) -> int:
        """The copy that a rank is part of: megatron counts tensor, context, data and pipeline parallel ranks, the first fastest."""
        return rank // (self.tensor_parallel_size * self.context_parallel_size) % self.replicas(world_size)


@dataclass(frozen=True)
class RolloutPlan:
    """The vLLM engine."""

    hf_path: str
    dtype: Dtype
    seed: int
    temperature: float
    max_tokens: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_bytes: int
    """Size of the KV cache on CPU, where no share of device memory can be asked for."""
    enforce_eager: bool
    enable_prefix_caching: bool
    max_images_per_prompt: int
    image_embeds: bool
    """True: pictures arrive as ImageFeatures of the trainer's frozen vision encoder; False: as pixels."""
    min_pixels: int
    max_pixels: int
    tensor_parallel_size: int
    trust_remote_code: bool
    threads: int
    timeout_seconds: float
    expert_parallel: bool = False
    """True: whole experts are dealt out over the processes of an engine; False: each process has a part of every expert."""
    weight_carrier: Literal["host", "device"] = "host"
    """How the trainer's weights come: by a file in the host's memory, or through memory of the device, where each process shares one with a
    trainer."""
    data_parallel_size: int = 1
    """Tensor-parallel groups of one engine, which share the experts; each has prompts of its own."""

    @property
    def num_ranks(self) -> int:
        """Processes of one engine."""
        return self.tensor_parallel_size * self.data_parallel_size


@dataclass(frozen=True)
class DataPlan:
    train_path: str
    """Parquet file, or a folder that holds train.parquet."""
    hf_path: str
    seed: int
    shuffle: bool
    max_prompt_length: int
    """Longer prompts (after image expansion) are dropped and counted."""
    min_pixels: int
    max_pixels: int
    max_images_per_prompt: int
    num_workers: int
    """Threads that decode and resize pictures ahead of their use."""
    skip_bad_rows: bool
    """True: a corrupt row is skipped and counted; False: it ends the run, named by file and row."""
    prompt_key: str
    image_key: str
    trust_remote_code: bool
    max_pair_length: int = 0
    """Of preference pairs, tokens of the prompt and the longer answer; longer pairs are dropped and counted; 0 = no bound."""
    row_slice: tuple[int | None, int | None] = (None, None)
    """The rows that are drawn, as Python slices: (None, -50) leaves out the last 50 of the data, (-50, None) is those."""


@dataclass(frozen=True)
class RewardPlan:
    verifiers: tuple[str, ...]
    weights: tuple[float, ...]
    overlong_buffer: int
    """Tokens before max_tokens in which the penalty grows from 0 to its factor; 0 = no penalty."""
    overlong_penalty_factor: float
    max_tokens: int
    workers: int
    timeout_seconds: float
    """Bound for grading one sample; over it the sample is graded wrong and counted."""
    by_source: tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...] = ()
    """(data_source, verifiers, weights) of the rows that don't go by `verifiers`."""
    reward_model: str = ""
    """Folder of the sequence classifier that scores as `reward_model`; empty = none."""
    reward_model_timeout: float = 120.0
    """Seconds for the samples of one prompt."""


@dataclass(frozen=True)
class EvalPlan:
    data: tuple[str, ...]
    """Files, or prefixes of prepared columns."""
    interval: int
    """Iterations; there is one after the last iteration too."""
    at_start: bool
    samples_per_prompt: int
    temperature: float
    """0.0 = greedy."""
    max_rows: int
    """Of each file; 0 = all."""
    reward: RewardPlan
    """What says right or wrong; without penalties for length."""
    held_out_rows: int = 0
    """Above 0: of the file in `data`, which is that of training, the last so many rows."""


@dataclass(frozen=True)
class RecipePlan:
    algorithm: Literal[
        "grpo", "dapo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gspo", "cispo", "ppo", "dpo"
    ]
    clip_ratio_low: float
    clip_ratio_high: float
    token_level_loss: bool
    kl_penalty: Literal["kl", "abs", "mse", "low_var_kl"]
    kl_coef: float
    """0 = no KL term and no reference model."""
    kl_ctrl_type: Literal["fixed", "adaptive"]
    kl_target: float
    kl_horizon: float
    entropy_coeff: float
    rollout_is_cap: float
    """Cap of the truncated importance weight exp(old - rollout); 0 = off."""
    filter_groups: bool
    filter_metric: str
    """Verifier name, or `accuracy`, or `score`."""
    filter_max_batches: int
    """Generation batches per iteration; <= 0 = no limit."""
    train_prompts: int
    """Prompts that one iteration trains on."""
    loss_length: int
    """Dr. GRPO divides each response's sum by it; 0 = by numbers of tokens."""
    use_kl_in_reward: bool
    gamma: float
    lam: float
    advantage_whiten: bool
    cliprange_value: float


@dataclass(frozen=True)
class PreferencePlan:
    """What is learned from pairs of responses."""

    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"]
    beta: float
    label_smoothing: float
    simpo_gamma: float
    pref_ftx: float
    """Weight of the supervised term on the chosen response."""
    cache_reference: bool
    """True: log-probs of the reference are computed once for each pair and kept in the output folder."""

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in ("simpo", "orpo")


@dataclass(frozen=True)
class RunPlan:
    train_iters: int
    prompts_per_generation: int
    """Prompts drawn at a time (global_batch_size)."""
    samples_per_prompt: int
    mini_batch_prompts: int
    epochs: int
    """Passes over one rollout batch."""
    shuffle_mini_batch: bool
    on_policy: bool
    """One mini-batch and one epoch: the old log-probs are the detached current ones."""
    save: str
    """Folder of the saves; empty = no saves."""
    save_interval: int
    keep_last: int
    """Saves to keep; 0 = all."""
    resume: str
    """auto (continue the save that `save` names), off, or the path of a training save."""
    output: str
    """Folder for metrics.jsonl, tensorboard, table and picture."""
    num_devices: int
    device: Literal["cpu", "cuda", "npu"]
    timeout_seconds: float
    use_tensorboard: bool
    log_max_throughput: bool
    seed: int
    no_shared_storage: bool = False
    """Folders of several nodes are their own: saves are collected on the driver's, and brought to the others to be continued."""
    critic_warmup: int = 0
    """Iterations at the start that train the critic alone."""

    def saves_after(self, iteration: int) -> bool:
        """Whether there is a save of it; of 0, before the first, there is none."""
        return bool(self.save) and iteration > 0 and (iteration % self.save_interval == 0 or iteration == self.train_iters)


@dataclass(frozen=True)
class Plan:
    run: RunPlan
    train: TrainPlan
    rollout: RolloutPlan
    data: DataPlan
    reward: RewardPlan
    recipe: RecipePlan
    runtime_env: tuple[tuple[str, str], ...]
    """Environment variables that the user asks for in every worker."""
    notes: tuple[str, ...]
    """One line per user's key that was accepted and derived, for the printed plan."""
    eval: EvalPlan | None = None
    """None: nothing is evaluated."""
    critic: TrainPlan | None = None
    """None: the algorithm has no critic."""
    vision: TrainPlan | None = None
    """Vision-encoder workers on the actor's devices, with a layout and weights of their own; None: the actor's first stage encodes."""
    preference: PreferencePlan | None = None
    """Training on pairs of responses: nothing is sampled or graded, so `rollout`, `reward` and `recipe` have no say. None: on prompts."""

    @property
    def reference_key(self) -> str:
        return self.train.reference_key

    @property
    def needs_reference(self) -> bool:
        """Whether frozen weights are compared with."""
        return self.preference.needs_reference if self.preference else self.recipe.kl_coef != 0
