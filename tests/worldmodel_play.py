"""A world to play in without a model: cells are drawn when they are first seen, and kept."""

import copy
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from worldmodel.environments.grids import MOVES, palette, turned, window
from worldmodel.runs.files import replacing

SIDE, VIEW, COLOURS, PATCH = 11, 5, 4, 3


class Painted:
    """A torus of colours; with ``pixels`` a place is 3 x 3 pixels. Of several bodies, each begins 3 rows further on."""

    def __init__(
        self, turns: bool = False, pixels: bool = False, seed: int = 0, bodies: int = 1, actions: int = 0
    ) -> None:
        self.bodies = bodies
        self.period, self.turns, self.pixels = SIDE, turns, pixels
        self.names = ["orange", "sky", "green", "yellow", "wall"]
        self.colours, self.grid = palette(COLOURS), (VIEW, VIEW)
        self.action_space = gymnasium.spaces.Discrete(actions or (3 if turns else 4))
        self.cells = np.random.default_rng(seed).integers(0, COLOURS, (SIDE, SIDE))
        self.seen = np.full((SIDE, SIDE), -1)
        self.at = np.array([[(5 + 3 * body) % SIDE, 5] for body in range(bodies)])
        self.head, self.steps = [0] * bodies, 0
        self._see()

    def _visible(self, body: int) -> tuple[np.ndarray, ...]:
        offsets = turned(window(VIEW))[self.head[body] if self.turns else 0]
        return tuple((self.at[body] + offsets).T % SIDE)

    def _see(self) -> None:
        for body in range(self.bodies):
            self.seen[self._visible(body)] = self.steps

    def view(self, body: int = 0) -> np.ndarray:
        view = self.cells[self._visible(body)].reshape(VIEW, VIEW)
        return self.colours[view].repeat(PATCH, 0).repeat(PATCH, 1) if self.pixels else view

    def position(self, body: int = 0) -> tuple[int, int]:
        return int(self.at[body, 0]), int(self.at[body, 1])

    def heading(self, body: int = 0) -> int:
        return self.head[body]

    def step(self, action: int, body: int = 0) -> Any:
        self.steps += 1
        if self.turns:
            self.head[body] = (self.head[body] + (0, 3, 1)[action]) % 4
            move = MOVES[self.head[body]] if action == 0 else MOVES[4]
        else:
            self.head[body] = action % 4
            move = MOVES[self.head[body]]
        self.at[body] = (self.at[body] + move) % SIDE
        self._see()

    def wait(self, steps: int) -> None:
        self.steps += steps
        self._see()

    def look(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        where = tuple(np.asarray(places).T)
        gap = np.where(self.seen[where] < 0, -1, self.steps - self.seen[where])
        return self.cells[where], np.where(gap < 0, 0, 0.9), gap

    def edit(self, place: tuple[int, int], value: int) -> None:
        if not (0 <= place[0] < SIDE and 0 <= place[1] < SIDE):
            raise ValueError(f"World: there is no place {place[0]}, {place[1]}, expected rows and columns below {SIDE}")
        self.cells[place] = value

    def fork(self) -> "Painted":
        return copy.deepcopy(self)

    def save(self, path: Path) -> None:
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, cells=self.cells, at=self.at, steps=self.steps, seen=self.seen)
