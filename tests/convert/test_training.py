"""What mm-convert writes is what the trainer trains, and what the trainer saves is a Hugging Face model with the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoint.convert_cli import main
from tests.plans import train_plan

IDS = torch.tensor([8, 20, 21, 300, 31, 32, 41, 5, 77, 130, 200])
WAYS = {
    "tp1": [],
    "tp2 pp2": [
        "--cfg.parallel_config.llm_pp_layers=[1,1]",
        "--cfg.parallel_config.vit_pp_layers=[3,0]",
        "--cfg.parallel_config.tp_size=2",
    ],
}


def logits_of_hugging_face(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).float()
    with torch.no_grad():
        return model.eval()(IDS[None]).logits[0]


def logits(engine: Any) -> torch.Tensor:
    with torch.no_grad():
        return engine.policy.logits(engine.policy(IDS, engine.policy.layout([IDS], [[]])))


@pytest.fixture(scope="module")
def make_engine(tiny_vl: Path, one_rank: None) -> Callable[..., Any]:
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    return lambda load: MegatronTrainEngine(train_plan(tiny_vl, load=str(load)), False, False, publish_vision=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_converted_model_has_the_logits_of_its_source(way: str, tiny_vl: Path, make_engine: Callable[..., Any], tmp_path: Path) -> None:
    options = [f"--cfg.hf_config.hf_dir={tiny_vl}", f"--cfg.mm_dir={tmp_path / 'mm'}"]
    assert main(["hf_to_mm", *options, *WAYS[way]]) == 0
    torch.testing.assert_close(logits(make_engine(tmp_path / "mm")), logits_of_hugging_face(tiny_vl), atol=1e-5, rtol=0)


def test_a_trained_save_becomes_a_model_with_its_logits(tiny_vl: Path, make_engine: Callable[..., Any], tmp_path: Path) -> None:
    engine = make_engine(tiny_vl)
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    iteration = tmp_path / "save" / "iter_0000003"
    (iteration / "actor").mkdir(parents=True)
    engine.save(iteration / "actor")
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("3")
    options = [f"--cfg.mm_dir={tmp_path / 'save'}", f"--cfg.hf_config.hf_dir={tiny_vl}", f"--cfg.save_hf_dir={tmp_path / 'hf'}"]
    assert main(["mm_to_hf", *options]) == 0
    trained = logits_of_hugging_face(tmp_path / "hf")
    torch.testing.assert_close(trained, logits(engine), atol=1e-5, rtol=0)
    assert (trained - logits_of_hugging_face(tiny_vl)).abs().max() > 0.1
