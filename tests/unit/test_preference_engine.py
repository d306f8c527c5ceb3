"""Preference losses in the train engine: gradients that don't depend on micro-batches, log-probs of the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mindspeed_mm_rl.algorithms.preference import PreferenceSettings, loss_of
from mindspeed_mm_rl.data.pairs import Pair
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.trainer.batch import batch_of_pairs
from mindspeed_mm_rl.types import Batch
from tests.plans import optimizer_plan, train_plan
from tests.tiny import make_tiny_text

RELATIVE = 1e-5
MakeEngine = Callable[..., "object"]
LOSSES = (PreferenceSettings("sigmoid", 0.5, pref_ftx=0.3), PreferenceSettings("ipo", 0.5), PreferenceSettings("orpo", 0.5))
LENGTHS = ((4, 7, 12), (9, 3, 3), (2, 15, 6), (5, 1, 8))
"""Of prompt, chosen and rejected response."""


@pytest.fixture(scope="module")
def make_engine(tiny_text: Path, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEngine]:
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    other = make_tiny_text(tmp_path_factory.mktemp("reference"), seed=5, tied=True)

    def make(**changes: object) -> MegatronTrainEngine:
        fields = {"temperature": 1.0, "bans_markers": False, "rows_together": 2, "reference_load": str(other)}
        plan = train_plan(tiny_text, optimizer=optimizer_plan(clip_grad=0.0), **fields | changes)
        return MegatronTrainEngine(plan, with_reference=True, entropy_bonus=False, publish_vision=False)

    yield make


@pytest.fixture(scope="module")
def pairs(make_engine: MakeEngine) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 200, (length,), generator=generator).tolist())

    drawn = [Pair(number, ids(prompt), ids(chosen), ids(rejected), (), "") for number, (prompt, chosen, rejected) in enumerate(LENGTHS)]
    batch = batch_of_pairs(drawn)
    return batch.with_column("ref_logprobs", make_engine().ref_logprobs(batch, range(len(batch)), {}))


def updated(engine: object, batch: Batch, settings: PreferenceSettings) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    request = UpdateRequest(batch, range(len(batch)), float(batch.loss_mask.values.sum()), float(len(batch)))
    metrics = engine.update(request, {}, loss_of(batch, settings))
    return {name: p.main_grad.clone() for name, p in engine.policy.named_parameters()}, metrics


def test_the_chosen_response_stands_first() -> None:
    batch = batch_of_pairs([Pair(3, (1, 2), (5, 6, 7), (8,), (), ""), Pair(4, (1,), (2,), (3, 4), (), "")])
    assert batch.sample_ids == (6, 7, 8, 9)
    assert [row.tolist() for row in batch.prompts.rows()] == [[1, 2], [1, 2], [1], [1]]
    assert [row.tolist() for row in batch.responses.rows()] == [[5, 6, 7], [8], [2], [3, 4]]


@pytest.mark.parametrize("settings", LOSSES, ids=lambda s: s.loss_type)
def test_gradients_do_not_depend_on_the_micro_batches(make_engine: MakeEngine, pairs: Batch, settings: PreferenceSettings) -> None:
    whole, metrics = updated(make_engine(), pairs, settings)
    assert all(gradient.norm() > 0 for gradient in whole.values())
    # One pair at a time, two, and a bound that every pair is over.
    for bounds in ({"max_samples_per_micro_batch": 2}, {"max_samples_per_micro_batch": 5}, {"max_tokens_per_micro_batch": 10}):
        parts, parts_metrics = updated(make_engine(**bounds), pairs, settings)
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() <= RELATIVE * gradient.norm(), (bounds, name)
        assert parts_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_log_probs_are_those_of_the_plain_model(make_engine: MakeEngine, pairs: Batch, tiny_text: Path) -> None:
    """Neither divided by a temperature nor with tokens taken out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_text).float()
    found = make_engine().logprobs(pairs, range(len(pairs)), {})
    for sample_id, prompt, response in zip(pairs.sample_ids, pairs.prompts.rows(), pairs.responses.rows(), strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(found[sample_id], expected, atol=1e-5, rtol=1e-5)
