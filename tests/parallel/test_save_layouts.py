"""A save belongs to no layout: a run goes on under another one as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.convert import converting
from tests.parallel.save_ranks import STEPS, run
from tests.tiny import make_tiny_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that don't fit the ends of megatron's buckets, which are then padded."""
    return make_tiny_text(tmp_path_factory.mktemp("four_layers"), layers=4, tied=True, hidden=68, heads=2, intermediate=98)


def test_goes_on_under_another_layout(model: Path, tmp_path: Path):
    jobs = [("tp2", None, "of_tp2"), ("pp2", "of_tp2", None), ("vpp2", "of_tp2", None)]
    jobs += [("dp2", None, "of_dp2"), ("tp2_sharded_optimizer", "of_dp2", None)]
    torch.multiprocessing.spawn(run, args=(2, model, tmp_path, jobs), nprocs=2)
    by_tp2, pp2, vpp2, by_dp2, tp2 = torch.load(tmp_path / "answers.pt", weights_only=True)
    for straight, resumed in ((by_tp2, pp2), (by_tp2, vpp2), (by_dp2, tp2)):
        assert len(straight) == 2 * STEPS and len(resumed) == STEPS
        for expected, found in zip(straight[STEPS:], resumed, strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert resumed[0]["grad_norm"] != pytest.approx(straight[0]["grad_norm"], rel=1e-2), "the save was not taken"


def test_converted_files_of_two_ranks_train_on_two(model: Path, tmp_path: Path):
    split = {"llm_pp_layers": [[4]], "vit_pp_layers": [[0]], "tp_size": 2}
    options = {"mm_dir": tmp_path / "mm", "hf_config.hf_dir": model} | {f"parallel_config.{key}": value for key, value in split.items()}
    assert converting.run("hf_to_mm", **options) == 0
    answers = []
    for load in (None, tmp_path / "mm"):
        torch.multiprocessing.spawn(run, args=(2, model, tmp_path, [("tp2", None, None)], load), nprocs=2)
        answers.append(torch.load(tmp_path / "answers.pt", weights_only=True))
        for store in tmp_path.glob("store_*"):
            store.unlink()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("layout", ["ep2", "tp2_experts"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_save_of_dealt_experts_is_exported(family: str, layout: str, tmp_path: Path):
    """The step behind the save reports the same loss when its weights come back as a Hugging Face folder."""
    model = make_tiny_text(tmp_path / "model", family=family)
    torch.multiprocessing.spawn(run, args=(2, model, tmp_path, [(layout, None, "save")]), nprocs=2)
    [straight] = torch.load(tmp_path / "answers.pt", weights_only=True)
    split = {"llm_pp_layers": [2], "vit_pp_layers": [0], "tp_size": 1}
    options = {"save_hf_dir": tmp_path / "hf", "mm_dir": tmp_path / "save", "hf_config.hf_dir": model}
    assert converting.run("mm_to_hf", **options, **{f"parallel_config.{key}": value for key, value in split.items()}) == 0
    torch.multiprocessing.spawn(run, args=(1, model, tmp_path, [("one", None, None)], tmp_path / "hf"), nprocs=1)
    [exported] = torch.load(tmp_path / "answers.pt", weights_only=True)
    expected = {name: value for name, value in straight[STEPS].items() if name != "lr"}
    assert {name: exported[0][name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_an_optimizer_of_another_form_is_refused(tmp_path: Path, one_rank: None):
    from mindspeed_mm_rl.engines.megatron.saves import OptimizerForm

    OptimizerForm(True, False).check(None, tmp_path)
    OptimizerForm(True, False).check({"use_distributed_optimizer": True, "has_expert_ranks": False}, tmp_path)
    with pytest.raises(ValueError, match=r"use_distributed_optimizer false, this run has true.*no_load_optim"):
        OptimizerForm(True, False).check({"use_distributed_optimizer": False, "has_expert_ranks": False}, tmp_path)
