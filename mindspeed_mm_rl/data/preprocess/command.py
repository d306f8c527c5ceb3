"""The preparation of a data set, from its YAML file to column files and a report of what was kept and what was dropped, and why."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from mindspeed_mm_rl.data.indexed import PROMPT_COLUMN, IndexedWriter, column_files, column_name
from mindspeed_mm_rl.data.preprocess.encoding import Outcome, column_names, outcomes, preparer
from mindspeed_mm_rl.data.preprocess.handlers import find_handler
from mindspeed_mm_rl.data.preprocess.merge import merge
from mindspeed_mm_rl.data.preprocess.output import new_columns
from mindspeed_mm_rl.data.preprocess.records import count_records, input_files, read_records
from mindspeed_mm_rl.data.preprocess.samples import Columns
from mindspeed_mm_rl.data.preprocess.settings import Settings, load_settings

_LOOK = 64
"""Records whose columns are the data set's: in JSON, a record may leave out what it has not."""


@dataclass
class Report:
    """What became of the records; rows == kept + the sum of dropped."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> records."""
    tokens: int = 0
    longest: int = 0
    """Tokens of the longest sample, and of all, in the first column."""
    changed: int = 0
    """Kept samples whose answer reads back as another text than the data set has."""
    first_changed: str = ""

    def add(self, outcome: Outcome) -> None:
        self.rows += 1
        if outcome.dropped:
            self.dropped[outcome.dropped] += 1
            return
        length = len(next(iter(outcome.ids.values())))
        self.kept += 1
        self.tokens += length
        self.longest = max(self.longest, length)
        if outcome.changed:
            self.changed += 1
            self.first_changed = self.first_changed or outcome.changed

    def reasons(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in sorted(self.dropped.items())) or "none"

    def lines(self, first_column: str) -> list[str]:
        lines = [
            f"rows: {self.rows}, kept: {self.kept}, dropped: {sum(self.dropped.values())} ({self.reasons()})",
            f"{first_column}: {self.tokens / self.kept:.1f} tokens on average, {self.longest} at most",
        ]
        if self.changed:
            lines.append(
                f"note: {self.changed} answers read back otherwise than they were written, because the tokenizer normalises them;"
                f" the first: {self.first_changed}"
            )
        return lines


def run(config: str | Path, overrides: Sequence[str] = ()) -> Report | None:
    """Prepares what the YAML file says; None when it says to join columns (merge_group_keys).

    Raises ValueError or OSError with one sentence, and then has written nothing.
    """
    settings, notes = load_settings(config, overrides)
    for note in notes:
        print(f"note: {note}")
    if settings.merge_group_keys is not None:
        print("\n".join(merge(settings)))
        return None
    report = prepare(settings)
    names = column_names(settings)
    print("\n".join(report.lines(names[0])))
    for name in names:
        print(f"{column_name(settings.output_prefix, name)}.bin, .idx")
    return report


def prepare(settings: Settings) -> Report:
    """Writes the columns. Raises ValueError for bad input, and when no record is kept."""
    handler = find_handler(settings.handler_name, settings.dataset_additional_keys, settings.append_eod)
    prefix = Path(settings.output_prefix).expanduser()
    names = column_names(settings)
    _refuse_other_columns(prefix, names)
    files = input_files(settings.input)
    records = read_records(files)
    first = list(islice(records, _LOOK))
    if not first:
        raise ValueError(f"input: {settings.input} has no rows")
    present = list(dict.fromkeys(column for _, record in first for column in record))
    columns = Columns.resolve(settings.map_keys, _other_columns(settings), handler.roles, present)
    preparer(settings, columns)  # What is wrong with tokenizer or template is said before anything is written.
    report = Report()
    with new_columns([Path(column_name(prefix, name)) for name in names]) as writers:
        done = outcomes(chain(first, records), settings, columns)
        for outcome in _progress(done, count_records(files), settings.log_interval):
            report.add(outcome)
            _write(outcome, names, writers)
        if not report.kept:
            raise ValueError(f"input: none of the {report.rows} rows of {settings.input} is kept ({report.reasons()})")
    return report


def _other_columns(settings: Settings) -> list[str]:
    """labels are made from the answer, whatever its column."""
    return [name for name in settings.dataset_additional_keys if name not in ("labels", PROMPT_COLUMN, "attention_mask")]


def _refuse_other_columns(prefix: Path, names: Sequence[str]) -> None:
    """Whoever reads a prefix takes all of its columns, so one of an earlier preparation would be taken for one of this."""
    if others := sorted(column_files(prefix).keys() - set(names)):
        raise ValueError(
            f"output_prefix: {prefix} has the columns {', '.join(others)} of another preparation; remove them or choose another prefix"
        )


def _write(outcome: Outcome, names: Sequence[str], writers: Sequence[IndexedWriter]) -> None:
    if not outcome.dropped:
        for name, writer in zip(names, writers, strict=True):
            writer.add(outcome.ids[name])


def _progress(done: Iterable[Outcome], total: int | None, log_interval: int) -> Iterator[Outcome]:
    """A bar on a terminal, else a line for every log_interval records."""
    began = time.monotonic()
    lines = not sys.stderr.isatty()
    for number, outcome in enumerate(tqdm(done, desc="preparing", total=total, unit="row", disable=lines), 1):
        yield outcome
        if lines and number % log_interval == 0:
            rate = number / max(time.monotonic() - began, 1e-9)
            print(f"prepared {number}{f' of {total}' if total else ''} rows ({rate:.0f} a second)", file=sys.stderr)
