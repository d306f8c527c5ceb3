"""AdamW and the learning-rate schedule, both megatron's. The schedule's unit is one optimizer step."""

from __future__ import annotations

from typing import Any

import torch

from mindspeed_mm_rl.config.plan import OptimizerPlan


def wrap_for_data_parallel(policy: Any, plan: OptimizerPlan) -> Any:
    """Megatron's DDP: gradients are summed over ranks in fp32, never averaged (the loss carries the global denominator)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=plan.use_distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    return DistributedDataParallel(config=policy.config, ddp_config=settings, module=policy)


def build_optimizer(model: Any, plan: OptimizerPlan, dtype: torch.dtype) -> Any:
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
    )
    return get_megatron_optimizer(settings, [model])


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
