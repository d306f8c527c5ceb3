"""AdamW and the learning-rate schedule, both megatron's. The schedule's unit is one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_mm_rl.config.plan import OptimizerPlan
from mindspeed_mm_rl.platforms.compat import supported_arguments


def wrap_for_data_parallel(networks: Sequence[Any], plan: OptimizerPlan) -> list[Any]:
    """Megatron's DDP around each: gradients are summed over ranks in fp32, never averaged (the loss carries the global denominator)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=plan.overlap_grad_reduce,
        overlap_param_gather=plan.overlap_param_gather,
        use_distributed_optimizer=plan.use_distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    models = [
        # Of several virtual stages the later ones have no time left in which buckets would help.
        DistributedDataParallel(config=network.config, ddp_config=settings, module=network, disable_bucketing=stage > 0)
        for stage, network in enumerate(networks)
    ]
    check_buckets(models)
    return models


def check_buckets(models: Sequence[Any]) -> None:
    """Raises ValueError for a parameter that begins in the bucket before its own, as megatron-core 0.12 lays out an embedding on two
    stages: its part there would belong to two ranks."""
    for buffer in (buffer for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers)):
        for start, _, number in buffer.param_index_map.values():
            if start < (begin := buffer.buckets[number].offset):
                raise ValueError(
                    "this megatron-core can't share out the optimizer's state of an embedding that the first and the last pipeline stage "
                    f"both have: it begins at {start}, its bucket at {begin}. Set use_distributed_optimizer to false, "
                    "pipeline_model_parallel_size to 1, or take megatron-core 0.16"
                )


def build_optimizer(models: list[Any], plan: OptimizerPlan, dtype: torch.dtype) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = OptimizerConfig(
        optimizer="adam",
        lr=plan.lr,
        min_lr=plan.min_lr,
        weight_decay=plan.weight_decay,
        adam_beta1=plan.adam_beta1,
        adam_beta2=plan.adam_beta2,
        adam_eps=plan.adam_eps,
        clip_grad=plan.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=plan.use_distributed_optimizer,
        **supported_arguments(OptimizerConfig, {"overlap_param_gather": plan.overlap_param_gather}),
    )
    optimizer = get_megatron_optimizer(settings, models)
    for group in optimizer.param_groups:
        # torch's Adam otherwise steps all tensors at once on a GPU, with temporaries as large as one of its moments.
        group["foreach"] = False
    return optimizer


def ready_gradients(optimizer: Any) -> float:
    """Makes the gradients ready for `step`; returns their norm over all ranks of the network."""
    if optimizer.prepare_grads():
        raise RuntimeError("the optimizer skipped a step: the gradient is not finite")
    return float(optimizer.get_grad_norm())


def step(optimizer: Any, clip_grad: float, grad_norm: float) -> None:
    """grad_norm: of all that is clipped together, which may be more than this optimizer's network."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and clip_grad:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    if not optimizer.step_with_ready_grads():
        raise RuntimeError(f"the optimizer skipped a step: the gradient is not finite (norm {grad_norm})")


def build_schedule(optimizer: Any, plan: OptimizerPlan) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=plan.lr,
        min_lr=plan.min_lr,
        lr_warmup_steps=plan.warmup_updates,
        # One more than there are: the last update would otherwise be made with min_lr, which is usually 0.
        lr_decay_steps=plan.decay_updates + 1,
        lr_decay_style=plan.lr_decay_style,
        start_wd=plan.weight_decay,
        end_wd=plan.weight_decay,
        wd_incr_steps=plan.decay_updates,
        wd_incr_style="constant",
        # A save gives the position alone: with its own end a run that is prolonged would go on at min_lr.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
