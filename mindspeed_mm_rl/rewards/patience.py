"""How long a sample may be graded: the whole bound for the first one that hangs, little for those that follow it."""

from __future__ import annotations

import threading

_LEAST_SECONDS = 1.0
"""Hundreds of times what a sample takes, and room for a busy machine."""
_SLOWEST_TIMES = 3
"""No sample is cut off that takes up to this many times the slowest that was ever graded."""
_CUT = 4
_FORGIVEN_AFTER = 1000
"""Samples in time, one after another, that make the deadline `_CUT` times longer again."""


class Patience:
    """The deadline of the next sample, shared by all lanes of a pool.

    With a fixed deadline, a policy that learns a text on which graders hang would stop the run for minutes in every iteration.

    Example: with a bound of 30 s and nothing slow before, hanging samples wait for 30, 7.5, 1.875, 1, 1, 1, ... seconds.
    """

    def __init__(self, bound_seconds: float) -> None:
        self.bound = bound_seconds
        self._deadline = bound_seconds
        self._slowest = 0.0
        self._in_a_row = 0
        self._lock = threading.Lock()

    def seconds(self) -> float:
        with self._lock:
            return min(self.bound, max(self._deadline, _LEAST_SECONDS, _SLOWEST_TIMES * self._slowest))

    def in_time(self, seconds: float) -> None:
        """A sample was graded in `seconds`."""
        with self._lock:
            self._slowest = max(self._slowest, seconds)
            self._in_a_row += 1
            if self._in_a_row == _FORGIVEN_AFTER:
                self._deadline, self._in_a_row = min(self.bound, self._deadline * _CUT), 0

    def late(self) -> None:
        """A sample was not graded within `seconds()`."""
        with self._lock:
            self._deadline, self._in_a_row = max(_LEAST_SECONDS, self._deadline / _CUT), 0
