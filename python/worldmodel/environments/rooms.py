"""Rooms: a coloured room seen through a window that moves with the agent.

    python -m worldmodel train --env worldmodel/Rooms-v0

The room has ``size`` x ``size`` cells, each with one of ``colours`` or, with probability ``walls``, a wall, and a
border of walls; without ``border`` it goes round. The agent stands on a free cell and sees ``view`` x ``view`` cells
around it. Its actions move it north, east, south and west, or, with ``own_heading``, ahead, or turn it left and right,
and the view is turned with it. A move into a wall does nothing. What was seen has to be remembered: the question is
which colours a cell has when it comes back into view. With probability ``edits`` per step and agent, a visible cell
takes another colour, which the next view shows.

``RoomWorlds`` runs many rooms at once, for training; ``Rooms`` is a gymnasium environment of one of them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from worldmodel.environments.grid_env import GridEnv, gymnasium
from worldmodel.environments.grids import (
    MOST_COLOURS,
    MOVES,
    NAMES,
    NEVER,
    STAY,
    Worlds,
    batch_first,
    palette,
    turned,
    window,
)
from worldmodel.environments.ids import register
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Share

FORWARD, LEFT, RIGHT = range(3)  # actions with ``own_heading``; the others are the indices of MOVES
_CHOICES = 12  # a uniform draw of these is one of 1, 2, 3 or 4 moves uniformly


@dataclasses.dataclass(frozen=True)
class RoomsConfig(Checked):
    """What rooms look like and how their agents move.

    Attributes:
        size: cells per side, without the border.
        view: visible cells per side, odd.
        colours: of the floor; class ``colours`` is a wall.
        walls: probability of a wall per cell.
        persistence: probability of going on in the same direction, of the exploring policy.
        edits: probability per step and agent that a visible cell takes another colour.
        bumps: whether the exploring policy walks into walls.
        own_heading: whether the view is turned with the agent, whose actions are ahead, left and right.
        agents: in the same room.
        border: whether walls surround the room; if not, what leaves it on one side comes in on the other.
        pixels: per side of a cell in pictures; 0 for none.
        noise: largest change of a value of the pictures, uniform, as a share of 255.

    Example:
        >>> RoomsConfig(view=4)
        Traceback (most recent call last):
            ...
        worldmodel...ConfigurationError: RoomsConfig: view is 4, expected an odd number
    """

    size: Annotated[int, Bounds(2, 1024)] = 11
    view: Annotated[int, Bounds(1, 63)] = 5
    colours: Annotated[int, Bounds(2, MOST_COLOURS)] = 8
    walls: Annotated[float, Bounds(0, 0.9)] = 0.1
    persistence: Share = 0.8
    edits: Share = 0.0
    bumps: bool = False
    own_heading: bool = False
    agents: Annotated[int, Bounds(1, 64)] = 1
    border: bool = True
    pixels: Annotated[int, Bounds(0, 64)] = 0
    noise: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.view % 2 == 0:
            raise ConfigurationError(f"RoomsConfig: view is {self.view}, expected an odd number")
        if not self.border and self.view > self.size:
            raise ConfigurationError(
                f"RoomsConfig: view is {self.view}, expected at most size ({self.size}) without a border"
            )

    @property
    def actions(self) -> int:
        return 3 if self.own_heading else 4

    @property
    def places(self) -> int:
        """Cells of a view."""
        return self.view**2

    @property
    def classes(self) -> int:
        return self.colours + 1

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return [*NAMES[: self.colours], "wall"]


class RoomWorlds(Worlds):
    """``batch`` rooms, sampled and walked through by ``generator``; memory is constant in the number of steps.

    Attributes:
        time: steps so far.

    Example:
        >>> worlds = RoomWorlds(2, RoomsConfig(size=7), torch.Generator().manual_seed(0))
        >>> steps = worlds.rollout(16)
        >>> steps["tokens"].shape, steps["displacement"].shape
        (torch.Size([2, 16, 25]), torch.Size([2, 16, 2]))
        >>> bool((worlds.rollout(16)["tokens"][:, 0] == steps["next_tokens"][:, -1]).all())  # it goes on
        True
    """

    def __init__(self, batch: int, config: RoomsConfig, generator: torch.Generator | None = None) -> None:
        self.batch, self.config, self.generator, self.time = batch, config, generator, 0
        self.agents = config.agents
        size, wall, agents = config.size, config.colours, config.agents
        # A margin of walls, at least one: no move leaves the map, and no view does.
        margin = max(config.view // 2, 1) if config.border else 0
        inner = slice(margin, margin + size)
        self.side = side = size + 2 * margin
        cells = torch.randint(0, wall, (batch, size, size), generator=generator)
        walls = torch.rand(batch, size, size, generator=generator) < config.walls
        walls[:, size // 2, size // 2] &= ~walls.flatten(1).all(1)
        room = np.full((batch, side, side), wall)
        room[:, inner, inner] = torch.where(walls, wall, cells).numpy()
        inside = np.zeros_like(room, dtype=bool)
        inside[:, inner, inner] = True
        free = np.zeros_like(room)
        for direction, move in enumerate(MOVES[:STAY]):
            free |= (np.roll(room, -move, (1, 2)) < wall) << direction
        # All maps are flat, (batch * side * side), and a cell is an index into them.
        self._room, self._inside, self._free = room.ravel(), inside.ravel(), free.ravel()
        self._seen = np.full(room.size, NEVER)
        self._edited = np.full(room.size, -1)
        floor = torch.from_numpy(room < wall).flatten(1).float()
        start = torch.multinomial(floor, agents, replacement=True, generator=generator).numpy()
        self._base = np.repeat(np.arange(batch) * side**2, agents)  # first cell of each agent's room
        self._at = start.ravel() + self._base
        self._heading = torch.randint(0, STAY, (batch * agents,), generator=generator).numpy()
        self._window = turned(window(config.view))  # (4, places, 2)
        self._offsets = self._window @ [side, 1]  # (4, places)
        self._own = np.zeros(batch * agents * side**2 if agents > 1 else 0, bool)  # seen by the agent itself
        self._policy, self._turns = _policy(config.own_heading, config.bumps)
        self._colours = palette(config.colours)
        self._begin_pictures()

    @property
    def map(self) -> Tensor:
        """Classes of all cells, with the border: int64 (batch, side, side)."""
        return torch.from_numpy(self._room.reshape(self.batch, self.side, self.side).copy())

    @property
    def positions(self) -> Tensor:
        """Row and column of each agent in ``map``: int64 (batch, agents, 2)."""
        cells = torch.from_numpy(self._at - self._base).view(self.batch, self.config.agents)
        return torch.stack([cells // self.side, cells % self.side], -1)

    @property
    def headings(self) -> Tensor:
        """North, east, south or west: int64 (batch, agents); the last direction without ``own_heading``."""
        return torch.from_numpy(self._heading.copy()).view(self.batch, self.config.agents)

    @property
    def last_seen(self) -> Tensor:
        """Step at which each cell of ``map`` was last in a view before the present one, -1 if never."""
        seen = np.where(self._seen == NEVER, -1, self._seen)
        return torch.from_numpy(seen.reshape(self.batch, self.side, self.side))

    def cells(self) -> Tensor:
        """Rows and columns in ``map`` of the cells in view: int64 (batch, agents, places, 2)."""
        cells = torch.from_numpy(self._view() - self._base[:, None]).view(self.batch, self.config.agents, -1)
        return torch.stack([cells // self.side, cells % self.side], -1)

    def legal(self) -> Tensor:
        """Actions that are not blocked by a wall: bool (batch, agents, actions)."""
        free = self._free[self._at][:, None] >> np.arange(STAY) & 1
        if self.config.own_heading:
            free = np.stack([np.take_along_axis(free, self._heading[:, None], 1)[:, 0], *np.ones((2, len(free)))], 1)
        return torch.from_numpy(free > 0).view(self.batch, self.config.agents, -1)

    def choose(self) -> Tensor:
        """Actions of the exploring policy: int64 (batch, agents)."""
        draws = self._draw(1)[0]
        return torch.from_numpy(self._chosen(self._codes(draws))).view(self.batch, self.config.agents)

    def rollout(self, steps: int, actions: Tensor | None = None) -> dict[str, Tensor]:
        """The next ``steps`` steps, by the exploring policy or ``actions``.

        Args:
            steps: to take; two rollouts in a row are one of their sum.
            actions: int64 (batch, steps), with several agents (batch, agents, steps).

        Returns:
            Tensors of (batch, time, ...), with several agents (batch, agents, time, ...):

            - tokens: int64 (places), classes of the view before the step, row by row; next_tokens: after it.
            - actions: int64.
            - displacement: float32 (2), rows and columns moved, as the map lies; 0 where a wall stopped the agent.
            - heading, next_heading: int64, of the view before and after the step: 0 without ``own_heading``.
            - gap: int64 (places), of the cells of the view after the step: 0 in a view before it, -1 never seen, else
              steps since last seen.
            - inside: bool (places), whether the cell is none of the border's; edited: whether its colour was ever
              changed; fresh: whether it was changed at this step, which no memory can know.
            - other: with several agents, bool (places): seen before, and only by others.
            - pixels, next_pixels: with ``pixels``, uint8 (height, width, 3) of the views before and after.

        Raises:
            ValueError: actions of another shape or dtype, or outside 0 to ``config.actions`` - 1.
        """
        config, count, places = self.config, len(self._at), self.config.places
        given = self._given(actions, steps)
        codes = self._codes(draws := self._draw(steps))
        cells = np.empty((steps + 1, count, places), np.int64)
        tokens = np.empty((steps + 1, count, places), np.int64)
        gap = np.empty((steps, count, places), np.int64)
        marks = {"edited": np.zeros(gap.shape, bool), "fresh": np.zeros(gap.shape, bool)}
        if config.agents > 1:
            marks["other"] = np.zeros(gap.shape, bool)
        acts, directions = np.empty((steps, count), np.int64), np.empty((steps, count), np.int64)
        headings = np.zeros((steps + 1, count), np.int64)
        cells[0] = self._view()
        tokens[0] = self._room[cells[0]]
        headings[0] = self._heading * config.own_heading
        shifts = MOVES @ [self.side, 1]
        for t in range(steps):
            self._seen[cells[t]] = self.time
            acts[t] = self._chosen(codes[t]) if given is None else given[t]
            turn = (self._free[self._at] * STAY + self._heading) * STAY + acts[t]
            directions[t], self._heading = self._turns[:, turn]
            if config.border:
                self._at = self._at + shifts[directions[t]]
            else:
                self._at = self._around(MOVES[directions[t], None])[:, 0]
            headings[t + 1] = self._heading * config.own_heading
            cells[t + 1] = self._view()
            gap[t] = self.time - self._seen[cells[t + 1]]
            if config.agents > 1:
                marks["other"][t] = self._only_others(cells[t], cells[t + 1], gap[t])
            if config.edits:
                self._edit(cells[t + 1], gap[t], draws[t])
                edited = self._edited[cells[t + 1]]
                marks["edited"][t], marks["fresh"][t] = edited >= 0, edited == self.time
            tokens[t + 1] = self._room[cells[t + 1]]
            self.time += 1
        rows: dict[str, np.ndarray] = {
            "tokens": tokens[:-1],
            "next_tokens": tokens[1:],
            "actions": acts,
            "displacement": MOVES.astype(np.float32)[directions],
            "heading": headings[:-1],
            "next_heading": headings[1:],
            "gap": np.maximum(gap, -1),
            "inside": self._inside[cells[1:]],
            **marks,
            **self._pictures_of(tokens),
        }
        return batch_first(rows, self.batch, config.agents)

    def rewards(self, rollout: Mapping[str, Tensor]) -> Tensor:
        """Share of the view's cells that are inside the room and were never seen."""
        return (rollout["inside"] & (rollout["gap"] < 0)).double().mean(-1)

    def _view(self) -> np.ndarray:
        """Cells in view, (agents of all rooms, places)."""
        heading = self._heading if self.config.own_heading else 0
        return self._at[:, None] + self._offsets[heading] if self.config.border else self._around(self._window[heading])

    def _around(self, offsets: np.ndarray) -> np.ndarray:
        """Cells at ``offsets`` (..., n, 2) from each agent in a room that goes round, (agents of all rooms, n)."""
        row, column = np.divmod(self._at - self._base, self.side)
        rows, columns = row[:, None] + offsets[..., 0], column[:, None] + offsets[..., 1]
        return rows % self.side * self.side + columns % self.side + self._base[:, None]

    def _draw(self, steps: int) -> np.ndarray:
        """Uniform numbers of each step and agent: persistence, direction, and whether, where and how to edit."""
        return torch.rand(steps, len(self._at), 5 if self.config.edits else 2, generator=self.generator).numpy()

    def _codes(self, draws: np.ndarray) -> np.ndarray:
        """Indices of the draws into the policy's last dimension."""
        return (draws[..., 1] * _CHOICES).astype(np.int64) * 2 + (draws[..., 0] < self.config.persistence)

    def _chosen(self, codes: np.ndarray) -> np.ndarray:
        return self._policy[(self._free[self._at] * STAY + self._heading) * (2 * _CHOICES) + codes]

    def _edit(self, cells: np.ndarray, gap: np.ndarray, draws: np.ndarray) -> None:
        """Changes cells that were in view before the step and are after it: the change is shown once at least."""
        agents = np.arange(len(cells))
        place = (draws[:, 3] * self.config.places).astype(np.int64)
        cell, colours = cells[agents, place], self.config.colours
        here = (draws[:, 2] < self.config.edits) & (self._room[cell] < colours) & (gap[agents, place] == 0)
        shift = 1 + (draws[here, 4] * (colours - 1)).astype(np.int64)
        self._room[cell[here]] = (self._room[cell[here]] + shift) % colours
        self._edited[cell[here]] = self.time

    def _only_others(self, cells: np.ndarray, following: np.ndarray, gap: np.ndarray) -> np.ndarray:
        own = (np.arange(len(cells)) * self.side**2 - self._base)[:, None]
        self._own[cells + own] = True
        return (gap >= 0) & ~self._own[following + own]


