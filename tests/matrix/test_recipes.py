"""Every algorithm through the whole loop: three iterations each, on-policy, so that old log-probs come where asked for alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.algorithms.recipes import ALGORITHMS
from mindspeed_mm_rl.models.weight_files import read_weights
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from tests.continuation import continuation_plan, picture_rows

pytestmark = pytest.mark.timeout(300)
KL_IN_REWARD = {"rloo", "reinforce_plus_plus"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_three_iterations(tiny_vl: Path, tmp_path: Path, algorithm: str) -> None:
    plan = continuation_plan(tiny_vl, picture_rows(tmp_path / "train.parquet"), tmp_path, num_devices=1)
    length = plan.rollout.max_tokens if algorithm == "dr_grpo" else 0
    recipe = replace(plan.recipe, algorithm=algorithm, kl_coef=0.05, kl_penalty="kl", loss_length=length)
    run = replace(
        plan.run,
        train_iters=3,
        samples_per_prompt=8,
        mini_batch_prompts=plan.recipe.train_prompts,
        epochs=1,
        on_policy=True,
        save_interval=1,
    )
    build.run(replace(plan, run=run, recipe=recipe, critic=plan.train if ALGORITHMS[algorithm].needs_critic else None))
    records = read_records(Path(run.output) / "metrics.jsonl")
    assert len(records) == 3
    for record in records:
        assert record["rollout/logprob_gap/max"] <= 1e-4
        assert (record["timing/old_log_p"] > 0) == (algorithm in KL_IN_REWARD)
    assert any(record["actor/grad_norm"] > 0 for record in records[:2])
    assert records[2]["actor/kl_loss"] != 0, "the policy has left the reference by the third iteration"
    before, after = (read_weights(Path(run.save) / f"iter_000000{step}" / "actor") for step in (1, 3))
    assert any(not tensor.equal(after[name]) for name, tensor in before.items())
