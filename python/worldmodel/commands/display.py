"""Progress: a table on a terminal, else lines."""

import collections
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from worldmodel.learning.settings import TrainConfig
from worldmodel.runs.optional_dependencies import MissingPackage, require

_LINE_SECONDS = 20
_WARNING_SECONDS = 60
_PACE_SECONDS = 60
_SMOOTHED_EPISODES = 100


class Display:
    """Shows progress, unless ``quiet``."""

    def __init__(self, config: TrainConfig, folder: Path, *, quiet: bool = False) -> None:
        self._config = config
        self._folder = folder
        self._quiet = quiet
        self._live: Any = None
        self._said = -float(_LINE_SECONDS)
        self._known: dict[str, float] = {}
        self._warned: dict[str, float] = {}
        self._pace = Pace()

    def __enter__(self) -> "Display":
        if not self._quiet and sys.stderr.isatty():
            try:
                console = require("rich.console", "show progress").Console(stderr=True)
                self._live = require("rich.live", "show progress").Live(console=console, refresh_per_second=4)
            except MissingPackage:
                return self
            self._live.start()
        threads = f", CPU threads {self._config.threads}" if self._config.threads else ""
        self.say(f"{self._config.env or self._config.data or 'batches'}, run folder {self._folder}{threads}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._unless_gone():
            if self._live is not None:
                self._live.stop()

    def say(self, text: str) -> None:
        with self._unless_gone():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            elif not self._quiet:
                print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Says that ``what`` cannot be written, for instance on a full disk; at most once a minute."""
        try:
            yield
        except OSError as error:
            now = time.monotonic()
            if now - self._warned.get(what, -float("inf")) >= _WARNING_SECONDS:
                self._warned[what] = now
                self.say(f"warning: {what} cannot be written, and training goes on: {error}")

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """A terminal that was closed must not keep a run from being saved."""
        try:
            yield
        except OSError:
            self._quiet, self._live = True, None

    def show(self, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Without a terminal, shows only every 20 s and the ``last``."""
        self._known.update(metrics)
        self._known.update(self._pace.measure(self._config, metrics))
        if self._live is not None:
            with self._unless_gone():
                self._live.update(self._table(self._known))
        elif last or time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            self.say(line(self._known, done(self._config, metrics)))

    def _table(self, metrics: Mapping[str, float]) -> Any:
        table = require("rich.table", "show progress").Table.grid(padding=(0, 2))
        bar = require("rich.progress_bar", "show progress").ProgressBar
        for _ in range(2):
            table.add_column(style="dim")
            table.add_column(justify="right")
        share = done(self._config, metrics)
        table.add_row("done", bar(total=1.0, completed=share, width=12), "", f"{share:.0%}")
        for pair in itertools.zip_longest(*(_cells(metrics, names) for names in (_LEFT, _RIGHT)), fillvalue=("", "")):
            table.add_row(*pair[0], *pair[1])
        return table


class Pace:
    """Speed, time left and smoothed return, for the screen alone."""

    def __init__(self) -> None:
        self._marks: collections.deque[dict[str, float]] = collections.deque()
        self._return: float | None = None

    def measure(self, config: TrainConfig, metrics: Mapping[str, float]) -> dict[str, float]:
        """Returns "steps per second" and "seconds left" over the last minute, "return" over about 100 episodes.

        Time left is not known before the first update: random steps are faster.
        """
        episodes = metrics.get("episodes", 0.0)
        before = self._marks[-1].get("episodes", 0.0) if self._marks else 0.0
        if "episode/return" in metrics:
            weight = min(1.0, max(1.0, episodes - before) / max(1.0, min(_SMOOTHED_EPISODES, episodes)))
            old = metrics["episode/return"] if self._return is None else self._return
            self._return = old + weight * (metrics["episode/return"] - old)
        self._marks.append(
            {name: metrics[name] for name in ("steps", "updates", "seconds", "episodes") if name in metrics}
        )
        while self._marks[0]["updates"] == 0 and self._marks[-1]["updates"] > 0:
            self._marks.popleft()
        while len(self._marks) > 2 and self._marks[-1]["seconds"] - self._marks[0]["seconds"] > _PACE_SECONDS:
            self._marks.popleft()
        found = {} if self._return is None else {"return": self._return}
        first, last = self._marks[0], self._marks[-1]
        elapsed = last["seconds"] - first["seconds"]
        if elapsed <= 0:
            return found
        found["steps per second"] = (last["steps"] - first["steps"]) / elapsed
        left = [60 * config.minutes - last["seconds"]] if config.minutes else []
        for name, limit in (("steps", config.steps), ("updates", config.updates)):
            rate = (last[name] - first[name]) / elapsed
            if limit and rate > 0:
                left.append((limit - last[name]) / rate)
        if left and first["updates"] > 0:
            found["seconds left"] = max(0.0, min(left))
        return found


class EvaluationProgress:
    """Progress of ``evaluate`` on stderr: a line that is written over on a terminal, else one every 20 s."""

    def __init__(self, what: str, episodes: int) -> None:
        self._what, self._episodes = what, episodes
        self._terminal = sys.stderr.isatty()
        self._began = self._said = time.monotonic()

    def __call__(self, episodes: int, steps: int, returns: Sequence[float]) -> None:
        now = time.monotonic()
        if now - self._said < (0.5 if self._terminal else _LINE_SECONDS):
            return
        self._said = now
        text = f"{self._what}: {episodes} of {self._episodes} episodes, {steps:,} steps"
        text += f", {steps / (now - self._began):,.0f} steps per second"
        if returns:
            text += f", mean return so far {sum(returns) / len(returns):.4g}"
        with contextlib.suppress(OSError):
            print(f"\r{text}\x1b[K" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()

    def end(self) -> None:
        """Clears the line."""
        if self._terminal:
            with contextlib.suppress(OSError):
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)


_LEFT = (
    "steps",
    "updates",
    "episodes",
    "seconds",
    "steps per second",
    "seconds left",
    "return",
    "eval/",
    "episode/",
    "milliseconds/",
    "replay/",
)
_RIGHT = ("loss/", "policy/", "latent/", "scale/")


def _cells(metrics: Mapping[str, float], names: tuple[str, ...]) -> list[tuple[str, str]]:
    kept = [name for name in metrics if name in names or (f"{name.partition('/')[0]}/" in names and "/" in name)]
    return [(name, f"{metrics[name]:,.4g}" if metrics[name] % 1 else f"{metrics[name]:,.0f}") for name in kept]


def done(config: TrainConfig, metrics: Mapping[str, float]) -> float:
    """Progress from 0 to 1; 0 without a limit."""
    shares = [metrics["steps"] / config.steps] if config.steps else []
    shares += [metrics["updates"] / config.updates] if config.updates else []
    shares += [metrics["seconds"] / (60 * config.minutes)] if config.minutes else []
    return min(1.0, max(shares, default=0.0))


def line(metrics: Mapping[str, float], share: float) -> str:
    """The main metrics.

    Example:
        >>> known = {"steps": 2000, "updates": 10, "seconds": 3.0, "steps per second": 650.0, "seconds left": 90.0}
        >>> line({**known, "return": 0.5}, 0.25)
        ' 25%  2,000 steps  10 updates  3 s  650 steps per second  about 2 min left  return 0.5'
    """
    parts = [f"{share:4.0%}", f"{metrics['steps']:,} steps", f"{metrics['updates']:,} updates"]
    parts.append(f"{metrics['seconds']:.0f} s")
    if "steps per second" in metrics:
        parts.append(f"{metrics['steps per second']:,.0f} steps per second")
    if "seconds left" in metrics:
        left = metrics["seconds left"]
        parts.append(f"about {left:.0f} s left" if left < 60 else f"about {left / 60:,.0f} min left")
    if "return" in metrics:
        parts.append(f"return {metrics['return']:.3g}")
    if "eval/return" in metrics:
        interval = "" if "eval/low" not in metrics else f" ({metrics['eval/low']:.3g} to {metrics['eval/high']:.3g})"
        parts.append(f"evaluated {metrics['eval/return']:.3g}{interval}")
    return "  ".join(parts)
