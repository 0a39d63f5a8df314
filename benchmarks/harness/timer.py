"""Interleaved timing: equally many samples per implementation, medians reported.

CPU: a sample of a fast call is the median of several calls. GPU: the time between two stream events, after overwriting
the L2 cache; a sleep kernel hides launch latency.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from harness.memory import peak_bytes

Work = Callable[[], object]
SAMPLE_SECONDS = 5e-3  # shortest sample
SAMPLE_FRACTION = 0.03  # of a round
SINGLE_CALL_SECONDS = 3e-4  # from here, calls are timed singly
MIN_SAMPLES, MAX_SAMPLES = 5, 41
SLOW_SECONDS = 0.2  # from here, one warm-up instead of three
VERY_SLOW_SECONDS = 1.0  # from here, with all threads, a single run
SLEEP_CYCLES = 600_000
FLUSH_BYTES = 256 << 20


@dataclass
class Entry:
    """A callable to time.

    Attributes:
        grad: grad mode.
        best_threads: the faster of one thread and all; else all.
        probe: smaller problem that selects the thread count of a ``work`` so slow that it runs once.
    """

    work: Work
    grad: bool = False
    best_threads: bool = False
    probe: Work | None = None
    threads: int = 0
    peak: int | None = None
    calls: int = 1  # per sample
    estimate: float = 0.0  # seconds per call
    samples: list[float] = field(default_factory=list)

    @property
    def once(self) -> bool:
        return self.probe is not None

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        ordered = sorted(self.samples)
        return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


class Timer:
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
        if entry.estimate < SINGLE_CALL_SECONDS:
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

    def warm_up(self, entry: Entry) -> None:
        """Measures peak memory, selects the thread count, estimates the time."""
        on_cpu = self._flush is None
        entry.threads = self.all_threads
        if entry.probe is not None and on_cpu:
            probe = Entry(entry.probe, entry.grad, best_threads=True)
            self.warm_up(probe)
            entry.threads = probe.threads
        torch.set_num_threads(entry.threads)
        first = 0.0  # excludes memory measurement

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
            if first < SLOW_SECONDS or not on_cpu:  # a GPU's first call compiles
                first = min(self.sample(entry) for _ in range(3))
        entry.estimate = first
        if entry.once:
            entry.samples = [first]

    def _faster_count(self, entry: Entry, first: float) -> tuple[int, float]:
        """``first``: seconds of a cold call with all threads."""
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
        """Takes about ``budget`` seconds, at least five rounds."""
        repeated = [entry for entry in entries if not entry.once]
        if self._flush is None:
            sample_seconds = max(SAMPLE_SECONDS, SAMPLE_FRACTION * sum(entry.estimate for entry in repeated))
            for entry in repeated:
                entry.calls = max(1, min(2000, int(sample_seconds / max(entry.estimate, 1e-7))))
        one_round = sum(entry.estimate * entry.calls for entry in repeated)
        if self._flush is not None:
            one_round += 1e-3 * len(repeated)
        rounds = max(MIN_SAMPLES, min(MAX_SAMPLES, int(budget / max(one_round, 1e-6))))
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for entry in repeated:
                    entry.samples.append(self.sample(entry))
        finally:
            gc.enable()
            torch.set_num_threads(self.all_threads)


def medians(calls: dict[str, Work], budget: float, *, grad: bool = False) -> dict[str, float]:
    """Seconds of calls on a CPU, interleaved for about ``budget`` seconds, with the present number of threads."""
    timer = Timer(torch.device("cpu"))
    entries = {name: Entry(work, grad) for name, work in calls.items()}
    for entry in entries.values():
        timer.warm_up(entry)
    timer.interleave(list(entries.values()), budget)
    return {name: entry.seconds for name, entry in entries.items()}
