"""Drift: coloured blocks move while nobody looks.

    python -m worldmodel train --env worldmodel/Drift-v0

``blocks`` blocks lie on a torus of ``size`` x ``size`` cells. All blocks of a colour have one velocity, which never
changes; where blocks meet, the one of the highest colour is on top. The agent moves north, east, south or west every
step and sees ``view`` x ``view`` cells around it. The question is where a block is that was last seen some time ago.
With ``pause`` above 1, an uneven time of 1 to ``pause`` passes between two views, in which the agent moves one cell
and the blocks as many times their velocity.

``DriftWorlds`` runs many worlds at once, for training; ``Drift`` is a gymnasium environment of one of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.environments.grid_env import GridEnv, gymnasium
from worldmodel.environments.grids import MOST_COLOURS, MOVES, NEVER, STAY, Worlds, batch_first, palette, window
from worldmodel.environments.ids import register
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Count, Share, checked_value

Velocity = tuple[Annotated[int, Bounds(-64, 64)], Annotated[int, Bounds(-64, 64)]]


MOST_CELLS = 2**21  # of maps at several times, 8 bytes each, that a rollout holds at once


@dataclasses.dataclass(frozen=True)
class DriftConfig(Checked):
    """What the blocks are and how the agent moves.

    Attributes:
        size: cells per side of the torus.
        view: visible cells per side, odd, at most ``size``.
        blocks: in a world.
        velocities: of the colours, in rows and columns per step; class 0 is the floor, class 1 the first colour.
        persistence: probability of going on in the same direction, of the exploring policy.
        pause: longest time between two views, in steps of the blocks.
        pixels: per side of a cell in pictures; 0 for none.
        noise: largest change of a value of the pictures, uniform, as a share of 255.
    """

    size: Annotated[int, Bounds(2, 1024)] = 12
    view: Annotated[int, Bounds(1, 63)] = 5
    blocks: Annotated[int, Bounds(1, 4096)] = 10
    velocities: Annotated[tuple[Velocity, ...], Bounds(1, MOST_COLOURS - 1)] = ((0, 0), (0, 1), (1, 0), (-1, 1))
    persistence: Share = 0.8
    pause: Annotated[int, Bounds(1, 10**6)] = 1
    pixels: Annotated[int, Bounds(0, 64)] = 0
    noise: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.view % 2 == 0 or self.view > self.size:
            raise ConfigurationError(
                f"DriftConfig: view is {self.view}, expected an odd number of at most size ({self.size})"
            )

    @property
    def actions(self) -> int:
        return STAY

    @property
    def places(self) -> int:
        """Cells of a view."""
        return self.view**2

    @property
    def classes(self) -> int:
        return len(self.velocities) + 1

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return ["floor", *(f"velocity {row} {column}" for row, column in self.velocities)]


class DriftWorlds(Worlds):
    """``batch`` worlds of drifting blocks; memory is constant in the number of steps.

    Attributes:
        time: of each world, in steps of the blocks: int64 (batch,).

    Example:
        >>> worlds = DriftWorlds(2, DriftConfig(), torch.Generator().manual_seed(0))
        >>> steps = worlds.rollout(16)
        >>> steps["tokens"].shape, int(steps["tokens"].max()) <= 4
        (torch.Size([2, 16, 25]), True)
    """

    def __init__(self, batch: int, config: DriftConfig, generator: torch.Generator | None = None) -> None:
        self.batch, self.config, self.generator = batch, config, generator
        colours, size, blocks = len(config.velocities), config.size, config.blocks
        self.side = size
        self.time = np.zeros(batch, np.int64)
        # In ascending order of colour: of two blocks in a cell, the later one is on top.
        colour = torch.randint(0, colours, (batch, blocks), generator=generator).sort(1).values.numpy()
        self._velocity = np.array(config.velocities)[colour]  # (batch, blocks, 2)
        self._start = torch.randint(0, size, (batch, blocks, 2), generator=generator).numpy()
        self._class = np.concatenate([np.zeros((batch, 1), np.int64), colour + 1], 1)  # of block + 1; 0 is the floor
        self._seen = np.full((batch, blocks + 1), NEVER)
        self._at = torch.randint(0, size, (batch, 2), generator=generator).numpy()
        self._heading = torch.randint(0, STAY, (batch,), generator=generator).numpy()
        self._window = window(config.view)
        self._colours = np.concatenate([palette(0), palette(colours)[:-1]])
        self._begin_pictures()

    @property
    def positions(self) -> Tensor:
        """Row and column of the agent: int64 (batch, 1, 2)."""
        return torch.from_numpy(self._at.copy())[:, None]

    @property
    def map(self) -> Tensor:
        """Classes of all cells: int64 (batch, side, side)."""
        top = self._tops(self.time[None])[0]
        return torch.from_numpy(np.take_along_axis(self._class, top, 1)).view(self.batch, self.side, self.side)

    @property
    def headings(self) -> Tensor:
        """The last direction: int64 (batch, 1)."""
        return torch.from_numpy(self._heading.copy())[:, None]

    def cells(self) -> Tensor:
        """Rows and columns in ``map`` of the cells in view: int64 (batch, 1, places, 2)."""
        return torch.from_numpy(self._view(self._at))[:, None]

    def choose(self) -> Tensor:
        """Actions of the exploring policy: int64 (batch, 1)."""
        return torch.from_numpy(self._chosen(self._draw(1)[0]))[:, None]

    def wait(self, steps: int) -> None:
        """Lets the blocks move for ``steps`` steps unseen. Raises ConfigurationError for less than 0."""
        self.time = self.time + checked_value(Count, steps, "DriftWorlds: steps")
        self._begin_pictures()

    def rewards(self, rollout: Mapping[str, Tensor]) -> Tensor:
        """Share of the view's cells with a block."""
        return rollout["inside"].double().mean(-1)

    def rollout(self, steps: int, actions: Tensor | None = None) -> dict[str, Tensor]:
        """The next ``steps`` steps, by the exploring policy or ``actions``.

        Args:
            steps: to take; two rollouts in a row are one of their sum.
            actions: int64 (batch, steps).

        Returns:
            Tensors of (batch, time, ...):

            - tokens: int64 (places), classes of the view before the step, row by row; next_tokens: after it.
            - actions: int64.
            - displacement: float32 (2), rows and columns moved.
            - elapsed: float32, time between the two views, in steps of the blocks.
            - gap: int64 (places), of the block in each cell of the view after the step: 0 in the view before it, else
              the time between when it was last seen and the view before; -1 never seen, or no block.
            - inside: bool (places), whether there is a block; edited, fresh: none is, as in ``RoomWorlds``.
            - pixels, next_pixels: with ``pixels``, uint8 (height, width, 3) of the views before and after.

        Raises:
            ValueError: actions of another shape or dtype, or outside 0 to 3.
        """
        given, draws, config = self._given(actions, steps), self._draw(steps), self.config
        acts = np.empty((steps, self.batch), np.int64)
        for t in range(steps):
            self._heading = acts[t] = self._chosen(draws[t]) if given is None else given[t]
        at = np.concatenate([self._at[None], self._at + MOVES[acts].cumsum(0)]) % self.side
        elapsed = 1 + (draws[..., 2] * config.pause).astype(np.int64)
        clock = np.concatenate([self.time[None], self.time + elapsed.cumsum(0)])
        cells = self._view(at) @ [self.side, 1]  # (steps + 1, batch, places)
        at_once = max(1, MOST_CELLS // (max(1, self.batch) * self.side**2))
        parts = [slice(first, first + at_once) for first in range(0, steps + 1, at_once)]
        top = np.concatenate([np.take_along_axis(self._tops(clock[part]), cells[part], 2) for part in parts])
        tokens = np.take_along_axis(self._class[None], top, 2)
        gap = np.empty((steps, self.batch, config.places), np.int64)
        rows = np.arange(self.batch)[:, None]
        for t in range(steps):
            self._seen[rows, top[t]] = clock[t][:, None]
            gap[t] = clock[t][:, None] - self._seen[rows, top[t + 1]]
        inside = top[1:] > 0
        self._at, self.time = at[-1], clock[-1]
        return batch_first(
            {
                "tokens": tokens[:-1],
                "next_tokens": tokens[1:],
                "actions": acts,
                "displacement": MOVES.astype(np.float32)[acts],
                "elapsed": elapsed.astype(np.float32),
                "gap": np.where(inside, np.maximum(gap, -1), -1),
                "inside": inside,
                "edited": np.zeros_like(inside),
                "fresh": np.zeros_like(inside),
                **self._pictures_of(tokens),
            },
            self.batch,
        )

    def _view(self, at: np.ndarray) -> np.ndarray:
        return (at[..., None, :] + self._window) % self.side

    def _tops(self, clock: np.ndarray) -> np.ndarray:
        """Block on top of each cell, from 1, 0 for none: (times, batch, side * side) at ``clock`` (times, batch)."""
        places = (self._start + self._velocity * clock[..., None, None]) % self.side @ [self.side, 1]
        top = np.zeros((*clock.shape, self.side**2), np.int64)
        for block in range(self.config.blocks):
            np.put_along_axis(top, places[..., block, None], block + 1, 2)
        return top

    def _draw(self, steps: int) -> np.ndarray:
        """Uniform numbers of each step: persistence, direction, pause."""
        return torch.rand(steps, self.batch, 3, generator=self.generator).numpy()

    def _chosen(self, draws: np.ndarray) -> np.ndarray:
        sampled = (draws[:, 1] * STAY).astype(np.int64)
        return np.where(draws[:, 0] < self.config.persistence, self._heading, sampled)


class Drift(GridEnv):
    """One world of drifting blocks; ``options`` are the fields of ``DriftConfig``. The reward is the visible blocks'.

    Example:
        >>> drift = Drift(length=100, view=7)
        >>> first, _ = drift.reset(seed=1)
        >>> following, reward, terminated, truncated, info = drift.step(drift.explore())
        >>> following.shape, sorted(info)
        ((7, 7), ['displacement', 'edited', 'elapsed', 'fresh', 'gap', 'inside'])
    """

    def __init__(self, render_mode: str | None = None, length: int = 512, **options: Any) -> None:
        super().__init__(DriftWorlds, DriftConfig(**options), length, render_mode)


register(gymnasium, "worldmodel.environments.drift:Drift")
