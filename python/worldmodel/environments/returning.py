"""How well what comes back into view is foreseen, by how long it was out of view; and baselines that learn nothing.

A predictor takes a part of a rollout of ``Worlds``, in order, and returns classes of the cells of each following view.
It may read ``tokens``, ``actions``, ``displacement``, ``heading`` and ``elapsed`` up to a step for that step's view.

    >>> from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
    >>> worlds = RoomWorlds(8, RoomsConfig(), torch.Generator().manual_seed(0))
    >>> scores = score(worlds, baselines(worlds), 256)
    >>> round(scores["cell map"].accuracy, 3), scores["chance"].accuracy < 0.3
    (1.0, True)
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.environments.grids import Worlds, turned, window

Steps = Mapping[str, Tensor]
Predictor = Callable[[Steps], Tensor]

GAPS = ((1, 8), (9, 32), (33, 128), (129, 512), (513, 2048), (2049, None))
_EDGES = [low for low, _ in GAPS]
BUCKETS = tuple(f"{low}-{high}" if high else f"{low}+" for low, high in GAPS)


class Score:
    """Cells that were foreseen rightly, and all cells, of the following kinds; changes at the same step do not count.

    - by ``BUCKETS``: inside and back in view after so many steps, never changed;
    - by ``BUCKETS``, edited: the same, of cells that were changed since the beginning;
    - in view: inside, and in the view before; new: inside, and never seen;
    - outside: of the border, or without a block.

    Attributes:
        right, cells: int64 (2, len(BUCKETS) + 3); rows: unchanged and edited; the last columns are the other kinds.
    """

    def __init__(self) -> None:
        self.right, self.cells = torch.zeros(2, 2, len(BUCKETS) + 3, dtype=torch.int64)

    def add(self, predicted: Tensor, steps: Steps) -> None:
        """Counts ``predicted`` classes, (..., places), of the following views in ``steps``.

        Raises:
            ValueError: another shape.
        """
        truth, gap = steps["next_tokens"], steps["gap"]
        if predicted.shape != truth.shape:
            raise ValueError(f"Score: predicted has shape {tuple(predicted.shape)}, expected {tuple(truth.shape)}")
        kind = torch.bucketize(gap, torch.tensor(_EDGES), right=True) - 1
        kind = torch.where(gap == 0, len(BUCKETS), torch.where(gap < 0, len(BUCKETS) + 1, kind))
        kind = torch.where(steps["inside"], kind, len(BUCKETS) + 2)
        kind = kind + steps["edited"] * self.cells.shape[1]
        counted = ~steps["fresh"]
        for total, cells in ((self.cells, counted), (self.right, counted & (predicted == truth))):
            total += torch.bincount(kind[cells], minlength=total.numel()).view_as(total)

    @property
    def accuracy(self) -> float:
        """Of all that came back into view; NaN if nothing did."""
        returned = slice(len(BUCKETS))
        return _share(self.right[:, returned].sum(), self.cells[:, returned].sum())

    def by_gap(self) -> dict[str, float]:
        """Accuracy by bucket, edited cells included; NaN where there is no cell."""
        columns = zip(BUCKETS, self.right.sum(0), self.cells.sum(0), strict=False)
        return {name: _share(right, cells) for name, right, cells in columns}

    def to_json(self) -> dict[str, Any]:
        """Cells and accuracy of each kind; kinds without cells are left out."""
        kinds = [*BUCKETS, "in view", "new", "outside"]
        told: dict[str, Any] = {}
        for prefix, right, cells in zip(("", "edited "), self.right, self.cells, strict=True):
            for name, count, of in zip(kinds, right.tolist(), cells.tolist(), strict=True):
                if of:
                    told[prefix + name] = {"cells": of, "accuracy": count / of}
        returned, edited = (int(self.cells[rows, : len(BUCKETS)].sum()) for rows in (slice(2), 1))
        told |= {"returning": {"cells": returned, "accuracy": self.accuracy}} if returned else {}
        if edited:
            right = int(self.right[1, : len(BUCKETS)].sum())
            told["returning, edited"] = {"cells": edited, "accuracy": right / edited}
        return told


def _share(right: Tensor, cells: Tensor) -> float:
    return int(right) / int(cells) if cells else float("nan")


def score(worlds: Worlds, predictors: Mapping[str, Predictor], steps: int, chunk: int = 256) -> dict[str, Score]:
    """Scores ``predictors`` on the next ``steps`` steps of ``worlds``, all on the same ones, ``chunk`` at a time."""
    scores = {name: Score() for name in predictors}
    for start in range(0, steps, chunk):
        happened = worlds.rollout(min(chunk, steps - start))
        for name, predictor in predictors.items():
            scores[name].add(predictor(happened), happened)
    return scores


def table(scores: Mapping[str, Score]) -> str:
    """Accuracies in percent as a table of text, a row per score.

    Example:
        >>> print(table({"nothing": Score()}))
                    1-8    9-32  33-128 129-512 513-2048   2049+     all     new in view
        nothing       -       -       -       -        -       -       -       -       -
    """
    heads = [*BUCKETS, "all", "new", "in view"]
    width = max(map(len, scores), default=0)
    lines = [" " * width + "".join(f" {head:>{max(len(head), 7)}}" for head in heads)]
    for name, found in scores.items():
        told = found.to_json()
        values = [*found.by_gap().values(), *(told.get(k, {}).get("accuracy") for k in ("returning", "new", "in view"))]
        texts = ["-" if value is None or value != value else f"{100 * value:.3f}" for value in values]
        columns = (f" {text:>{max(len(head), 7)}}" for head, text in zip(heads, texts, strict=True))
        lines.append(f"{name:<{width}}" + "".join(columns))
    return "\n".join(lines)


def baselines(worlds: Worlds) -> dict[str, Predictor]:
    """What needs no learning, by name; all begin where ``worlds`` are.

    - chance: the most frequent class of the cells inside;
    - persistence: the view before;
    - cell map: what was last seen in each cell, by position and heading, else chance;
    - oracle: the truth of all that was ever seen, else chance.
    """
    chance = Chance(worlds.config.classes)
    return {
        "chance": chance,
        "persistence": lambda steps: steps["tokens"],
        "cell map": CellMap(worlds),
        "oracle": lambda steps: torch.where(steps["gap"] >= 0, steps["next_tokens"], chance.best),
    }


class Chance:
    """The most frequent class of the cells inside.

    Attributes:
        best: that class, so far.
    """

    def __init__(self, classes: int) -> None:
        self._counts = torch.zeros(classes, dtype=torch.int64)

    @property
    def best(self) -> Tensor:
        return self._counts.argmax()

    def __call__(self, steps: Steps) -> Tensor:
        self._counts += torch.bincount(steps["next_tokens"][steps["inside"]], minlength=len(self._counts))
        return self.best.expand_as(steps["next_tokens"])


class CellMap:
    """What was last seen in each cell: a map that is overwritten, for agents that know where they are.

    Agents of one world share a map. It ends where ``worlds.map`` does, and goes round.
    """

    def __init__(self, worlds: Worlds) -> None:
        self._side, self._agents = worlds.side, worlds.agents
        self._at = worlds.positions.numpy()  # (batch, agents, 2)
        self._map = np.full((worlds.batch, self._side**2), -1)
        self._offsets = turned(window(worlds.config.view))  # (4, places, 2)
        self._chance = Chance(worlds.config.classes)

    def __call__(self, steps: Steps) -> Tensor:
        constant = self._chance(steps)
        several = {name: value if self._agents > 1 else value[:, None] for name, value in steps.items()}
        tokens, moves = several["tokens"].numpy(), several["displacement"].numpy().astype(np.int64)
        still = torch.zeros(tokens.shape[:3], dtype=torch.int64)
        before, after = (several.get(name, still).numpy() for name in ("heading", "next_heading"))
        worlds = np.arange(len(tokens))[:, None, None]
        known = np.empty_like(tokens)
        for t in range(tokens.shape[2]):
            self._map[worlds, self._cells(before[:, :, t])] = tokens[:, :, t]
            self._at = self._at + moves[:, :, t]
            known[:, :, t] = self._map[worlds, self._cells(after[:, :, t])]
        found = torch.from_numpy(known if self._agents > 1 else known[:, 0])
        return torch.where(found >= 0, found, constant)

    def _cells(self, headings: np.ndarray) -> np.ndarray:
        """Indices into the map of what agents with ``headings`` see, (batch, agents, places)."""
        return (self._at[:, :, None] + self._offsets[headings]) % self._side @ [self._side, 1]
