"""Prompts in a reproducible order with an exact position.

stream position 0, 1, 2, ... (epoch = position // rows, row = permutation of that epoch)
  -> worker threads build prompts, a window ahead of the reader
  -> next_prompts: kept prompts get the next prompt_id; dropped rows only move the position
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from tqdm import tqdm

from mindspeed_mm_rl.config.plan import DataPlan
from mindspeed_mm_rl.data.prompts import PromptBuilder
from mindspeed_mm_rl.data.sources import open_rows
from mindspeed_mm_rl.types import Prompt

_AHEAD_BYTES = 2**30
"""Bound on the pixels of pictures that are decoded before they are asked for."""


@dataclass(frozen=True)
class ScanReport:
    """What a look at every row found. Example: ScanReport(500, 497, 2, ("train.parquet, row 7: an image is corrupt (...)",), 803)."""

    rows: int
    usable: int
    too_long: int
    bad_rows: tuple[str, ...]
    """One sentence each, naming file and row."""
    longest_prompt: int
    """Tokens of the longest prompt, image tokens expanded; over max_prompt_length where rows are too long."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """data_source -> rows of it that aren't bad."""


class PromptLoader:
    """Draws prompts from the rows of a file without end, epoch after epoch.

    Raises ValueError when it is made for input that no row can mend: paths, columns, tokenizer, pixel bounds.
    """

    def __init__(self, plan: DataPlan) -> None:
        self._plan = plan
        self.builder = PromptBuilder(plan)
        self.rows = open_rows(plan.train_path, plan.prompt_key, plan.image_key, self.builder.decode)
        self._position = 0
        self._prompts_drawn = 0
        self._dropped: Counter[str] = Counter()
        self._pending: deque[Future[Prompt | ValueError]] = deque()
        self._pool = ThreadPoolExecutor(max(1, plan.num_workers), thread_name_prefix="prompts")
        self._digests: dict[str, str] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """rows: taken from the stream; prompts: given out; too_long, bad_rows: dropped on the way."""
        return {
            "rows": self._position,
            "prompts": self._prompts_drawn,
            "too_long": self._dropped["too_long"],
            "bad_rows": self._dropped["bad_rows"],
        }

    def next_prompts(self, k: int, until: int | None = None) -> list[Prompt]:
        """The next k usable prompts; fewer where the stream's position `until` comes first.

        Raises ValueError naming file and row for a bad row (unless plan.skip_bad_rows), and when two passes over the data give none.
        """
        prompts: list[Prompt] = []
        fruitless = _Fruitless()
        while len(prompts) < k and (until is None or self._position < until):
            self._look_ahead(k - len(prompts))
            built = self._pending[0].result()
            if isinstance(built, ValueError) and not self._plan.skip_bad_rows:
                raise built
            self._pending.popleft()
            self._position += 1
            if isinstance(built, Prompt) and built.expanded_length <= self._plan.max_prompt_length:
                prompts.append(replace(built, prompt_id=self._prompts_drawn))
                self._prompts_drawn += 1
                fruitless = _Fruitless()
                continue
            self._dropped["too_long" if isinstance(built, Prompt) else "bad_rows"] += 1
            fruitless.add(built.expanded_length if isinstance(built, Prompt) else built)
            # Twice: the only usable row may be the first of one epoch and the last of the next.
            if fruitless.rows >= 2 * len(self.rows):
                raise self._nothing_usable(fruitless)
        self._look_ahead(k)
        return prompts

    def scan(self) -> ScanReport:
        """Looks at every row once, without decoding pictures where their format lets it; moves no position.

        Raises ValueError for the first bad row (unless plan.skip_bad_rows) and when no row is usable.
        """
        lengths: list[int] = []
        sources: Counter[str] = Counter()
        bad: list[ValueError] = []
        for number in tqdm(range(len(self.rows)), desc="checking data", unit="row", disable=None, leave=False):
            try:
                row = self.rows[number]
                lengths.append(self.builder.length(row))
                sources[row.data_source] += 1
            except ValueError as error:
                if not self._plan.skip_bad_rows:
                    raise
                bad.append(error)
        too_long = sum(length > self._plan.max_prompt_length for length in lengths)
        if too_long == len(lengths):
            raise self._nothing_usable(_Fruitless(len(self.rows), min(lengths, default=None), bad[0] if bad else None))
        return ScanReport(len(self.rows), len(lengths) - too_long, too_long, tuple(map(str, bad)), max(lengths), sources)

    def state(self) -> dict[str, Any]:
        """Everything that decides what next_prompts returns, ready for JSON."""
        self._digests = self._digests or self.rows.digests()
        return {**self.counts, "seed": self._plan.seed, "shuffle": self._plan.shuffle, "files": self._digests}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken; ValueError when the order or the data files were others then."""
        now = self.state()
        for name, meaning in (("seed", "seed"), ("shuffle", "shuffling"), ("files", "data files")):
            if state[name] != now[name]:
                raise ValueError(
                    f"can't continue in the data: the save has {meaning} {state[name]}, this run has {now[name]};"
                    " restore it, or take only the weights of the save (finetune: true)"
                )
        self._position, self._prompts_drawn = state["rows"], state["prompts"]
        self._dropped = Counter(too_long=state["too_long"], bad_rows=state["bad_rows"])
        self._forget_pending()

    def rewind(self) -> None:
        """Back to the first row and prompt_id 0."""
        self._position = self._prompts_drawn = 0
        self._dropped.clear()
        self._forget_pending()

    def close(self) -> None:
        self._forget_pending()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look_ahead(self, wanted: int) -> None:
        settings = self.builder.image_settings
        row_bytes = 3 * settings.max_pixels * self._plan.max_images_per_prompt if settings else 1
        window = min(wanted, max(self._plan.num_workers, 1, _AHEAD_BYTES // max(row_bytes, 1)))
        while len(self._pending) < window:
            self._pending.append(self._pool.submit(self._build, self._position + len(self._pending)))

    def _forget_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _build(self, position: int) -> Prompt | ValueError:
        """Runs in a worker thread; a bad row is an answer, which only the reader knows how to take."""
        epoch, index = divmod(position, len(self.rows))
        number = int(_permutation(len(self.rows), self._plan.seed, epoch)[index]) if self._plan.shuffle else index
        try:
            return self.builder.build(self.rows[number])
        except ValueError as error:
            return error

    def _nothing_usable(self, fruitless: _Fruitless) -> ValueError:
        files = ", ".join(str(file) for file in self.rows.files)
        if fruitless.shortest is None:
            return ValueError(f"no row of {files} can be used: {fruitless.first_error}")
        return ValueError(
            f"no prompt of {files} fits into rl_config.max_prompt_length ({self._plan.max_prompt_length} tokens):"
            f" the shortest has {fruitless.shortest}; raise max_prompt_length or lower max_pixels ({self._plan.max_pixels})"
        )


@dataclass
class _Fruitless:
    """Rows dropped in a row since the last usable one."""

    rows: int = 0
    shortest: int | None = None
    first_error: ValueError | None = None

    def add(self, reason: int | ValueError) -> None:
        self.rows += 1
        if isinstance(reason, ValueError):
            self.first_error = self.first_error or reason
        else:
            self.shortest = min(reason, self.shortest or reason)


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch. From the bit generator's raw stream, which NumPy keeps the same in every version (Generator.permutation isn't)."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    return np.argsort(keys, kind="stable")
