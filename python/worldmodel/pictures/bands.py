"""Bands of an open-loop picture: plots of one episode above a common time axis."""

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from worldmodel.data.spaces import ROOT, Modality
from worldmodel.model.open_loop import UNITS, OpenLoop, error
from worldmodel.pictures.renderers import Renderer, class_colours

OBSERVED, RECONSTRUCTED, IMAGINED, PERSISTENCE = "#24292f", "#3b82f6", "#e8590c", "#8b949e"
OBSERVED_SHADE, IMAGINED_SHADE = "#e7f0fd", "#fdf1e8"
ROWS = ("observed", "reconstructed", "imagined")
ROW_COLOURS = (OBSERVED, RECONSTRUCTED, IMAGINED)
MARGIN = 2.3  # inches left of the axes
_COLUMNS = 16  # pictures per strip
_PICTURE = 1.25  # inches, widest
_CURVES = 6  # vector entries with an axis each
_STRIPS = 6  # categorical entries drawn


@dataclasses.dataclass
class Panel:
    """One episode of an ``OpenLoop``, whose fields lose the dimension of rows.

    Attributes:
        errors: of imagination, in ``UNITS``.
        persistence_errors: of the last observed step, held constant.
    """

    title: str
    modalities: dict[str, Modality]
    renderers: dict[str, Renderer]
    context: int
    observed: dict[str, np.ndarray]
    reconstructed: dict[str, np.ndarray]
    imagined: dict[str, np.ndarray]
    rewards: np.ndarray
    predicted_rewards: np.ndarray
    ends: np.ndarray
    predicted_ends: np.ndarray
    errors: dict[str, np.ndarray]
    reconstruction_errors: dict[str, np.ndarray]
    persistence_errors: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, title: str, loop: OpenLoop, row: int, modalities: dict[str, Modality], renderers: dict[str, Renderer]
    ) -> "Panel":
        steps, context = int(loop.valid[row].sum()), loop.context
        last = {name: loop.observed[name][row, context - 1] for name in modalities}

        def cut(values: dict[str, Tensor], length: int) -> dict[str, np.ndarray]:
            return {name: values[name][row, :length].cpu().numpy() for name in modalities}

        def off(predicted: Callable[[str], Tensor], start: int) -> dict[str, np.ndarray]:
            observed = {name: loop.observed[name][row, start:steps] for name in modalities}
            return {
                name: error(modality, predicted(name).expand_as(observed[name]), observed[name]).cpu().numpy()
                for name, modality in modalities.items()
            }

        def outcome(values: Tensor) -> np.ndarray:
            return values[row, : steps - 1].cpu().numpy()

        return cls(
            title=title,
            modalities=modalities,
            renderers=renderers,
            context=context,
            observed=cut(loop.observed, steps),
            reconstructed=cut(loop.reconstructed, steps),
            imagined=cut(loop.imagined, steps - context),
            rewards=outcome(loop.rewards),
            predicted_rewards=outcome(loop.predicted_rewards),
            ends=outcome(loop.ends),
            predicted_ends=outcome(loop.predicted_ends),
            errors=off(lambda name: loop.imagined[name][row, : steps - context], context),
            reconstruction_errors=off(lambda name: loop.reconstructed[name][row, :steps], 0),
            persistence_errors=off(lambda name: last[name], context),
        )

    @property
    def steps(self) -> int:
        return len(self.rewards) + 1

    def view(self, name: str, row: str, step: int) -> np.ndarray | None:
        """Encoded array of ``row``, one of ``ROWS``; None for imagination within the context."""
        if row == "imagined":
            return self.imagined[name][step - self.context] if step >= self.context else None
        return (self.observed if row == "observed" else self.reconstructed)[name][step]

    def picture(self, name: str, row: str, step: int) -> np.ndarray | None:
        """``view`` as uint8 (height, width, 3), with errors marked."""
        array = self.view(name, row, step)
        truth = None if row == "observed" else self.observed[name][step]
        return None if array is None else self.renderers[name].render(array, truth)


@dataclasses.dataclass
class Band:
    """A plot in the stack; ``draw`` takes its axes.

    Attributes:
        height: inches.
        above: inches for labels on top.
    """

    height: float
    draw: Callable[[Any], None]
    above: float = 0.0


def header(panel: Panel) -> Band:
    """Labels the observed and imagined steps."""

    def draw(axes: Any) -> None:
        edge = panel.context - 0.5
        axes.axvspan(-0.5, edge, color=OBSERVED_SHADE, lw=0)
        axes.set_ylim(0, 1)
        steps = f"observed, {panel.context} step{'s' if panel.context > 1 else ''}"
        axes.text(edge, 0.5, f"{steps}  ", ha="right", va="center", color=RECONSTRUCTED, fontsize=9, weight="bold")
        text = f"  open loop, {panel.steps - panel.context} steps: the actions alone"
        axes.text(edge, 0.5, text, ha="left", va="center", color=IMAGINED, fontsize=9, weight="bold")
        axes.set_axis_off()

    return Band(0.24, draw)


