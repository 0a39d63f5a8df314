"""The PNG and the GIF of ``imagine``."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.pictures.bands import (
    IMAGINED,
    MARGIN,
    OBSERVED,
    PERSISTENCE,
    RECONSTRUCTED,
    ROW_COLOURS,
    ROWS,
    Band,
    Panel,
    bands,
    finish,
    header,
    strip,
    time_axis,
)
from worldmodel.runs.optional_dependencies import require

_RIGHT, _TOP, _CAPTION, _BOTTOM, _GAP = 0.25, 0.4, 0.26, 0.6, 0.1  # inches
_LEGEND = 0.3  # inches per row
_FILM_COLOURS = 256


def draw_png(title: str, panels: Sequence[Panel], path: Path | None, width: float = 12.5, dpi: int = 120) -> Any:
    """Draws all episodes as uint8 (height, width, 3), and writes the PNG ``path``, if any.

    ``width`` is in inches. Raises MissingPackage without matplotlib, or imageio for a file.
    """
    with plain_style():
        inside = width - MARGIN - _RIGHT
        strips = {id(panel): [strip(panel, name, inside) for name in panel.renderers] for panel in panels}
        blocks = [(panel, [header(panel), *strips[id(panel)], *bands(panel)]) for panel in panels]
        legends = _legends(panels)
        page = _Page(width, sum(_height(parts) for _, parts in blocks), len(legends), dpi)
        page.title(title)
        for panel, parts in blocks:
            page.caption(panel.title)
            page.stack(panel, parts, inside)
        page.legends(legends)
        picture = page.pixels()
    if path is not None:
        require("imageio.v3", "write pictures").imwrite(path, picture, extension=".png")
    page.close()
    return picture


def draw_gif(title: str, panels: Sequence[Panel], path: Path, fps: float, width: float = 10, dpi: int = 80) -> None:
    """Draws all episodes in parallel, ``fps`` steps per second. Raises MissingPackage without matplotlib or imageio."""
    image = require("PIL.Image", "write pictures")  # imageio needs it
    with plain_style():
        frames = [image.fromarray(frame) for frame in _frames(title, panels, width, dpi)]
    # One palette: unchanged pixels are stored once.
    sample = image.fromarray(np.concatenate([np.asarray(frames[i]) for i in (0, len(frames) // 2, -1)]))
    palette = sample.quantize(_FILM_COLOURS, method=image.Quantize.MEDIANCUT, dither=image.Dither.NONE)
    first, *others = (frame.quantize(palette=palette, dither=image.Dither.NONE) for frame in frames)
    durations = [round(1000 / fps)] * len(others) + [2000]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False)


def plain_style() -> Any:
    """Matplotlib's own: it reads settings from the working directory, which may be somebody's run."""
    return require("matplotlib.style", "draw pictures").context("default", after_reset=True)


def _frames(title: str, panels: Sequence[Panel], width: float, dpi: int) -> Iterator[np.ndarray]:
    legends = _legends(panels)
    inside, picture = width - MARGIN - _RIGHT, (width - 0.2) / 3 - 0.1
    films = {id(panel): len(panel.renderers) * (picture + 0.62) for panel in panels}
    blocks = [(panel, [header(panel), *bands(panel)]) for panel in panels]
    page = _Page(width, sum(films[id(panel)] + _height(parts) for panel, parts in blocks), len(legends), dpi)
    page.title(title)
    moving: list[_Overlay | _Film] = []
    for panel, parts in blocks:
        page.caption(panel.title)
        moving += [_Film(page, panel, name, picture) for name in panel.renderers]
        moving += [_Overlay(axes, panel) for axes in page.stack(panel, parts, inside)]
    page.legends(legends)
    for step in range(max(panel.steps for panel in panels)):
        with page.over_what_stays():
            for part in moving:
                part.show(min(step, part.panel.steps - 1))
        yield page.pixels()
    page.close()


class _Overlay:
    def __init__(self, axes: Any, panel: Panel) -> None:
        self.panel = panel
        patches = require("matplotlib.patches", "draw pictures")
        transform = axes.get_xaxis_transform()
        self._cover = patches.Rectangle(
            (0, -0.02), panel.steps, 1.04, transform=transform, color="white", alpha=0.86, lw=0, animated=True
        )
        axes.add_patch(self._cover)
        self._line = axes.axvline(0, color=OBSERVED, lw=1, animated=True)

    def show(self, step: int) -> None:
        self._cover.set_x(step + 0.5)
        self._line.set_xdata([step + 0.5] * 2)
        for part in (self._cover, self._line):
            part.axes.draw_artist(part)


class _Film:
    def __init__(self, page: "_Page", panel: Panel, name: str, inches: float) -> None:
        self.panel, self.name = panel, name
        first = panel.picture(name, "observed", 0)
        assert first is not None
        self._empty = np.full_like(first, 238)
        self._images = []
        top = page.top
        for index, row in enumerate(ROWS):
            page.top = top
            axes = page.axes(0.15 + index * (inches + 0.1), inches, inches, gap=0.3)
            self._images.append(axes.imshow(first, interpolation="nearest", animated=True))
            axes.set_title(row, fontsize=10, color=ROW_COLOURS[index], pad=4, weight="bold")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(ROW_COLOURS[index])
            style = {"transform": axes.transAxes, "color": OBSERVED, "fontsize": 10, "animated": True}
        page.top += 0.32
        self._words = axes.text(0.5, 0.5, "it observes", ha="center", va="center", **style)
        self._time = axes.text(0, -0.04, "", ha="left", va="top", weight="bold", **style)

    def show(self, step: int) -> None:
        panel = self.panel
        for image, row in zip(self._images, ROWS, strict=True):
            picture = panel.picture(self.name, row, step)
            image.set_data(self._empty if picture is None else picture)
            image.axes.draw_artist(image)
        observing = step < panel.context
        ahead = step - panel.context + 1
        self._time.set_text(f"t={step}  " + ("observed" if observing else f"imagined, {ahead} ahead"))
        self._time.set_color(RECONSTRUCTED if observing else IMAGINED)
        for words in (self._time, self._words)[: 1 + observing]:
            words.axes.draw_artist(words)


class _Page:
    """A figure filled from the top, in inches."""

    def __init__(self, width: float, blocks: float, legends: int, dpi: int) -> None:
        height = blocks + _TOP + legends * _LEGEND
        agg = require("matplotlib.backends.backend_agg", "draw pictures")
        figure = require("matplotlib.figure", "draw pictures")
        self.width, self.height, self.top = width, height, 0.0
        self.figure = figure.Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        self._canvas = agg.FigureCanvasAgg(self.figure)
        self._still: Any = None

    def title(self, text: str) -> None:
        self.text(text, 0.15, 0.2, 12, weight="bold")
        self.top = _TOP

    def caption(self, text: str) -> None:
        self.text(text, 0.15, self.top + 0.12, 10)
        self.top += _CAPTION

    def text(
        self, text: str, left: float, down: float, size: float, colour: str = OBSERVED, weight: str = "normal"
    ) -> float:
        """``down`` is inches from the top; returns the right end."""
        position = (left / self.width, 1 - down / self.height)
        drawn = self.figure.text(*position, text, ha="left", va="center", fontsize=size, weight=weight, color=colour)
        return float(drawn.get_window_extent(self._canvas.get_renderer()).x1) / self.figure.dpi

    def axes(self, left: float, width: float, height: float, gap: float = _GAP) -> Any:
        self.top += gap
        bottom = self.height - self.top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        self.top += height
        return self.figure.add_axes(box)

    def stack(self, panel: Panel, parts: Sequence[Band], inside: float) -> list[Any]:
        """Returns the axes without the header's."""
        stacked = []
        for band in parts:
            self.top += band.above
            axes = self.axes(MARGIN, inside, band.height)
            band.draw(axes)
            finish(axes, panel)
            stacked.append(axes)
        time_axis(axes)
        self.top += _BOTTOM
        return stacked[1:]

    def legends(self, rows: Sequence["_Legend"]) -> None:
        for index, row in enumerate(rows):
            middle = (len(rows) - index - 0.5) * _LEGEND
            row.draw(self, middle)

    @contextlib.contextmanager
    def over_what_stays(self) -> Iterator[None]:
        """The static background is rendered once."""
        if self._still is None:
            self._canvas.draw()
            self._still = self._canvas.copy_from_bbox(self.figure.bbox)
        self._canvas.restore_region(self._still)
        yield

    def pixels(self) -> np.ndarray:
        """Uint8 (height, width, 3)."""
        if self._still is None:
            self._canvas.draw()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()

    def close(self) -> None:
        self.figure.clear()


