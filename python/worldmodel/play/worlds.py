"""Worlds of a model, as the game plays them: places count from 0, the start is in the middle, classes have colours."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.acting.world import World
from worldmodel.environments.grids import MOST_COLOURS, NAMES, palette
from worldmodel.model.token_codecs import CodebookTokens
from worldmodel.model.views import HEADINGS
from worldmodel.play.game import BadCommand
from worldmodel.runs.lock import Lock


class ImaginedWorld:
    """A ``World`` as a ``game.PlayedWorld``.

    Attributes:
        world: that is played.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        config, codec = world.config, world.model.codec
        self.action_space, self.period, self.grid = world.action_space, world.size, config.grid
        self.bodies = len(world.bodies)
        self.turns = config.place is not None and config.place.turns
        self._patches: np.ndarray | None = None  # of pixels, by class
        if isinstance(codec, CodebookTokens):
            pixels = codec.codebook[: int(codec.used)].clamp(0, 1).mul(255).round().to(torch.uint8)
            self._patches = pixels.unflatten(1, (config.patch, config.patch, 3)).numpy()
            self.names = [f"patch {index + 1}" for index in range(len(self._patches))]
            self.colours = self._patches.mean((1, 2)).round().astype(np.uint8)
        else:
            self.names, self.colours = _classes(config.classes, world.about.get("env"))

    @property
    def steps(self) -> int:
        return self.world.time

    def view(self, body: int = 0) -> np.ndarray:
        return self.world.observe(body)

    def position(self, body: int = 0) -> tuple[int, int]:
        row, column = (self.world.bodies[body].position + self.period // 2).tolist()
        return (row % self.period, column % self.period) if self.period else (0, 0)

    def heading(self, body: int = 0) -> int:
        return int(self.world.bodies[body].state["place.heading"]) % HEADINGS if self.period else 0

    def step(self, action: int, body: int = 0) -> None:
        self.world.step(action, body)

    def wait(self, steps: int) -> None:
        self.world.wait(steps)

    def look(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centred = self._centred(places)
        values, certainty = self.world.look(centred)
        seen = self.world.last_seen.numpy()[tuple((centred + self.period // 2).T)]
        return np.minimum(values, len(self.colours) - 1), certainty, np.where(seen < 0, -1, self.steps - seen)

    def edit(self, place: tuple[int, int], value: int) -> None:
        if not all(0 <= at < self.period for at in place):
            raise BadCommand(
                f"there is no place {place[0]}, {place[1]} in a world of {self.period} x {self.period} places"
            )
        token = value if self._patches is None else self._patches[value]
        self.world.edit(self._centred(np.array(place)).tolist(), token)

    def fork(self) -> "ImaginedWorld":
        return ImaginedWorld(self.world.fork())

    def save(self, path: Path) -> None:
        self.world.save(path)

    def _centred(self, places: np.ndarray) -> np.ndarray:
        """As the world counts, from where it began."""
        return np.asarray(places) - self.period // 2


def _classes(count: int, env: Any) -> tuple[list[str], np.ndarray]:
    """Names and colours of classes, as the grid worlds have them."""
    if count > MOST_COLOURS + 1:
        hues = np.cos(2 * np.pi * np.arange(count)[:, None] * np.array([0.618, 0.381, 0.236]))
        return [f"class {index}" for index in range(count)], (255 * (0.5 + 0.45 * hues)).astype(np.uint8)
    names, colours = list(NAMES[: count - 1]), palette(count - 1)
    if env == "worldmodel/Drift-v0":
        return ["floor", *names], np.roll(colours, 1, 0)
    return [*names, "wall" if env == "worldmodel/Rooms-v0" else "grey"], colours


def create(run: Path, seed: int, size: int | None = None, bodies: int = 1) -> ImaginedWorld:
    """A new world of a run, of ``size`` places per side. Raises RunError, WorldError."""
    return ImaginedWorld(World.create(run, seed, size=size, bodies=bodies))


def load(path: Path) -> ImaginedWorld:
    """A saved world. Raises RunError."""
    return ImaginedWorld(World.load(path))


def lock(path: Path, new: bool = False) -> Lock:
    """That this process alone plays the file ``path``, ``new`` or there already, until it is released.

    Raises:
        RunError, OSError: as ``Lock``.
    """

    def refused(_: Path, owner: str) -> str:
        otherwise = "give --save another name" if new else "play a copy of the file"
        return f"{path} is being played by {owner}, and a world has one player: end that, or {otherwise}"

    return Lock(path.parent, f".{path.name}.lock", refused)
