"""Ctrl-C, SIGTERM and SIGHUP as one exception that unwinds the program, so that what was started is taken down again.

An exception out of a signal handler can come between two instructions of any library: a lock just taken is then never given back, and who
waits for it waits for ever. Inside `held` the signal is therefore only noted; `let_through`, wherever the program waits, raises it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_WORD_SECONDS = 45.0
"""Taking everything down needs a few seconds. A stuck disk or network must not keep a program alive that was told to stop."""


@dataclass
class _Noted:
    """What a signal said inside `held`."""

    is_held: bool = False
    stopped: StoppedBySignal | None = None


_noted = _Noted()


class StoppedBySignal(KeyboardInterrupt):
    """Somebody wants the program to end. A KeyboardInterrupt, because libraries let that one through."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.exit_code = 128 + number


def stop_on_signals() -> None:
    """From the main thread. The first signal raises StoppedBySignal there; later ones change nothing: the end is on its way."""
    for number in STOP_SIGNALS:
        # nohup: a hang-up that is ignored stays ignored. A shell ignores SIGINT for what it runs in the background, but passes it on.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait for the next `let_through`, or for the end of the block; also when it ends by another error, which they explain."""
    _noted.is_held = True
    try:
        yield
    finally:
        _noted.is_held = False
        let_through()


def let_through() -> None:
    """Raises StoppedBySignal when a signal has come inside `held`."""
    stopped, _noted.stopped = _noted.stopped, None
    if stopped:
        raise stopped


@contextmanager
def kept() -> Iterator[None]:
    """What handles these signals before the block handles them after it again: Ray, for one, puts a handler of its own in place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """While everything is taken down."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    stopped = StoppedBySignal(number)
    # Raised inside a destructor or a callback, an exception is lost.
    end_soon(str(stopped), stopped.exit_code)
    if not _noted.is_held:
        raise stopped
    _noted.stopped = stopped


def end_soon(message: str, exit_code: int) -> threading.Timer:
    """Ends the process with these words if it has not ended by itself before long, or cancelled this."""

    def end() -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(exit_code)

    timer = threading.Timer(_LAST_WORD_SECONDS, end)
    timer.daemon = True
    timer.start()
    return timer