@dataclasses.dataclass
class _Legend:
    samples: list[tuple[Any, str]]

    def draw(self, page: _Page, middle: float) -> None:
        lines = require("matplotlib.lines", "draw pictures")
        left, end = 0.15, page.width - 1.3
        for index, (sample, name) in enumerate(self.samples):
            if left > end:
                left = page.text(
                    f"and {len(self.samples) - index} more", left, page.height - middle, 9, colour=PERSISTENCE
                )
                break
            if sample is None:
                start = left
            elif isinstance(sample, dict):
                x = [left / page.width, (left + 0.3) / page.width]
                page.figure.add_artist(lines.Line2D(x, [middle / page.height] * 2, **sample))
                start = left + 0.36
            else:
                box = (left / page.width, (middle - 0.1) / page.height, 0.2 / page.width, 0.2 / page.height)
                axes = page.figure.add_axes(box)
                axes.imshow(sample, interpolation="nearest")
                axes.set_axis_off()
                start = left + 0.26
            left = page.text(name, start, page.height - middle, 9) + 0.22


def _legends(panels: Sequence[Panel]) -> list[_Legend]:
    lines = [
        ({"color": OBSERVED, "lw": 1.8}, "observed"),
        ({"color": RECONSTRUCTED, "lw": 1.5, "ls": (0, (3, 1.5))}, "reconstructed, from the observation of that step"),
        ({"color": IMAGINED, "lw": 2}, "imagined, open loop"),
        ({"color": PERSISTENCE, "lw": 1.5, "ls": ":"}, "error of the persistence baseline"),
    ]
    found = [_Legend(lines)]
    for name, renderer in panels[0].renderers.items():
        views = [views[name] for panel in panels for views in (panel.observed, panel.reconstructed, panel.imagined)]
        samples = renderer.legend(views)
        if samples:
            found.append(_Legend(samples))
        if renderer.note:
            found.append(_Legend([(None, renderer.note)]))
    return found


def _height(parts: Sequence[Band]) -> float:
    return sum(part.height + part.above + _GAP for part in parts) + _CAPTION + _BOTTOM
