"""A world that is played, and its fork: commands in, pictures out, the same for a browser and a terminal."""

import base64
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from worldmodel.runs.files import RunError

MOST_WAIT = 100_000  # steps
MOST_SIDE = 96  # places per side of a map
KEYS = {
    "north": ["ArrowUp", "w"],
    "east": ["ArrowRight", "d"],
    "south": ["ArrowDown", "s"],
    "west": ["ArrowLeft", "a"],
    "ahead": ["ArrowUp", "w"],
    "left": ["ArrowLeft", "a"],
    "right": ["ArrowRight", "d"],
}
LETTERS = "1234567890ghijklnoprtuvyz"  # of other actions, in order: none means anything else; more have buttons alone


class PlayedWorld(Protocol):
    """What a world has to have to be played; places are (row, column) on its lattice.

    Attributes:
        steps: so far.
        bodies: agents in it.
        period: places per side of the lattice, which goes round; 0 for a world without a map, which cannot be edited.
        turns: whether actions are ahead, left and right, and views turn with the agent; else north, east, south, west.
        grid: rows and columns of places in a view.
        colours: uint8 (classes, 3), of what a place can be.
        names: of the classes.
        action_space: discrete.
    """

    bodies: int
    period: int
    turns: bool
    grid: tuple[int, int]
    colours: np.ndarray
    names: list[str]
    action_space: Any

    @property
    def steps(self) -> int: ...

    def view(self, body: int = 0) -> np.ndarray:
        """The present view: classes (rows, columns), or pixels uint8 (height, width, 3)."""
        ...

    def position(self, body: int = 0) -> tuple[int, int]: ...

    def heading(self, body: int = 0) -> int:
        """0 to 3, quarter turns clockwise from north."""
        ...

    def step(self, action: int, body: int = 0) -> Any: ...

    def wait(self, steps: int) -> Any: ...

    def look(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes (n,), certainty (n,) from 0 to 1, and gap (n,): steps since seen, -1 never."""
        ...

    def edit(self, place: tuple[int, int], value: int) -> None: ...

    def fork(self) -> "PlayedWorld": ...

    def save(self, path: Path) -> None: ...


class BadCommand(ValueError):
    """A command that the game does not know, or not in this form."""


class Game:
    """A world and at most one fork of it.

    Args:
        world: that is played.
        path: of its file; a fork's is beside it, with "-fork" in its name, and none that exists.

    Attributes:
        worlds: one or two.
        paths: of their files.
        saved: steps at which each was saved, None if it was not, or was changed since.
    """

    def __init__(self, world: PlayedWorld, path: Path) -> None:
        self.paths = [path]
        self.worlds: list[PlayedWorld] = [world]
        self.saved: list[int | None] = [world.steps if path.exists() else None]
        self._fork_has_file = False
        self._untouched = not path.exists()

    @property
    def actions(self) -> list[str]:
        """Names of the actions."""
        named = ["ahead", "left", "right"] if self.worlds[0].turns else ["north", "east", "south", "west"]
        count = int(self.worlds[0].action_space.n)
        return named if count == len(named) else [f"action {index}" for index in range(count)]

    @property
    def keys(self) -> list[list[str]]:
        """Of the actions, by their names in a browser."""
        others = [[letter] for letter in LETTERS]
        return [KEYS.get(name, others[index] if index < len(others) else []) for index, name in enumerate(self.actions)]

    @property
    def swatches(self) -> list[tuple[str, list[int]]]:
        """Name and colour of what a place can be made."""
        world = self.worlds[0]
        return [(name, colour.tolist()) for name, colour in zip(world.names, world.colours, strict=True)]

    def hello(self) -> dict[str, Any]:
        """What a page needs to know at first."""
        actions = [{"name": name, "keys": keys} for name, keys in zip(self.actions, self.keys, strict=True)]
        swatches = [{"name": name, "rgb": rgb} for name, rgb in self.swatches]
        mapped = self.worlds[0].period > 0
        return {"type": "hello", "actions": actions, "swatches": swatches, "map": mapped, "file": self.paths[0].name}

    def obey(self, command: Any) -> list[dict[str, Any]]:
        """Carries out a command, and returns messages for the page.

        Commands are {"do": NAME, "world": 0 or 1, "body": 0, ...} with NAME act ("action"), wait ("steps"), edit
        ("place" or "view", a row and a column, and "value"), look, map, fork, close or save.

        Raises:
            BadCommand: an unknown command, or values that it does not take.
            RunError, OSError, ValueError: as the world raises them; the game goes on as it was.
        """
        if not isinstance(command, Mapping):
            raise BadCommand('a command is an object with a name, as {"do": "look"}')
        names = ("act", "wait", "edit", "look", "map", "fork", "close", "save")
        name = command.get("do")
        if name not in names:
            raise BadCommand(f"there is no command {str(name)[:40]!r}, expected one of {', '.join(names)}")
        index = _whole(command, "world", len(self.worlds) - 1, 0)
        messages = getattr(self, f"_{name}")(index, command)
        self._untouched &= index == 1 or name not in ("act", "wait", "edit")
        return messages

    def _act(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        began, body = time.perf_counter(), self._body(index, command)
        self.worlds[index].step(_whole(command, "action", len(self.actions) - 1), body)
        self.saved[index] = None
        frame = {**self.frame(index, body), "milliseconds": round(1e3 * (time.perf_counter() - began), 2)}
        others = (other for other in range(self.worlds[index].bodies) if other != body)
        return [*(self.frame(index, other) for other in others), frame]

    def _wait(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.worlds[index].wait(_whole(command, "steps", MOST_WAIT, least=1))
        self.saved[index] = None
        return [*self.frames(index), self.map(index, self._body(index, command))]

    def _look(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [self.frame(index, self._body(index, command))]

    def _map(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [self.map(index, self._body(index, command))]

    def _edit(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        world = self.worlds[index]
        if not world.period:
            raise BadCommand("this world has no map, and cannot be edited")
        value, body = _whole(command, "value", len(self.swatches) - 1), self._body(index, command)
        place = self._place_of(world, body, command["view"]) if "view" in command else _place(command.get("place"))
        world.edit(place, value)
        self.saved[index] = None
        return [*self.frames(index), self.map(index, body)]

    def _fork(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        if len(self.worlds) > 1 and not self.is_saved(1):
            raise BadCommand("the fork is not saved, and another would replace it: save or close it first")
        self.worlds[1:] = [self.worlds[index].fork()]
        self.saved[1:] = [None]
        self.paths[1:], self._fork_has_file = [self._free_path()], False
        return [*self.frames(1), self.map(1, self._body(index, command))]

    def _close(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        if index == 0:
            raise BadCommand("the world itself cannot be closed, only its fork")
        del self.worlds[1], self.saved[1], self.paths[1]
        return [{"type": "closed", "world": 1}]

    def _save(self, index: int, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        if index == 1 and not self._fork_has_file:  # others may have taken the name since it forked
            self.paths[1] = self._free_path()
        path = self.paths[index]
        self.worlds[index].save(path)
        self._fork_has_file |= index == 1
        self.saved[index] = self.worlds[index].steps
        return [*self.frames(index), {"type": "said", "text": f"saved as {path.name}", "error": False}]

    def is_saved(self, index: int) -> bool:
        """Whether a world's file has it as it is."""
        return self.saved[index] == self.worlds[index].steps

    def rescue(self) -> list[Path]:
        """Saves what is not saved in new files beside the others, and returns them; not a new world as it began.

        Raises:
            RunError, OSError: as the world raises them.
        """
        rescued = []
        for index, world in enumerate(self.worlds):
            if not self.is_saved(index) and (index == 1 or not self._untouched):
                rescued.append(self._free_path("rescued"))
                world.save(rescued[-1])
        return rescued

    def _free_path(self, kind: str = "fork") -> Path:
        """Of a new file: those that were saved before stay."""
        path = self.paths[0]
        names = (f"{path.stem}-{kind}{number}{path.suffix}" for number in itertools.chain([""], itertools.count(2)))
        return next(path.with_name(name) for name in names if not path.with_name(name).exists())

    def _body(self, index: int, command: Mapping[str, Any]) -> int:
        return _whole(command, "body", self.worlds[index].bodies - 1, 0)

    def frames(self, index: int) -> list[dict[str, Any]]:
        """The present view of each body, as messages."""
        return [self.frame(index, body) for body in range(self.worlds[index].bodies)]

    def frame(self, index: int, body: int = 0) -> dict[str, Any]:
        """The present view of a body, as a message."""
        world = self.worlds[index]
        return {
            "type": "frame",
            "world": index,
            "body": body,
            "bodies": world.bodies,
            "view": _picture(self.picture(index, body)),
            "cells": list(world.grid),
            "position": list(world.position(body)),
            "heading": world.heading(body),
            "steps": world.steps,
            "saved": self.is_saved(index),
        }

    def picture(self, index: int, body: int = 0) -> np.ndarray:
        """The present view of a body in colour: uint8 (rows, columns, 3)."""
        world = self.worlds[index]
        view = world.view(body)
        return view if view.ndim == 3 else world.colours[view]

    def map(self, index: int, body: int = 0) -> dict[str, Any]:
        """What the memory holds, around a body, as a message: colour, certainty from 0 to 255, and gap per place."""
        world = self.worlds[index]
        if not world.period:
            return {"type": "map", "world": index, "picture": None}
        places = self.places(index, body)
        values, certainty, gap = world.look(places.reshape(-1, 2))
        colours = world.colours[values]
        shares = np.clip(np.rint(np.asarray(certainty) * 255), 0, 255).astype(np.uint8)
        return {
            "type": "map",
            "world": index,
            "picture": _picture(colours.reshape(*places.shape[:2], 3)),
            "certainty": base64.b64encode(shares.tobytes()).decode(),
            "gap": np.asarray(gap).tolist(),
            "first": places[0, 0].tolist(),
            "period": world.period,
            "body": body,
            "positions": [list(world.position(other)) for other in range(world.bodies)],
            "headings": [world.heading(other) for other in range(world.bodies)],
        }

    def places(self, index: int, body: int = 0) -> np.ndarray:
        """Places of the map, (rows, columns, 2): all of the lattice, or as many around a body as a map shows."""
        world = self.worlds[index]
        side = min(world.period, MOST_SIDE)
        first = np.zeros(2, np.int64) if side == world.period else np.array(world.position(body)) - side // 2
        rows, columns = (np.arange(side) + start for start in first)
        return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1) % world.period

    def _place_of(self, world: PlayedWorld, body: int, cell: Any) -> tuple[int, int]:
        """The place of a cell of a body's view."""
        row, column = _place(cell)
        rows, columns = world.grid
        if not (0 <= row < rows and 0 <= column < columns):
            raise BadCommand(
                f"the view has no cell {row}, {column}, expected rows below {rows}, columns below {columns}"
            )
        row, column = row - rows // 2, column - columns // 2
        for _ in range(world.heading(body) if world.turns else 0):
            row, column = column, -row
        at = world.position(body)
        return (at[0] + row) % world.period, (at[1] + column) % world.period


def _picture(picture: np.ndarray) -> dict[str, Any]:
    rows, columns, _ = picture.shape
    return {"rows": rows, "columns": columns, "rgb": base64.b64encode(np.ascontiguousarray(picture).tobytes()).decode()}


def _whole(command: Mapping[str, Any], name: str, most: int, default: int | None = None, least: int = 0) -> int:
    value = command.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise BadCommand(f"{name} is {str(value)[:40]}, expected a whole number from {least} to {most:,}")
    return value


def _place(value: Any) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(type(entry) is int for entry in value)):
        raise BadCommand(f"a place is {str(value)[:40]}, expected a row and a column")
    return value[0], value[1]


def said(error: Exception) -> dict[str, Any]:
    """A message about an error of ``obey``."""
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return {"type": "said", "text": " ".join(reason.split())[:400], "error": True}


REFUSED = (BadCommand, RunError, OSError, ValueError)
"""What ``obey`` raises where the game goes on."""
