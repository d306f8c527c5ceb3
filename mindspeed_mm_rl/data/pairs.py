"""Preference pairs, drawn as prompts are (see loader.py): the same prompt before a better and a worse response."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from typing import Any

from mindspeed_mm_rl.config.plan import DataPlan
from mindspeed_mm_rl.data.loader import RowLoader, Sizes
from mindspeed_mm_rl.data.pair_rows import IndexedPairs, PairColumns, PairRow
from mindspeed_mm_rl.data.prompts import PromptBuilder
from mindspeed_mm_rl.data.rows import BadRow, naming
from mindspeed_mm_rl.data.sources import open_rows
from mindspeed_mm_rl.types import ImageInput


@dataclass(frozen=True)
class Pair:
    """Example: Pair(7, prompt_ids=(5, 9, 9, 6), chosen_ids=(3, 2), rejected_ids=(4, 2), images=(image,), key="6f1e...")."""

    pair_id: int
    """Running count of pairs drawn in the run: unique over epochs."""
    prompt_ids: tuple[int, ...]
    """The rendered chat template, the assistant's turn opened, image tokens expanded."""
    chosen_ids: tuple[int, ...]
    """The better response, end token included."""
    rejected_ids: tuple[int, ...]
    images: tuple[ImageInput, ...]
    key: str
    """sha256 of token ids and pictures: the same pair has the same key wherever it stands."""


class PairLoader(RowLoader[PairRow, Pair]):
    """Pairs for preference training.

    Dropped and counted: prompts over max_prompt_length, and pairs over max_pair_length, the prompt and its longer response. Named by file
    and row, or with skip_bad_rows dropped and counted: an empty prompt or answer, equal answers, a missing picture, all else that is bad.
    """

    drawn_name = "pairs"
    rules = ("too_long", "empty", "equal", "missing_image", "bad_rows")

    def __init__(self, plan: DataPlan) -> None:
        columns = PairColumns(plan.prompt_key, plan.image_key)
        super().__init__(plan, PromptBuilder(plan), open_rows(plan.train_path, columns, IndexedPairs))

    def next_pairs(self, count: int, until: int | None = None) -> list[Pair]:
        """The next usable pairs; fewer where the stream's position `until` comes first. Raises as RowLoader._draw."""
        return self._draw(count, until)

    def _make(self, row: PairRow) -> Pair:
        prompt = self.builder.build(row)
        prompt_ids = tuple(self.builder.expanded(prompt))
        chosen_ids, rejected_ids = self._responses(row)
        content = (prompt_ids, chosen_ids, rejected_ids, tuple(image.key for image in prompt.images))
        key = hashlib.sha256(repr(content).encode()).hexdigest()
        return Pair(-1, prompt_ids, chosen_ids, rejected_ids, prompt.images, key)

    def _responses(self, row: PairRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
        with naming(row.where):
            chosen, rejected = (tuple(self.builder.response(answer)) for answer in (row.chosen, row.rejected))
            if chosen == rejected:
                raise BadRow("chosen and rejected are the same answer", "equal")
            return chosen, rejected

    def _numbered(self, made: Pair, number: int) -> Pair:
        return replace(made, pair_id=number)

    def _sizes(self, made: Pair) -> Sizes:
        return _sizes(len(made.prompt_ids), made.chosen_ids, made.rejected_ids)

    def _row_sizes(self, row: PairRow) -> Sizes:
        return _sizes(self.builder.length(row), *self._responses(row))

    @property
    def _bounds(self) -> Sizes:
        return self._plan.max_prompt_length, self._plan.max_pair_length or sys.maxsize

    def _too_long(self, files: str, shortest: Sizes) -> str:
        whole = f" and megatron_training.seq_length ({self._plan.max_pair_length})" if self._plan.max_pair_length else ""
        return (
            f"no pair of {files} fits into rl_config.max_prompt_length ({self._plan.max_prompt_length} tokens){whole}: the shortest has a"
            f" prompt of {shortest[0]}, {shortest[1]} with its longer answer; raise them or lower max_pixels ({self._plan.max_pixels})"
        )

    def _order(self) -> dict[str, tuple[str, Any]]:
        return super()._order() | {"row_slice": ("rows", list(self._plan.row_slice))}


def _sizes(prompt: int, chosen_ids: tuple[int, ...], rejected_ids: tuple[int, ...]) -> Sizes:
    return prompt, prompt + max(len(chosen_ids), len(rejected_ids))
