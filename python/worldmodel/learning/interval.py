"""Clocks of training, and what is done now and then while it goes on, in a bounded share of its time."""

import time
from collections.abc import Callable
from typing import Literal

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds by the wall, or of processor time, over all threads."""


class Interval:
    """Says when it is time.

    Args:
        minutes: minimum interval; 0 for never.
        seconds: of training so far.
        share: of training time that it may take.
        allowance: seconds beyond the share, for the first minutes.
        clock: of training's seconds.

    Attributes:
        now: the clock.
    """

    def __init__(self, minutes: float, seconds: float, share: float, allowance: float, clock: Clock = "wall") -> None:
        self._minutes, self.now = minutes, CLOCKS[clock]
        self._share, self._allowance = share, allowance
        self.begin(seconds)

    def begin(self, seconds: float) -> None:
        """Begins anew, after ``seconds`` of training."""
        self._began = seconds
        self._first = self._next = seconds + self._interval(seconds)
        self._spent = self._following = 0.0

    def _interval(self, seconds: float) -> float:
        """Doubles in the first minutes, up to ``minutes``: a beginner looks at once."""
        return 60 * self._minutes * min(1.0, max(1 / 8, seconds / (60 * self._minutes or 1)))

    def is_time(self, seconds: float) -> bool:
        return self._minutes > 0 and seconds >= self._next

    def is_time_at_the_end(self, seconds: float) -> bool:
        """Whether it is also to be done at the end of training: not of a short one, nor without time for it."""
        return self._minutes > 0 and seconds >= self._first and self.left(seconds) >= self._following

    def left(self, seconds: float) -> float:
        """Seconds that it may take at ``seconds`` of training."""
        return self._share * (seconds - self._began) + self._allowance - self._spent

    def took(self, cost: float, seconds: float, following: float | None = None) -> None:
        """Records a run of ``cost`` seconds that began at ``seconds``; the next one costs ``following``, or as much."""
        self._spent += cost
        self._following = cost if following is None else following
        affordable = self._began + (self._spent + self._following - self._allowance) / self._share
        self._next = max(seconds + self._interval(seconds), affordable)
