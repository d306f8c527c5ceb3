"""Prompts, or what else rows are drawn for, in a reproducible order with an exact position.

stream position 0, 1, 2, ... (epoch = position // rows, row = permutation of that epoch)
  -> worker threads build prompts, a window ahead of the reader
  -> next_prompts: kept prompts get the next prompt_id; dropped rows only move the position
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from mindspeed_mm_rl.config.plan import DataPlan
from mindspeed_mm_rl.data.indexed import IndexedRows
from mindspeed_mm_rl.data.prompts import PromptBuilder
from mindspeed_mm_rl.data.rows import BadRow, PromptColumns, Row, RowRange, Rows, RowT
from mindspeed_mm_rl.data.sources import open_rows
from mindspeed_mm_rl.types import Prompt

Drawn = TypeVar("Drawn")
Sizes = tuple[int, ...]
"""Numbers of tokens; the first is the prompt's, the last is of all."""

_AHEAD_BYTES = 2**30
"""Bound on the pixels of pictures that are decoded before they are asked for."""


@dataclass(frozen=True)
class ScanReport:
    """What a look at every row found. Example: ScanReport(500, 497, 2, ("train.parquet, row 7: an image is corrupt (...)",), 803, 803)."""

    rows: int
    usable: int
    too_long: int
    bad_rows: tuple[str, ...]
    """One sentence each, naming file and row."""
    longest_prompt: int
    """Tokens of the longest prompt, image tokens expanded; over max_prompt_length where rows are too long."""
    longest: int
    """Of a pair, with its longer answer; of a prompt the same."""
    sources: Mapping[str, int] = field(default_factory=dict)
    """data_source -> rows of it that aren't bad."""
    rules: Mapping[str, int] = field(default_factory=dict)
    """Rule -> bad rows that are counted under it."""


