"""``plot``: curves of runs' metrics."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldmodel.commands.command_line import parse
from worldmodel.pictures.curves import Curve, draw_curves
from worldmodel.runs.fields import Checked, ConfigurationError, Text, check_writable
from worldmodel.runs.run import Run, RunError

_X = {"steps": ("steps", 1.0), "updates": ("updates", 1.0), "minutes": ("seconds", 60.0)}
# Metrics that are drawn together.
_DEFAULTS: tuple[tuple[str, ...], ...] = (
    ("eval/return",),
    ("episode/return",),
    ("loss/model",),
    ("held_out/action", "loss/action"),
    ("loss/action",),
)
_SETTINGS = ("train", "world", "imitation")  # parts of config.json
# What may differ between runs that are drawn as one; limits only end a curve.
_ALIKE = {"seed", "steps", "updates", "minutes", "clock", "threads", "device", "chunk_steps", "log_seconds"}
_ALIKE |= {"save_minutes", "open_loop_minutes", "eval_minutes", "eval_episodes", "environment_state"}
_MOST_NAMED = 3  # differences in a label


@dataclasses.dataclass
class PlotOptions(Checked):
    """Draws metrics of one or more runs as a PNG.

    Runs whose settings differ in the seed alone have one colour, and their mean is drawn as well. Labels say in what
    else the settings differ.
    """

    runs: tuple[Path, ...]
    """Folders of the runs."""
    metric: tuple[Text, ...] = ()
    """Names of metrics, as in metrics.jsonl. If not given, the first of eval/return, episode/return, loss/model,
    held_out/action with loss/action, loss/action that every run has."""
    x: Literal["steps", "updates", "minutes"] = "steps"
    """What the curves run over."""
    output: Path = Path("curves.png")
    """File of the picture."""


def command(arguments: Sequence[str]) -> int:
    """Draws curves."""
    options = parse(PlotOptions, arguments, "plot")
    if not options.runs:
        raise ConfigurationError("plot: the folder of a run is missing")
    check_writable("--output", options.output)
    runs = [Run(folder) for folder in options.runs]
    metrics = options.metric or _shared_metrics(runs)
    curves = []
    for metric in metrics:
        for run, label in zip(runs, labels_of(runs), strict=True):
            named = label if len(metrics) == 1 else f"{label}, {metric}"
            curves.append(curve_of(run, metric, options.x, named))
    draw_curves(curves, options.output, options.x, ", ".join(metrics))
    print(options.output)
    return 0


def _shared_metrics(runs: Sequence[Run]) -> tuple[str, ...]:
    known = [{name for line in run.metrics for name in line} for run in runs]
    for metrics in _DEFAULTS:
        if all(names.issuperset(metrics) for names in known):
            return metrics
    listed = ", ".join(" with ".join(metrics) for metrics in _DEFAULTS)
    raise RunError(f"none of {listed} is in every run: --metric names another")


def curve_of(run: Run, metric: str, x: str, label: str) -> Curve:
    """Raises RunError if the run has no such metric."""
    name, unit = _X[x]
    metrics = run.metrics
    lines = [line for line in metrics if metric in line and name in line]
    if not lines:
        known = sorted({name for line in metrics for name in line})
        said = f"it has {', '.join(known)}" if known else "it has no metrics yet"
        raise RunError(f"{run.folder} has no metric {metric!r}: {said}")

    def values(key: str) -> np.ndarray:
        return np.array([line[key] for line in lines], float)

    bounded = metric == "eval/return" and all({"eval/low", "eval/high"} <= line.keys() for line in lines)
    low, high = (values("eval/low"), values("eval/high")) if bounded else (None, None)
    return Curve(label, values(name) / unit, values(metric), low, high)


def labels_of(runs: Sequence[Run]) -> list[str]:
    """The environment and, where runs of it differ in more than the seed, the settings that do.

    Two runs have the same label if their settings are the same, and only then.
    """
    settings = [_settings(run) for run in runs]
    labels: list[str] = []
    for number, own in enumerate(settings):
        first = settings.index(own)
        if first < number:
            labels.append(labels[first])
            continue
        env = own.get("env") or own.get("data")
        peers = [other for other in settings if (other.get("env") or other.get("data")) == env]
        named = sorted({path for peer in peers for path in own.keys() | peer.keys() if own.get(path) != peer.get(path)})
        said = [f"{path}={own.get(path)}" for path in named[:_MOST_NAMED]]
        rest = [f"{len(named) - _MOST_NAMED} more: {runs[number].folder.name}"] if len(named) > _MOST_NAMED else []
        label = ", ".join([str(env).rpartition(":")[2], *said, *rest])
        labels.append(f"{label}, {runs[number].folder}" if label in labels else label)
    return labels


def _settings(run: Run) -> dict[str, Any]:
    """Settings of training by their path, without what may differ between runs that are drawn as one."""
    settings: dict[str, Any] = next(
        (run.config[part] for part in _SETTINGS if isinstance(run.config.get(part), dict)), {}
    )
    kept = {name: value for name, value in settings.items() if name not in _ALIKE}
    if isinstance(kept.get("train"), dict):  # of a run of imitate or train-world; its steps are a batch's
        kept["train"] = {name: value for name, value in kept["train"].items() if name not in _ALIKE - {"steps"}}
    return dict(_leaves(kept, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}.{name}".lstrip("."))
    else:
        yield path, value
