"""Leads a process on by single system calls (ptrace), so that a moment between two of them can't be missed. Linux; own children only."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_CONTINUE, _ATTACH, _DETACH, _SYSCALL, _SETOPTIONS = 7, 16, 17, 24, 0x4200
_MARK_SYSTEM_CALLS = 1
_SYSTEM_CALL = signal.SIGTRAP | 0x80
_ANY_THREAD = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _ask(request: int, pid: int, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) == -1:
        raise OSError(ctypes.get_errno(), f"ptrace {request} of process {pid}: {os.strerror(ctypes.get_errno())}")


def _wait_for_stop(pid: int) -> int:
    """The signal that it stopped with."""
    _, status = os.waitpid(pid, _ANY_THREAD)
    if not os.WIFSTOPPED(status):
        raise RuntimeError(f"process {pid} ended while it was led, status {status}")
    return os.WSTOPSIG(status)


def _attach(pid: int) -> None:
    _ask(_ATTACH, pid)
    # A process that has just been started may stop for that first. Its own stop is not to be left pending: it would come after the end.
    while _wait_for_stop(pid) != signal.SIGSTOP:
        _ask(_CONTINUE, pid)


@contextmanager
def led_while(pid: int, goes_on: Callable[[], bool]) -> Iterator[None]:
    """Inside the block the main thread of `pid` stands where `goes_on` had first been false; afterwards it goes its way again.

    Until then nobody else may wait for the process: they would be told of its stops.
    """
    _attach(pid)
    try:
        _ask(_SETOPTIONS, pid, _MARK_SYSTEM_CALLS)
        delivered = 0
        while goes_on():
            _ask(_SYSCALL, pid, delivered)
            stopped = _wait_for_stop(pid)
            delivered = 0 if stopped == _SYSTEM_CALL else stopped
        yield
    finally:
        with suppress(ProcessLookupError):  # It was killed in the block.
            _ask(_DETACH, pid)
