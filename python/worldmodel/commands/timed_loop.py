"""The loop of a training that ends by its minutes or updates."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from worldmodel.commands.interrupt import Interrupt
from worldmodel.learning.metrics import MetricMeans
from worldmodel.learning.trainer import TrainingFailed
from worldmodel.runs.run import Run


class TimedTraining(Protocol):
    """Such as a ``Timed`` with a state."""

    updates: int
    seconds: float

    @property
    def finished(self) -> bool: ...
    def iterate(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...


def timed_loop(
    trainer: TimedTraining,
    run: Run,
    interrupt: Interrupt,
    log_seconds: float,
    save_seconds: float = float("inf"),
    *,
    named: Callable[[str], str] = str,
    measure: Callable[[], Mapping[str, float]] = dict,
    shown: Sequence[str] | None = None,
) -> None:
    """Trains, logs and saves until the limit, or an interrupt.

    Args:
        trainer: that trains.
        run: its run; "steps" of its metrics and checkpoints are updates.
        interrupt: ends the loop after an update.
        log_seconds: between lines of metrics.
        save_seconds: between checkpoints; the last is written at the end.
        named: what a metric of the trainer is called in the log.
        measure: called after each update; the metrics that it returns, if any, are logged at once.
        shown: names of the metrics that are printed as well, beside steps and seconds; all if None.

    Raises:
        TrainingFailed: a loss or gradient that is not finite.
    """
    means = MetricMeans()
    logged = saved = time.perf_counter()
    ended = trainer.finished
    while not ended:
        try:
            means.add({named(name): value for name, value in trainer.iterate().items()})
        except ArithmeticError as error:
            kept = f"the newest checkpoint is {run.checkpoints[-1]}" if run.checkpoints else "nothing was saved yet"
            raise TrainingFailed(f"{error}; {kept}") from error
        ended = trainer.finished or interrupt.requested
        measured = measure()
        now = time.perf_counter()
        if measured or ended or now - logged >= log_seconds:
            logged = now
            counts = {"steps": trainer.updates, "updates": trainer.updates, "seconds": round(trainer.seconds, 3)}
            metrics = {**counts, **means.means(), **measured}
            run.log(metrics)
            names = ("steps", "seconds", *(set(metrics) - {*counts} if shown is None else shown))
            said = " ".join(f"{name} {metrics[name]:.4g}" for name in metrics if name in names)
            print(said, file=sys.stderr, flush=True)
        if now - saved >= save_seconds:
            saved = now
            run.save(trainer.updates, trainer.state_dict())
    run.save(trainer.updates, trainer.state_dict())