class RowLoader(ABC, Generic[RowT, Drawn]):
    """Draws what is made of rows, without end, epoch after epoch.

    Raises ValueError when it is made for input that no row can mend: paths, columns, tokenizer, pixel bounds.
    """

    drawn_name: str
    """What is drawn, in the plural, for counts and messages."""
    rules: tuple[str, ...] = ("too_long", "bad_rows")
    """What rows are dropped for; bad_rows stands for all that has no name of its own."""

    def __init__(self, plan: DataPlan, builder: PromptBuilder, rows: Rows[RowT]) -> None:
        self._plan = plan
        self.builder = builder
        self.rows: Rows[RowT] = rows if plan.row_slice == (None, None) else RowRange(rows, plan.row_slice)
        self._position = 0
        self._num_drawn = 0
        self._dropped: Counter[str] = Counter()
        self._pending: deque[Future[Drawn | ValueError]] = deque()
        self._pool = ThreadPoolExecutor(max(1, plan.num_workers), thread_name_prefix=self.drawn_name)
        self._digests: dict[str, str] | None = None

    @abstractmethod
    def _make(self, row: RowT) -> Drawn:
        """Raises ValueError that names file and row when nothing can be made of it."""

    @abstractmethod
    def _numbered(self, made: Drawn, number: int) -> Drawn:
        """The same, as the one drawn after `number` others."""

    @abstractmethod
    def _sizes(self, made: Drawn) -> Sizes:
        """Tokens of what the bounds are about."""

    @abstractmethod
    def _row_sizes(self, row: RowT) -> Sizes:
        """_sizes(_make(row)) at a fraction of the price: pictures are checked, not decoded. Raises as _make."""

    @property
    @abstractmethod
    def _bounds(self) -> Sizes:
        """The largest sizes that are drawn."""

    @abstractmethod
    def _too_long(self, files: str, shortest: Sizes) -> str:
        """What to say where no row is short enough."""

    @property
    def counts(self) -> dict[str, int]:
        """rows: taken from the stream; prompts (or what else is drawn): given out; each of the rules: dropped on the way."""
        return {"rows": self._position, self.drawn_name: self._num_drawn, **{rule: self._dropped[rule] for rule in self.rules}}

    def scan(self) -> ScanReport:
        """Looks at every row once, without decoding pictures where their format lets it; moves no position.

        Raises ValueError for the first bad row (unless plan.skip_bad_rows) and when no row is usable.
        """
        found: list[Sizes] = []
        sources: Counter[str] = Counter()
        bad: list[ValueError] = []
        for number in tqdm(range(len(self.rows)), desc="checking data", unit="row", disable=None, leave=False):
            try:
                row = self.rows[number]
                found.append(self._row_sizes(row))
                sources[row.data_source] += 1
            except ValueError as error:
                if not self._plan.skip_bad_rows:
                    raise ValueError(f"{error} (megatron_training.skip_bad_rows: true leaves such rows out)") from error
                bad.append(error)
        too_long = sum(self._excess(sizes) > 0 for sizes in found)
        if too_long == len(found):
            raise self._nothing_usable(_Fruitless(len(self.rows), min(found, key=self._excess, default=None), bad[0] if bad else None))
        longest_prompt, longest = (max(sizes[index] for sizes in found) for index in (0, -1))
        bad_rows, rules = tuple(map(str, bad)), Counter(map(self._rule, bad))
        return ScanReport(len(self.rows), len(found) - too_long, too_long, bad_rows, longest_prompt, longest, sources, rules)

    def state(self) -> dict[str, Any]:
        """Everything that decides what is drawn next, ready for JSON."""
        return {**self.counts, **{key: value for key, (_, value) in self._order().items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state` was taken; ValueError when the order or the data files were others then."""
        for key, (meaning, value) in self._order().items():
            if state[key] != value:
                raise ValueError(
                    f"can't continue in the data: the save has {meaning} {state[key]}, this run has {value};"
                    " restore it, or take only the weights of the save (finetune: true)"
                )
        self._position, self._num_drawn = state["rows"], state[self.drawn_name]
        self._dropped = Counter({rule: state[rule] for rule in self.rules})
        self._forget_pending()

    def rewind(self) -> None:
        """Back to the first row and the number 0."""
        self._position = self._num_drawn = 0
        self._dropped.clear()
        self._forget_pending()

    def close(self) -> None:
        self._forget_pending()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _order(self) -> dict[str, tuple[str, Any]]:
        """Key of the state -> what it is to people, and its value: all that the order of the rows depends on."""
        self._digests = self._digests or self.rows.digests()
        return {"seed": ("seed", self._plan.seed), "shuffle": ("shuffling", self._plan.shuffle), "files": ("data files", self._digests)}

    def _draw(self, count: int, until: int | None) -> list[Drawn]:
        """The next `count` usable ones; fewer where the stream's position `until` comes first.

        Raises ValueError naming file and row for a bad row (unless plan.skip_bad_rows), and when two passes over the data give none.
        """
        drawn: list[Drawn] = []
        fruitless = _Fruitless()
        while len(drawn) < count and (until is None or self._position < until):
            self._look_ahead(count - len(drawn))
            made = self._pending[0].result()
            if isinstance(made, ValueError) and not self._plan.skip_bad_rows:
                raise made
            self._pending.popleft()
            self._position += 1
            sizes = None if isinstance(made, ValueError) else self._sizes(made)
            if sizes is not None and self._excess(sizes) <= 0:
                drawn.append(self._numbered(made, self._num_drawn))
                self._num_drawn += 1
                fruitless = _Fruitless()
                continue
            self._dropped["too_long" if sizes is not None else self._rule(made)] += 1
            fruitless.add(sizes, made, self._excess)
            # Twice: the only usable row may be the first of one epoch and the last of the next.
            if fruitless.rows >= 2 * len(self.rows):
                raise self._nothing_usable(fruitless)
        self._look_ahead(count)
        return drawn

    def _excess(self, sizes: Sizes) -> int:
        """Tokens over the bounds; not over 0: it fits."""
        return max(size - bound for size, bound in zip(sizes, self._bounds, strict=True))

    def _rule(self, error: ValueError) -> str:
        return error.rule if isinstance(error, BadRow) and error.rule in self.rules else "bad_rows"

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

    def _build(self, position: int) -> Drawn | ValueError:
        """Runs in a worker thread; a bad row is an answer, which only the reader knows how to take."""
        epoch, index = divmod(position, len(self.rows))
        number = int(_permutation(len(self.rows), self._plan.seed, epoch)[index]) if self._plan.shuffle else index
        try:
            return self._make(self.rows[number])
        except ValueError as error:
            return error

    def _nothing_usable(self, fruitless: _Fruitless) -> ValueError:
        files = ", ".join(str(file) for file in self.rows.files)
        if fruitless.shortest is None:
            return ValueError(f"no row of {files} can be used: {fruitless.first_error}")
        return ValueError(self._too_long(files, fruitless.shortest))


class PromptLoader(RowLoader[Row, Prompt]):
    """Prompts for rollouts."""

    drawn_name = "prompts"

    def __init__(self, plan: DataPlan) -> None:
        builder = PromptBuilder(plan)
        columns = PromptColumns(plan.prompt_key, plan.image_key)
        super().__init__(plan, builder, open_rows(plan.train_path, columns, partial(IndexedRows, decode=builder.decode)))

    def next_prompts(self, k: int, until: int | None = None) -> list[Prompt]:
        """The next k usable prompts; fewer where the stream's position `until` comes first. Raises as RowLoader._draw."""
        return self._draw(k, until)

    def _make(self, row: Row) -> Prompt:
        return self.builder.build(row)

    def _numbered(self, made: Prompt, number: int) -> Prompt:
        return replace(made, prompt_id=number)

    def _sizes(self, made: Prompt) -> Sizes:
        return (made.expanded_length,)

    def _row_sizes(self, row: Row) -> Sizes:
        return (self.builder.length(row),)

    @property
    def _bounds(self) -> Sizes:
        return (self._plan.max_prompt_length,)

    def _too_long(self, files: str, shortest: Sizes) -> str:
        return (
            f"no prompt of {files} fits into rl_config.max_prompt_length ({self._plan.max_prompt_length} tokens):"
            f" the shortest has {shortest[0]}; raise max_prompt_length or lower max_pixels ({self._plan.max_pixels})"
        )


@dataclass
class _Fruitless:
    """Rows dropped in a row since the last usable one."""

    rows: int = 0
    shortest: Sizes | None = None
    first_error: ValueError | None = None

    def add(self, sizes: Sizes | None, made: object, excess: Callable[[Sizes], int]) -> None:
        """sizes: of what is too long; None: `made` is the error of a bad row."""
        self.rows += 1
        if sizes is not None:
            self.shortest = min(sizes, self.shortest or sizes, key=excess)
        elif isinstance(made, ValueError):
            self.first_error = self.first_error or made


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch. From the bit generator's raw stream, which NumPy keeps the same in every version (Generator.permutation isn't)."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    return np.argsort(keys, kind="stable")
