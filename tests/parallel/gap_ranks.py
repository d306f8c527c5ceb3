"""One data-parallel rank of updates in which the rollout log-probs of the last rank's samples alone are wrong."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import torch

from mindspeed_mm_rl.types import Batch, Ragged
from tests.parallel.update_ranks import make_batch
from tests.plans import train_plan

BOUND = 0.1
FAULTS = {"none": 0.0, "gap": 0.5, "nan": float("nan")}
"""Added to one log-prob of the last sample."""


def run(rank: int, world: int, model: Path, address: str, folder: Path) -> None:
    """What every fault led to, and whether the weights moved, to folder/RANK.json."""
    from mindspeed_mm_rl.platforms import device

    device.adapt_megatron()
    device.set_threads(1)
    from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
    from mindspeed_mm_rl.engines.base import UpdateRequest
    from mindspeed_mm_rl.engines.megatron import process_groups
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    plan = train_plan(model, logprob_gap_bound=BOUND)
    process_groups.initialize(plan, rank, world, address)
    engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=False)
    loss = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.2))
    batch = replace(make_batch(), old_logprobs=None, ref_logprobs=None)
    share = list(range(len(batch)))[rank * len(batch) // world : (rank + 1) * len(batch) // world]
    seen = {}
    for fault in ("gap", "nan", "none"):
        request = UpdateRequest(_agreeing(engine, batch, FAULTS[fault]), share, float(batch.loss_mask.values.sum()), float(len(batch)))
        before = [parameter.detach().clone() for parameter in engine.policy.parameters()]
        try:
            engine.update(request, {}, loss)
            said = ""
        except RuntimeError as error:
            said = str(error)
        moved = any(not torch.equal(old, new) for old, new in zip(before, engine.policy.parameters(), strict=True))
        seen[fault] = (said, moved)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    process_groups.destroy()


def _agreeing(engine: object, batch: Batch, fault: float) -> Batch:
    logprobs = engine.logprobs(batch, range(len(batch)), {})
    flat = torch.cat([logprobs[sample_id] for sample_id in batch.sample_ids])
    flat[-1] += fault
    return replace(batch, rollout_logprobs=Ragged(flat, batch.responses.lengths))