def strip(panel: Panel, name: str, inches: float) -> Band:
    """Three rows of pictures; ``inches`` is the axes' width."""
    stride = -(-panel.steps // _COLUMNS)
    before, after = range(panel.context - 1, stride - 2, -stride), range(panel.context - 1, panel.steps, stride)
    shown = sorted({*before, *after})
    first = panel.picture(name, "observed", 0)
    assert first is not None
    step = inches / panel.steps
    width = min(0.94 * stride * step, _PICTURE)  # inches
    height = width * first.shape[0] / first.shape[1]
    pitch = height + 0.06

    def draw(axes: Any) -> None:
        axes.set_ylim(3 * pitch, 0)
        for time in shown:
            # Each column ends at its step.
            middle = time + 0.5 - stride / 2
            for index, row in enumerate(ROWS):
                picture = panel.picture(name, row, time)
                if picture is not None:
                    left, top = middle - width / 2 / step, index * pitch + 0.03
                    extent = (left, left + width / step, top + height, top)
                    axes.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased", zorder=3)
        axes.set_xlim(-0.5, panel.steps - 0.5)
        axes.set_ylim(3 * pitch, 0)
        _row_labels(axes, [(index + 0.5) * pitch for index in range(3)])
        axes.xaxis.tick_top()
        axes.set_xticks([time + 0.5 - stride / 2 for time in shown], [f"t={time}" for time in shown], fontsize=8)
        axes.tick_params(axis="x", length=0, pad=2)
        axes.spines[:].set_visible(False)
        if panel.context * step > 1.3:
            text = "nothing is imagined\nwhile it observes"
            axes.text(
                (panel.context - 1) / 2,
                2.5 * pitch,
                text,
                ha="center",
                va="center",
                color=PERSISTENCE,
                style="italic",
                size=8,
            )

    return Band(3 * pitch, draw, above=0.12)


def bands(panel: Panel) -> Iterator[Band]:
    """All bands but pictures."""
    for name, modality in panel.modalities.items():
        if modality.kind == "categorical":
            yield from (_classes(panel, name, entry) for entry in range(min(modality.shape[0], _STRIPS)))
        elif modality.kind == "vector" and modality.shape[0] <= _CURVES:
            yield from (_curve(panel, name, entry) for entry in range(modality.shape[0]))
        elif modality.kind == "vector":
            yield _map(panel, name)
    for name in panel.modalities:
        yield _error(panel, name)
    yield _rewards(panel)
    yield _ends(panel)


def label(name: str, modality: Modality, entry: int) -> str:
    """Label of an entry."""
    own = "" if name == ROOT else name
    index = f"[{entry}]" if modality.shape[0] > 1 else ""
    more = (
        f"\n(of {modality.shape[0]} entries)" if modality.kind == "categorical" and modality.shape[0] > _STRIPS else ""
    )
    return f"{own or 'observation'}{index}{more}"


def _classes(panel: Panel, name: str, entry: int) -> Band:
    start = (*panel.modalities[name].starts, *[0] * panel.modalities[name].shape[0])[entry]

    def draw(axes: Any) -> None:
        cells = np.ones((3, panel.steps, 4))
        for index, row in enumerate(ROWS):
            for time in range(panel.steps):
                array = panel.view(name, row, time)
                if array is None:
                    cells[index, time, 3] = 0
                    continue
                value, right = int(array[entry]), array[entry] == panel.observed[name][time][entry]
                colour = class_colours(np.array(value)) / 255
                cells[index, time, :3] = colour if right else 0.7 + 0.3 * colour
                if panel.steps <= 50:
                    style = {"color": "white"} if right else {"color": "#c4122f", "weight": "bold"}
                    axes.text(time, index + 0.53, value + start, ha="center", va="center", fontsize=7, **style)
        extent = (-0.5, panel.steps - 0.5, 3, 0)
        axes.imshow(cells, aspect="auto", interpolation="nearest", extent=extent, zorder=2)
        axes.hlines(range(4), -0.5, panel.steps - 0.5, color="white", lw=2, zorder=3)
        if panel.steps <= 50:
            axes.vlines(np.arange(panel.steps + 1) - 0.5, 0, 3, color="white", lw=1.2, zorder=3)
        axes.set_ylim(3, 0)
        _row_labels(axes, [0.5, 1.5, 2.5])
        _name(axes, label(name, panel.modalities[name], entry))
        axes.set_xticks([])
        axes.spines[:].set_visible(False)

    return Band(0.6, draw)


def _curve(panel: Panel, name: str, entry: int) -> Band:
    def draw(axes: Any) -> None:
        times = np.arange(panel.steps)
        axes.plot(times, panel.observed[name][:, entry], color=OBSERVED, lw=1.6)
        axes.plot(times, panel.reconstructed[name][:, entry], color=RECONSTRUCTED, lw=1.3, ls=(0, (3, 1.5)))
        axes.plot(times[panel.context :], panel.imagined[name][:, entry], color=IMAGINED, lw=1.9, marker=".", ms=4)
        _name(axes, label(name, panel.modalities[name], entry))
        _plain(axes)

    return Band(0.8, draw)


def _map(panel: Panel, name: str) -> Band:
    entries = panel.modalities[name].shape[0]

    def draw(axes: Any) -> None:
        rows = np.full((3 * entries, panel.steps), np.nan)
        rows[:entries] = panel.observed[name].T
        rows[entries : 2 * entries] = panel.reconstructed[name].T
        rows[2 * entries :, panel.context :] = panel.imagined[name].T
        most = float(np.quantile(np.abs(panel.observed[name]), 0.98)) or 1.0
        extent = (-0.5, panel.steps - 0.5, 3, 0)
        axes.imshow(
            rows, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest", extent=extent, zorder=3
        )
        for line in (1, 2):
            axes.axhline(line, color="white", lw=2, zorder=4)
        _row_labels(axes, [0.5, 1.5, 2.5])
        _name(axes, f"{'observation' if name == ROOT else name}\n{entries} entries,\n−{most:.3g} blue\n+{most:.3g} red")
        axes.set_xticks([])
        axes.spines[:].set_visible(False)

    return Band(1.8, draw)


def _error(panel: Panel, name: str) -> Band:
    def draw(axes: Any) -> None:
        times = np.arange(panel.steps)
        axes.plot(times[panel.context :], panel.persistence_errors[name], color=PERSISTENCE, lw=1.3, ls=":")
        axes.plot(times, panel.reconstruction_errors[name], color=RECONSTRUCTED, lw=1.3, ls=(0, (3, 1.5)))
        axes.plot(times[panel.context :], panel.errors[name], color=IMAGINED, lw=1.9, marker=".", ms=4)
        axes.set_ylim(0, max(1e-6, 1.12 * axes.get_ylim()[1]))
        own = "" if len(panel.modalities) == 1 else f" of {name}"
        _name(axes, "\n".join([f"error{own}", *textwrap.wrap(UNITS[panel.modalities[name].kind], 20)]))
        _plain(axes)

    return Band(0.95, draw)


def _rewards(panel: Panel) -> Band:
    def draw(axes: Any) -> None:
        times = np.arange(panel.steps - 1)
        axes.bar(times, panel.rewards, 0.72, color=OBSERVED, alpha=0.25, lw=0)
        for start, stop, colour in ((0, panel.context, RECONSTRUCTED), (panel.context - 1, panel.steps, IMAGINED)):
            axes.plot(times[start:stop], panel.predicted_rewards[start:stop], color=colour, lw=1.4, marker=".", ms=4)
        axes.axhline(0, color=PERSISTENCE, lw=0.6)
        _name(axes, "reward\nbars: got")
        _plain(axes)
        low, high = axes.get_ylim()
        if high - low < 1e-3:
            axes.set_ylim(-0.1, 0.1)

    return Band(0.7, draw)


def _ends(panel: Panel) -> Band:
    def draw(axes: Any) -> None:
        times = np.arange(panel.steps - 1)
        axes.bar(times, panel.ends.astype(float), 0.72, color=OBSERVED, alpha=0.25, lw=0)
        for start, stop, colour in ((0, panel.context, RECONSTRUCTED), (panel.context - 1, panel.steps, IMAGINED)):
            axes.plot(times[start:stop], panel.predicted_ends[start:stop], color=colour, lw=1.4, marker=".", ms=4)
        axes.set_ylim(-0.06, 1.06)
        _name(axes, "probability\nof the end")
        _plain(axes)

    return Band(0.7, draw)


def finish(axes: Any, panel: Panel) -> None:
    """Common limits, and the line after the context."""
    edge = panel.context - 0.5
    axes.set_xlim(-0.5, panel.steps - 0.5)
    axes.axvspan(edge, panel.steps - 0.5, color=IMAGINED_SHADE, lw=0, zorder=-2)
    axes.axvline(edge, color=IMAGINED, lw=1.6, zorder=5)


def time_axis(axes: Any) -> None:
    """Labels the steps."""
    axes.tick_params(axis="x", labelbottom=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step t", fontsize=9)


def _row_labels(axes: Any, heights: list[float]) -> None:
    axes.set_yticks(heights, ROWS, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    for text, colour in zip(axes.get_yticklabels(), itertools.cycle(ROW_COLOURS), strict=False):
        text.set_color(colour)


def _name(axes: Any, text: str) -> None:
    offset = (8 - 72 * MARGIN, 0)
    style = {"ha": "left", "va": "center", "fontsize": 8.5, "color": OBSERVED}
    axes.annotate(text, (0, 0.5), xycoords="axes fraction", xytext=offset, textcoords="offset points", **style)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5, labelbottom=False)
    axes.locator_params(axis="y", nbins=3)
