"""Metrics and timings between two log lines."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class MetricMeans:
    """Means of metrics.

    Example:
        >>> metric_means = MetricMeans()
        >>> metric_means.add({"loss": 1.0})
        >>> metric_means.add({"loss": 3.0})
        >>> metric_means.means()
        {'loss': 2.0}
        >>> metric_means.means()
        {}
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def add(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Since the last call."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the block's milliseconds."""
        start = time.perf_counter()
        yield
        self.add({name: 1e3 * (time.perf_counter() - start)})