@functools.cache
def _policy(own_heading: bool, bumps: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tables of the exploring policy and of what actions do.

    Returns:
        Action by free directions (a bit each), heading and draw: (16 * 4 * 24); and direction moved in (``STAY`` for
        none) and new heading, by free directions, heading and action: (2, 16 * 4 * 4).
    """
    policy = np.zeros((16, STAY, _CHOICES, 2), np.int64)
    turns = np.zeros((2, 16, STAY, STAY), np.int64)
    for free in range(16):
        ahead = [direction for direction in range(STAY) if free >> direction & 1]
        for heading in range(STAY):
            goes_on = bumps or heading in ahead
            others = [LEFT, RIGHT] if own_heading else list(range(STAY)) if bumps or not ahead else ahead
            for draw in range(_CHOICES):
                policy[free, heading, draw, :] = others[draw % len(others)]
            if goes_on:
                policy[free, heading, :, 1] = FORWARD if own_heading else heading
            for action in range(3 if own_heading else STAY):
                direction = heading if own_heading else action
                moves = direction in ahead and (action == FORWARD or not own_heading)
                following = (heading + (0, -1, 1)[action]) % STAY if own_heading else action
                turns[:, free, heading, action] = direction if moves else STAY, following
    return policy.ravel(), turns.reshape(2, -1)


class Rooms(GridEnv):
    """One room; ``options`` are the fields of ``RoomsConfig``. The reward is for cells that were never seen.

    Example:
        >>> rooms = Rooms(size=7, length=100)
        >>> first, _ = rooms.reset(seed=1)
        >>> following, reward, terminated, truncated, info = rooms.step(rooms.explore())
        >>> following.shape, info["gap"].shape, info["displacement"].shape
        ((5, 5), (5, 5), (2,))

    Raises:
        ConfigurationError: options of other values, or several agents.
    """

    # Only bumps show that walls block. An imagined world goes round, and of a border it learns that half of it is wall.
    learned_from: ClassVar[dict[str, Any]] = {"bumps": True, "border": False, "size": 15}

    def __init__(self, render_mode: str | None = None, length: int = 512, **options: Any) -> None:
        config = RoomsConfig(**options)
        if config.agents != 1:
            raise ConfigurationError(f"Rooms: agents is {config.agents}, expected 1; RoomWorlds has several")
        super().__init__(RoomWorlds, config, length, render_mode)


register(gymnasium, "worldmodel.environments.rooms:Rooms")
