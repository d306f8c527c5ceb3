"""How a run ends that can't go on: one sentence that says what happened and how to continue, and a bound on taking it down."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mindspeed_mm_rl.platforms import signals
from mindspeed_mm_rl.trainer.guardian import go_on
from mindspeed_mm_rl.trainer.state import RunState
from mindspeed_mm_rl.workers.failure import WorkerFailed, cause_of

LOG = "failures.log"
_FAILED, _USER_ERROR = 1, 2


class RunFailed(RuntimeError):
    """A run that could not go on, for a reason that is not the user's to mend: starting it again may help."""

    exit_code = _FAILED


class Ending:
    """Outermost of what a run holds open; `said` is innermost, so that taking down what lies between has a bound."""

    def __enter__(self) -> Ending:
        self._last_word: threading.Timer | None = None
        self._handlers = signals.kept()
        self._handlers.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._last_word is not None:
            self._last_word.cancel()
        self._handlers.__exit__(kind, error, trace)

    @contextmanager
    def said(self, state: RunState) -> Iterator[None]:
        """Raises what ends the run with the whole sentence: ValueError (the user's to mend), StoppedBySignal, or RunFailed."""
        try:
            yield
        except signals.StoppedBySignal as stop:
            stop.args = (self._whole(f"{stop}", state, stop.exit_code),)
            raise
        except ValueError as error:
            whole = self._whole(str(error), state, _USER_ERROR)
            # Libraries raise it too, and then the place matters.
            _write_log(Path(state.plan.run.output), error)
            raise ValueError(whole) from error
        except Exception as error:
            whole = self._whole(cause_of(error), state, _FAILED)
            raise RunFailed(f"{whole}. More in {_write_log(Path(state.plan.run.output), error)}") from error

    def _whole(self, what: str, state: RunState, exit_code: int) -> str:
        signals.ignore_signals()
        # Before the disk is asked for saves: it may be what is stuck.
        self._last_word = signals.end_soon(what, exit_code)
        run = state.plan.run
        if not run.train_iters:
            return what
        under_way = state.iteration < run.train_iters
        where = f"it was iteration {state.iteration + 1} of {run.train_iters}" if under_way else "all iterations were done"
        return f"{what}; {where}. {go_on(run.save)}"


def _write_log(output: Path, error: BaseException) -> Path:
    """Everything that the one sentence leaves out. The message matters more than its log: a full disk may be what is told."""
    parts = [time.strftime("%Y-%m-%d %H:%M:%S"), "".join(traceback.format_exception(error))]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, WorkerFailed) and cause.log:
            parts.append(f"the last lines of the worker:\n{cause.log}\n")
        cause = cause.__cause__
    with suppress(OSError):
        output.mkdir(parents=True, exist_ok=True, mode=0o750)
        with (output / LOG).open("a", encoding="utf-8") as file:
            file.write("\n".join(parts) + "\n")
        (output / LOG).chmod(0o640)
    return output / LOG
