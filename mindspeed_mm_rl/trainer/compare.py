"""Pairs to a batch with everything that a preference loss compares.

pairs --> two samples each --reference, where it isn't known yet--> ref_logprobs
  '-pictures--> frozen vision encoder --features--> reference, update, evaluation    (of a trained one pixels)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.algorithms.preference import PreferenceSettings
from mindspeed_mm_rl.data.pairs import Pair
from mindspeed_mm_rl.metrics import Stopwatch
from mindspeed_mm_rl.trainer.batch import batch_of_pairs
from mindspeed_mm_rl.trainer.pictures import SharedPictures
from mindspeed_mm_rl.trainer.reference_cache import PairLogprobs, ReferenceCache, cache_folder
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.types import Batch
from mindspeed_mm_rl.workers.group import Trainers


@dataclass(frozen=True)
class Compared:
    batch: Batch
    images: list[Any]
    """Object refs of tables of pictures."""
    num_pictures: int
    """Distinct ones."""
    num_encoded: int
    num_referred: int
    """Pairs that the reference was run on."""


class Comparer:
    def __init__(self, state: RunState, trainers: Trainers) -> None:
        plan, reference = state.plan, state.start.reference
        self.plan, self.trainers = plan, trainers
        cached = reference is not None and plan.preference.cache_reference
        self.cache = ReferenceCache(cache_folder(Path(plan.run.output), plan.train, reference.digest)) if cached else None

    @property
    def settings(self) -> PreferenceSettings:
        chosen = self.plan.preference
        return PreferenceSettings(chosen.loss_type, chosen.beta, chosen.label_smoothing, chosen.simpo_gamma, chosen.pref_ftx)

    def compared(self, pairs: Sequence[Pair], clock: Stopwatch) -> Compared:
        frozen = self.plan.train.freeze_vision and self.plan.train.freeze_projector
        pictures = SharedPictures(self.trainers.encoder if frozen else None)
        with clock.measure("image_embeds"):
            images = pictures.of(pairs)
        batch, num_referred = batch_of_pairs(pairs), 0
        if self.plan.needs_reference:
            with clock.measure("reference_model"):
                batch, num_referred = self._with_reference(batch, [pair.key for pair in pairs], images)
        return Compared(batch, images, pictures.num_distinct, pictures.num_encoded, num_referred)

    def _with_reference(self, batch: Batch, keys: list[str], images: list[Any]) -> tuple[Batch, int]:
        known = {} if self.cache is None else {key: self.cache.get(key) for key in keys if key in self.cache}
        unknown = [number for number, key in enumerate(keys) if key not in known]
        if unknown:
            asked = batch.select([2 * number + k for number in unknown for k in range(2)])
            found = self.trainers.actor.ref_logprobs(asked, images)
            known |= {keys[number]: tuple(found[sample_id] for sample_id in _ids(batch, number)) for number in unknown}
            self._remember({keys[number]: known[keys[number]] for number in unknown})
        logprobs = {sample_id: known[key][k] for number, key in enumerate(keys) for k, sample_id in enumerate(_ids(batch, number))}
        return batch.with_column("ref_logprobs", logprobs), len(unknown)

    def _remember(self, logprobs: dict[str, PairLogprobs]) -> None:
        if self.cache is not None:
            for key, of_pair in logprobs.items():
                self.cache.add(key, of_pair)

    def flush(self) -> None:
        """Puts what the reference said on disk."""
        if self.cache is not None:
            self.cache.flush()


def _ids(batch: Batch, number: int) -> tuple[int, ...]:
    """Sample ids of a pair: of its chosen and of its rejected response."""
    return batch.sample_ids[2 * number : 2 * number + 2]
