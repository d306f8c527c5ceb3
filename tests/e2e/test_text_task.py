"""The tiny text task from its YAML: rows, model, training and evaluation, as the launch script puts them together."""

from pathlib import Path

import pytest

from mindspeed_mm_rl.config.derive import make_plan
from mindspeed_mm_rl.config.load import load_config
from mindspeed_mm_rl.sinks import read_records
from mindspeed_mm_rl.trainer import build

RL = Path(__file__).resolve().parents[2] / "examples" / "rl"
SMALL = (
    "actor_config.load=quickstart/text/model/warm",
    "megatron_training.train_iters=2",
    "megatron_training.global_batch_size=8",
    "rl_config.n_samples_per_prompt=4",
    "rl_config.mini_batch_size=4",
    "eval.n_samples_per_prompt=2",
    "eval.max_rows=8",
)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows and a random model where the YAML looks for them."""
    monkeypatch.syspath_prepend(str(RL / "quickstart"))
    monkeypatch.chdir(tmp_path)
    import prepare_sums
    import sums
    import tiny_text_model

    sums.write_splits(prepare_sums.DATA, seed=0)
    tiny_text_model.write_model(prepare_sums.WARM, seed=0)
    return tmp_path


def test_two_iterations_of_the_tiny_text_yaml(prepared: Path) -> None:
    build.run(make_plan(load_config(RL / "configs/grpo_trainer_qwen25_tiny.yaml", SMALL)))
    output = prepared / "quickstart/text/logs/ray_grpo"
    records = read_records(output / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert [record.get("eval/chain_sum/num_prompts") for record in records] == [8, None, 8]
    for record in records[1:]:
        assert record["rollout/logprob_gap/max"] <= 1e-4
        assert (record["train/num_samples"], record["train/num_updates"]) == (32, 2)
    assert (output / "curves.png").is_file() and "chain_sum" in (output / "table.txt").read_text()
    assert (prepared / "quickstart/text/ckpt/ray_grpo/iter_0000002").is_dir()
