"""PPO through the whole loop: critic and actor in turns, a KL term in the reward, one save for both, warm-up, a critic that dies."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mindspeed_mm_rl.config.plan import Plan
from mindspeed_mm_rl.models.weight_files import read_weights
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build
from mindspeed_mm_rl.trainer.ending import RunFailed
from mindspeed_mm_rl.workers import group
from tests.chaos.processes import MARKER, Footprint
from tests.continuation import check_same, continuation_plan, picture_rows, ppo_with_kl, resumed_from, straight
from tests.data_files import row, write_rows
from tests.e2e.planted import DyingCritic
from tests.offload_phases import EVERYTHING
from tests.plans import whole_plan

NAMES = (
    *(f"critic/{name}" for name in ("vf_loss", "vf_clipfrac", "values_mean", "explained_variance", "grad_norm", "lr")),
    *(f"critic/{name}/{kind}" for name in ("score", "rewards", "values", "returns", "advantages") for kind in ("mean", "max", "min")),
    "timing/critic_model",
    "timing/update_critic",
    "ppo/score/mean",
)


def text_plan(folder: Path, tmp_path: Path) -> Plan:
    """One sample per prompt; rewards differ by the lengths of responses alone."""
    rows = write_rows(tmp_path / "train.parquet", [row(text=f"Is it {number}?", images=[], answer=str(number)) for number in range(12)])
    plan = whole_plan(folder, rows, tmp_path)
    return replace(
        plan,
        run=replace(plan.run, samples_per_prompt=1),
        reward=replace(plan.reward, overlong_buffer=20),
        recipe=replace(plan.recipe, algorithm="ppo"),
        critic=plan.train,
    )


def test_a_stop_and_state_that_leaves_the_device_change_nothing_on_pictures(tiny_vl: Path, tmp_path: Path) -> None:
    rows = picture_rows(tmp_path / "train.parquet")

    def plan(name: str) -> Plan:
        whole = ppo_with_kl(continuation_plan(tiny_vl, rows, tmp_path / name, 1))
        return replace(whole, run=replace(whole.run, train_iters=2, save_interval=1))

    one = straight(plan("straight"))
    resumed = plan("resumed")
    resumed = replace(resumed, **{role: replace(getattr(resumed, role), offload=EVERYTHING) for role in ("train", "critic")})
    other = resumed_from(plan("straight"), resumed, 1, one.batches)
    check_same(one, other)
    moved, stayed = (result.records[-1] for result in (other, one))
    assert all(moved[f"timing/{name}"] > 0 for name in ("onload", "offload", "ref_onload", "ref_offload"))
    assert stayed["timing/ref_onload"] == stayed["timing/ref_offload"] == 0
    working = ("image_embeds", "rollout", "reference_model", "old_log_p", "critic_model", "update_critic", "update", "resharding_to_infer")
    assert {name for name in moved if name.startswith("memory/")} == {f"memory/{phase}/peak_gb" for phase in working}
    assert all(0.1 < record[f"memory/{phase}/peak_gb"] < 8 for record in (moved, stayed) for phase in working)
    for record in one.records:
        assert set(NAMES) <= record.keys()
        assert record["rollout/logprob_gap/max"] <= 1e-4
        phases = ("rollout", "old_log_p", "update", "reference_model", "resharding_to_infer", "critic_model", "update_critic")
        assert record["timing/all"] >= sum(record[f"timing/{phase}"] for phase in phases)
        assert all(record[f"timing/{phase}"] > 0 for phase in phases)
    first, second = one.records
    # A new head is zero, so that values are, and returns are the reward, less of it the further off; afterwards the critic speaks.
    one_step_back = plan("straight").recipe.lam
    assert first["critic/values/min"] == first["critic/values/max"] == first["critic/explained_variance"] == 0
    longest = plan("straight").rollout.max_tokens
    assert first["critic/returns/min"] == first["critic/score/min"] == -1
    assert first["critic/returns/max"] == pytest.approx(-(one_step_back ** (longest - 1)), rel=1e-5)
    assert second["critic/values/min"] < second["critic/values/max"] and second["critic/vf_loss"] > 0
    # The policy began as the reference: there was no KL to take off the rewards, less than the target, then there was more.
    assert first["actor/kl_in_reward"] == pytest.approx(0, abs=1e-6) and abs(second["actor/kl_in_reward"]) > 1e-5
    assert first["actor/kl_coef"] == 0.05 and second["actor/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 100))
    assert first["actor/lr"] != first["critic/lr"]


def test_two_devices_warm_up_the_critic_alone(tiny_text: Path, tmp_path: Path) -> None:
    plan = text_plan(tiny_text, tmp_path)
    plan = replace(plan, run=replace(plan.run, num_devices=2, save_interval=1, critic_warmup=1))
    build.run(plan)
    first, second = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert (first["train/num_updates"], second["train/num_updates"]) == (0, 2)
    assert first["critic/grad_norm"] > 0 and second["actor/grad_norm"] > 0
    assert not {"actor/grad_norm", "rollout/logprob_gap/max"} & first.keys(), "what was not measured is not said"
    saves = [tmp_path / "save" / f"iter_{iteration:07d}" for iteration in (1, 2)]
    (actor, later_actor), (critic, later_critic) = ([read_weights(save / name) for save in saves] for name in ("actor", "critic"))
    name = "text_decoder.decoder.layers.0.mlp.linear_fc2.weight"
    down = "model.layers.0.mlp.down_proj.weight"
    assert actor[name].equal(read_weights(tiny_text)[down]) and not actor[name].equal(later_actor[name])
    assert not critic[name].equal(later_critic[name]) and not critic[name].equal(actor[name])


def test_a_critic_that_dies_ends_the_run_in_one_sentence(tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "CriticWorker", DyingCritic)
    monkeypatch.setenv(MARKER, tmp_path.name)
    # Other tests in this process have clusters of their own.
    before = _sessions()
    with pytest.raises(RunFailed, match=r"critic rank 0 \(pid \d+ on .*\) died in values of the critic: killed by signal 9 \(SIGKILL\)"):
        build.run(text_plan(tiny_text, tmp_path))
    assert not Footprint(tmp_path.name, set()).processes()
    assert _sessions() <= before


def _sessions() -> set[Path]:
    """Files of Ray clusters that this process has started."""
    return set(Path("/tmp/ray").glob(f"session_*_{os.getpid()}"))
