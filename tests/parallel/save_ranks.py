"""One rank of runs that save under one layout and go on under another: run by `test_save_layouts.py` in processes of its own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.layout_ranks import many_buckets
from tests.parallel.update_ranks import make_batch
from tests.plans import optimizer_plan, train_plan

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "dp2": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "tp2_sharded_optimizer": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 2, "use_distributed_optimizer": True},
    "ep2": {"expert_parallel_size": 2},
    "tp2_experts": {"tensor_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    "vpp2": {"pipeline_parallel_size": 2, "pipeline_layers": ((1, 1), (1, 1))},
}
STEPS = 2


def run(rank: int, world: int, model: Path, folder: Path, jobs: list[tuple[str, str | None, str | None]], load: Path | None = None) -> None:
    """jobs: (layout, save to begin with, save to make halfway). load: weights, else those of `model`.

    Metrics of every job's updates, on the last rank, to folder/answers.pt.
    """
    from mindspeed_mm_rl.platforms import device

    device.adapt_megatron()
    device.set_threads(1)
    many_buckets()
    import torch

    answers = []
    for number, (layout, begin, made) in enumerate(jobs):
        store = dist.FileStore(str(folder / f"store_{jobs[0]}_{number}"), world)
        answers.append(_job(rank, world, model, load or model, store, LAYOUTS[layout], begin and folder / begin, made and folder / made))
    if rank == world - 1:
        torch.save(answers, folder / "answers.pt")


def _job(
    rank: int, world: int, model: Path, load: Path, store: dist.Store, layout: dict[str, Any], begin: Path | None, made: Path | None
) -> list[dict[str, float]]:
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
    from mindspeed_mm_rl.data.packing import balanced_rows
    from mindspeed_mm_rl.engines.base import UpdateRequest
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    layout = dict(layout)
    switches = {key: layout.pop(key) for key in ("use_distributed_optimizer", "overlap_grad_reduce") if key in layout}
    optimizer = optimizer_plan(adam_eps=1e-6, **switches)
    plan = train_plan(model, load=str(load), max_samples_per_micro_batch=3, optimizer=optimizer, **layout)
    process_groups.initialize(plan, rank, world, store)
    engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=False)
    batch = make_batch()
    rows = balanced_rows(batch.total_lengths(), 2, plan.replicas(world))[plan.replica(rank, world)]
    request = UpdateRequest(batch, rows, float(batch.loss_mask.values.sum()), float(len(batch)))
    loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28, kl_coef=0.01))
    metrics = []
    if begin is not None:
        engine.load(begin)
    if made is not None:
        metrics += [engine.update(request, {}, loss) for _ in range(STEPS)]
        if rank == 0:
            made.mkdir()
        dist.barrier()
        engine.save(made)
    metrics += [engine.update(request, {}, loss) for _ in range(STEPS)]
    process_groups.destroy()
    return metrics
