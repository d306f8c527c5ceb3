"""The engine's losses on pairs, their gradients and one training step against TRL's trainers, on the same model and pairs in float32.

TRL is looked for on the path: PYTHONPATH=FOLDER after `pip install --no-deps --target FOLDER trl accelerate`. Skipped without it.
"""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm_rl.algorithms.preference import PreferenceSettings, loss_of
from mindspeed_mm_rl.data.pairs import Pair
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.trainer.batch import batch_of_pairs
from tests.plans import optimizer_plan, train_plan
from tests.tiny import make_tiny_text

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not on the path (see the top of this file)")
RELATIVE = 1e-4
BETA, SMOOTHING, GAMMA, SUPERVISED = 0.3, 0.2, 0.4, 0.25
"""As in tests/trl_run.py, which can't be imported without TRL."""
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.01, "adam_beta2": 0.999, "clip_grad": 0.0}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    """Uneven in every length."""
    dice = random.Random(0)

    def ids(count: int) -> list[int]:
        return [dice.randrange(10, 300) for _ in range(count)]

    lengths = ((4, 3, 5), (17, 9, 2), (1, 1, 14), (8, 6, 6), (5, 21, 4))
    return [{"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in lengths]


@pytest.fixture(scope="module", params=["untied", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and a reference that is near it, as in training."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    policy = make_tiny_text(folder / "policy", tied=request.param == "tied")
    reference = transformers.AutoModelForCausalLM.from_pretrained(policy).float()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    reference.save_pretrained(folder / "reference")
    transformers.AutoTokenizer.from_pretrained(policy).save_pretrained(folder / "reference")
    return policy, folder / "reference"


@pytest.fixture(scope="module")
def of_trl(folders: tuple[Path, Path], pairs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trl")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    command = [sys.executable, "-m", "tests.trl_run", *map(str, folders), str(folder / "pairs.json"), str(folder / "out.pt")]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture
def engine(folders: tuple[Path, Path], one_rank: None) -> Iterator[Any]:
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    policy, reference = folders
    plan = train_plan(policy, reference_load=str(reference), temperature=1.0, optimizer=optimizer_plan(**OPTIMIZER))
    plan = replace(plan, rows_together=2, bans_markers=False, max_samples_per_micro_batch=4)
    yield MegatronTrainEngine(plan, with_reference=True, entropy_bonus=False, publish_vision=False)


def updated(engine: Any, pairs: list[dict[str, Any]], case: str) -> dict[str, float]:
    """Metrics of one update over all pairs, cut into micro-batches. case: a loss type, and _ftx for one with the supervised term."""
    drawn = [Pair(n, *(tuple(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")), (), "") for n, pair in enumerate(pairs)]
    batch, rows = batch_of_pairs(drawn), range(2 * len(drawn))
    batch = batch.with_column("ref_logprobs", engine.ref_logprobs(batch, rows, {}))
    loss_type, _, supervised = case.partition("_")
    # TRL's sigmoid has no label smoothing.
    settings = PreferenceSettings(loss_type, BETA, SMOOTHING if loss_type == "robust" else 0.0, GAMMA, SUPERVISED if supervised else 0.0)
    loss = loss_of(batch, settings)
    return engine.update(UpdateRequest(batch, rows, float(batch.loss_mask.values.sum()), float(len(batch))), {}, loss)


def by_name(engine: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from mindspeed_mm_rl.models.weight_layout import to_hf

    return dict(to_hf(tensors, engine.architecture.raw))


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    named = {name: parameter.main_grad for name, parameter in engine.policy.named_parameters()}
    return by_name(engine, {name: named[name].clone() for name in engine.policy.weights()})


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """||found - expected|| / ||expected||, the worst of all tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("case", ["sigmoid", "hinge", "ipo", "robust", "simpo", "orpo", "sigmoid_ftx"])
def test_loss_and_gradients_equal_trls(engine: Any, pairs: list[dict[str, Any]], of_trl: dict[str, Any], case: str) -> None:
    loss, expected = of_trl["gradients"][case]
    metrics = updated(engine, pairs, case)
    found = distance(gradients(engine), expected)
    print(f"{case}: loss {metrics['loss']:.7f}, TRL {loss:.7f}; gradients differ by {found:.1e}")
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert found <= RELATIVE


def test_a_training_step_equals_that_of_trls_trainer(engine: Any, pairs: list[dict[str, Any]], of_trl: dict[str, Any]) -> None:
    expected_gradients, expected_weights = of_trl["step"]
    before = {name: weight.clone() for name, weight in by_name(engine, engine.policy.weights()).items()}
    updated(engine, pairs, "sigmoid")
    after = by_name(engine, engine.policy.weights())
    of_gradients = distance(gradients(engine), expected_gradients)
    # Adam's first step is lr * g / (|g| + 1e-8): of gradients that are next to 0, the step is noise.
    clear = {name: (gradient == 0) | (gradient.abs() > 1e-5) for name, gradient in expected_gradients.items()}
    of_weights = max(float((after[name] - weight)[clear[name]].abs().max()) for name, weight in expected_weights.items())
    share = sum(int(mask.sum()) for mask in clear.values()) / sum(map(torch.numel, clear.values()))
    print(f"step: gradients differ by {of_gradients:.1e}; {share:.4f} of the weights are looked at and differ by {of_weights:.1e}")
    assert of_gradients <= RELATIVE
    assert of_weights <= 1e-3 * OPTIMIZER["lr"]
    assert share > 0.95 and min(float((after[name] - weight).abs().max()) for name, weight in before.items()) >= 0.9 * OPTIMIZER["lr"]
