"""Timing: contenders take turns in one process, each the same number of times, and the median counts.

On a CPU a contender runs at its best thread count, one or all. A turn of a quick contender is several calls, of which
it keeps the median: slow ones would otherwise leave it with a handful of milliseconds in all. On a GPU a turn is the
time between two events on the stream; before it the second-level cache is overwritten and the stream is kept busy, so
that neither a warm cache nor the host's launch time flatters or burdens anybody whose kernels are few.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from harness.memory import peak_bytes

Work = Callable[[], object]
TURN_SECONDS = 5e-3  # a turn repeats its call until it has taken this long,
TURN_SHARE = 0.03  # or this share of a round, whichever is longer
ALONE_SECONDS = 3e-4  # a call this long is timed by itself
FEWEST, MOST = 5, 41
SLOW_SECONDS = 0.2  # a call this long is tried once where a shorter one is tried more often,
VERY_SLOW_SECONDS = 1.0  # and one this long, with all threads, not again
SLEEP_CYCLES = 600_000
FLUSH_BYTES = 256 << 20


@dataclass
class Entry:
    """One thing to time.

    ``probe`` is a smaller stand-in that chooses the thread count of a very slow ``work``, which is then run once.
    ``best_threads``: try one thread too; else all. ``grad``: with grad mode on.
    """

    work: Work
    grad: bool = False
    best_threads: bool = False
    probe: Work | None = None
    threads: int = 0
    peak: int | None = None
    calls: int = 1  # of a turn
    estimate: float = 0.0  # seconds of a call, from the warm-up
    samples: list[float] = field(default_factory=list)

    @property
    def once(self) -> bool:
        return self.probe is not None

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles."""
        ordered = sorted(self.samples)
        return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


class Clock:
    """Seconds of one call, on this device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.all_threads = torch.get_num_threads()
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def sample(self, entry: Entry) -> float:
        torch.set_num_threads(entry.threads or self.all_threads)
        with torch.set_grad_enabled(entry.grad):
            return self._gpu_sample(entry) if self._flush is not None else self._cpu_sample(entry)

    def _cpu_sample(self, entry: Entry) -> float:
        start = time.perf_counter()
        if entry.estimate < ALONE_SECONDS:
            for _ in range(entry.calls):
                entry.work()
            return (time.perf_counter() - start) / entry.calls
        calls = []
        for _ in range(entry.calls):
            entry.work()
            end = time.perf_counter()
            calls.append(end - start)
            start = end
        return statistics.median(calls)

    def _gpu_sample(self, entry: Entry) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        assert self._flush is not None
        torch.cuda.synchronize(self.device)
        self._flush.zero_()
        if hasattr(torch.cuda, "_sleep"):
            torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(entry.calls):
            entry.work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / entry.calls

    def settle(self, entry: Entry) -> None:
        """Warm-up: peak memory, thread count, calls a sample."""
        on_cpu = self._flush is None
        entry.threads = self.all_threads
        if entry.probe is not None and on_cpu:
            probe = Entry(entry.probe, entry.grad, best_threads=True)
            self.settle(probe)
            entry.threads = probe.threads
        torch.set_num_threads(entry.threads)
        first = 0.0  # without what it takes to measure memory, which would make a quick call seem a slow one

        def timed() -> object:
            nonlocal first
            start = time.perf_counter()
            result = entry.work()
            first = time.perf_counter() - start
            return result

        with torch.set_grad_enabled(entry.grad):
            entry.peak = peak_bytes(timed, self.device)
        if not entry.once:
            if on_cpu and entry.best_threads:
                entry.threads, first = self._faster_count(entry, first)
            if first < SLOW_SECONDS or not on_cpu:  # a first call on a GPU compiles
                first = min(self.sample(entry) for _ in range(3))
        entry.estimate = first
        if entry.once:
            entry.samples = [first]

    def _faster_count(self, entry: Entry, first: float) -> tuple[int, float]:
        """One thread or all, and seconds; ``first`` is what a cold call took with all."""
        tries = 1 if first > SLOW_SECONDS else 3
        best = {}
        for count in {1, self.all_threads}:
            entry.threads = count
            if count == self.all_threads and first > VERY_SLOW_SECONDS:
                best[count] = first
            else:
                best[count] = min(self.sample(entry) for _ in range(tries))
        fastest = min(best, key=best.__getitem__)
        return fastest, best[fastest]

    def interleave(self, entries: list[Entry], budget: float) -> None:
        """Times the settled ``entries`` in turns, within about ``budget`` seconds but at least five rounds."""
        turns = [entry for entry in entries if not entry.once]
        if self._flush is None:
            turn = max(TURN_SECONDS, TURN_SHARE * sum(entry.estimate for entry in turns))
            for entry in turns:
                entry.calls = max(1, min(2000, int(turn / max(entry.estimate, 1e-7))))
        one_round = sum(entry.estimate * entry.calls for entry in turns)
        if self._flush is not None:
            one_round += 1e-3 * len(turns)
        rounds = max(FEWEST, min(MOST, int(budget / max(one_round, 1e-6))))
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for entry in turns:
                    entry.samples.append(self.sample(entry))
        finally:
            gc.enable()
            torch.set_num_threads(self.all_threads)
