"""Progress on the terminal: rich's bar, or one line per step."""

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, title: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=title)
        else:
            print(
                f"[{self.done + 1:2d}/{self.total} {time.perf_counter() - self.start:5.0f} s] {title}", file=sys.stderr
            )
            sys.stderr.flush()
        self.done += 1

    def detail(self, title: str) -> None:
        """Shown by the bar only."""
        if self._bar is not None:
            self._bar.update(self._task, description=title)
