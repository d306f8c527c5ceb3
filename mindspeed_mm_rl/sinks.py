"""Where the metrics of an iteration go: one console line, metrics.jsonl, tensorboard."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

_CONSOLE_ENDINGS = (
    "loss", "rewards/accuracies", "rewards/margins", "score/mean", "accuracy/mean", "response_length/mean", "actor/entropy",
    "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/lr", "rollout/logprob_gap/max", "train/num_gen_batches", "timing/all",
    "timing/rollout", "timing/update", "e2e_tps", "samples_per_second",
)  # fmt: skip
"""The console line has room for these; metrics.jsonl has everything."""
_CONSOLE_IF_ANY = ("rewards/timeouts", "rewards/crashes", "eval/timeouts", "eval/crashes")
"""Counts of samples that could not be graded: shown when there are any."""


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class ConsoleSink:
    """`[time] iteration: i / N | key : value | ...`; learning rates and log-prob gaps in scientific notation."""

    def __init__(self, train_iters: int, print_line: Callable[[str], None] = print) -> None:
        self.train_iters = train_iters
        self.print_line = print_line

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.print_line(console_line(step, self.train_iters, values))

    def close(self) -> None:
        pass


def console_line(step: int, train_iters: int, values: Mapping[str, float]) -> str:
    shown = [
        name for ending in _CONSOLE_ENDINGS for name in values if name == ending or name.endswith(f"/{ending}") and not _is_evaluated(name)
    ]
    shown += [name for name in values if _is_evaluated(name)]
    fields = [f"{name} : {values[name]:{'.4e' if name.endswith('lr') or 'gap' in name else '.4f'}}" for name in shown]
    fields += [f"{name} : {values[name]:.0f}" for name in _CONSOLE_IF_ANY if values.get(name)]
    return " | ".join([f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration: {step} / {train_iters}", *fields])


def _is_evaluated(name: str) -> bool:
    """Whether it says how good the policy is on data that it isn't trained on."""
    return name.startswith("eval/") and ("@" in name or name.endswith(("rewards/accuracies", "rewards/margins", "/loss")))


class JsonlSink:
    """One JSON object per line, `iteration` first; a line is written by one append, so that a kill never leaves half of one.

    A resumed run (`resume_from` > 0) drops the lines after that iteration and continues the file; a new run moves an older file aside
    to metrics.1.jsonl, metrics.2.jsonl, ... Raises OSError naming the file when there is no room for a line, and writes no part of it.
    """

    def __init__(self, path: Path, resume_from: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            _keep_until(path, resume_from) if resume_from else path.rename(_free_name(path))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # NaN and infinity are no JSON; null keeps the column and is seen as "not a number" by every reader.
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line, end = (json.dumps({"iteration": step, **record}) + "\n").encode(), os.fstat(self._file).st_size
        with _naming(self.path):
            if os.write(self._file, line) < len(line):
                os.ftruncate(self._file, end)
                raise OSError(errno.ENOSPC, "")

    def close(self) -> None:
        os.close(self._file)


def read_records(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a torn last line (power loss) is left out."""
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def _keep_until(path: Path, iteration: int) -> None:
    kept = [record for record in read_records(path) if record["iteration"] <= iteration]
    temporary = path.with_suffix(".tmp")
    with _naming(temporary):
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.chmod(0o640)
        temporary.replace(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Writing to an open file doesn't say which one the disk was too full for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), str(path)) from error


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return candidate


class TensorboardSink:
    """Scalars under `train/`, in `folder`; what an earlier run wrote there after the iteration `resume_from` is no longer shown."""

    def __init__(self, folder: Path, resume_from: int = 0) -> None:
        # torch's writer stores plain scalars, which every reader of event files knows; tensorboard's own stores tensors.
        from torch.utils.tensorboard import SummaryWriter

        # Iteration 0 is the evaluation before the first one.
        self._writer = SummaryWriter(str(folder), purge_step=resume_from + 1 if resume_from else 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MetricLog:
    """Hands each iteration's metrics to every sink. Example: MetricLog([JsonlSink(Path("logs/metrics.jsonl"))]).record(1, values)."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self.sinks:
            sink.write(step, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def open_metric_log(
    output: Path, train_iters: int, resume_from: int, use_tensorboard: bool, print_line: Callable[[str], None] = print
) -> MetricLog:
    """The sinks of a training run in the folder `output`; `resume_from` is the last iteration that is kept (0 = a new run)."""
    sinks: list[Sink] = [ConsoleSink(train_iters, print_line), JsonlSink(output / "metrics.jsonl", resume_from)]
    if use_tensorboard:
        sinks.append(TensorboardSink(output / "tensorboard", resume_from))
    return MetricLog(sinks)
