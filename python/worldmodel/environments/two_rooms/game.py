"""Two rooms as gymnasium environments: a goal picture is to be reached, through a door.

    python -m worldmodel record --env worldmodel/TwoRooms-v0 --env-args task=walk --out walks.npz

A dot in a picture of 65 x 65 pixels is moved by (dx, dy); a move ends where it meets a wall. Start and goal lie in
different rooms. In ``TurnedRooms`` commands are turned by an angle that no picture shows: only past commands and what
they did tell it, and the goal counts after a walk and a rest.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldmodel.environments.ids import register
from worldmodel.environments.two_rooms.moves import SIDE, Layouts, move, shortened, turned
from worldmodel.environments.two_rooms.pictures import drawing, observation, places, walls
from worldmodel.environments.two_rooms.walks import LONGEST_STEP, WalkConfig, Walks, sample_tasks, sample_walks
from worldmodel.runs.fields import Bounds, ConfigurationError, Limit, Unit, checked_value
from worldmodel.runs.optional_dependencies import missing

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "run environments") from error

Pixels = Annotated[float, Bounds(0, SIDE, above=True), Unit("pixels")]
Steps = Annotated[int, Bounds(0, 10**6), Unit("steps")]


@dataclasses.dataclass(frozen=True)
class TwoRoomsConfig(WalkConfig):
    """What an episode is, and how ``explore`` walks.

    Attributes:
        layout: fixed: the published one; random: another wall and door in every episode.
        task: cross: start and goal in different rooms; walk: the start of a published walk, which ``explore`` follows,
            and its end as the goal.
        max_step: longest move, pixels, those of walks at least; longer commands are shortened.
        radius: distance from the goal that is a success, pixels.
        goal_channel: whether the observation has the goal's dot as a third channel.
        observes: picture: dot and walls; place: the dot's place alone, as ``pictures.places`` gives it.
        ends: whether an episode of the task cross terminates at its first success; a walk never does.
    """

    layout: Literal["fixed", "random"] = "fixed"
    task: Literal["cross", "walk"] = "cross"
    max_step: Annotated[float, Bounds(LONGEST_STEP, SIDE), Unit("pixels")] = 2.45
    radius: Pixels = 4.5
    goal_channel: bool = False
    observes: Literal["picture", "place"] = "picture"
    ends: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goal_channel and self.observes == "place":
            raise ConfigurationError(
                f"{type(self).__name__}: goal_channel is true and observes 'place', which has no channels: expected "
                "observes 'picture', or goal_channel false"
            )

    def layouts(self, random: np.random.Generator, count: int) -> Layouts:
        return Layouts.sampled(random, count) if self.layout == "random" else Layouts.fixed(count)


@dataclasses.dataclass(frozen=True)
class TurnedRoomsConfig(TwoRoomsConfig):
    """``TwoRoomsConfig``, and how commands are turned.

    Attributes:
        angles: how many equally spaced angles there are; 0 for any.
        wander: steps before the rest, in which ``explore`` walks.
        rest: steps in which ``explore`` stays; the goal counts after them.
    """

    angles: Annotated[int, Bounds(0, 360)] = 4
    wander: Steps = 64
    rest: Steps = 64

    def turns(self, random: np.random.Generator, count: int) -> Tensor:
        """Angles by which commands are turned, radians: float32 (count,)."""
        shares = random.integers(self.angles, size=count) / self.angles if self.angles else random.random(count)
        return torch.from_numpy(2 * math.pi * shares).float()


class TwoRooms(gymnasium.Env[Any, Any]):
    """Observes the dot and the walls as two channels; ``options`` are the fields of ``TwoRoomsConfig``.

    The reward is 1 where the dot is within ``radius`` of the goal after the step, else 0. ``info`` has the goal's
    observation as ``goal``, the places of dot and goal as ``position`` and ``goal_position``, pixels, and ``success``.

    Attributes:
        position: of the dot, pixels, float32 (2,); goal: its place.
        layouts: of walls and door, a batch of one.

    Example:
        >>> rooms = TwoRooms(layout="random")
        >>> first, info = rooms.reset(seed=1)
        >>> following, reward, terminated, truncated, info = rooms.step(rooms.explore())
        >>> following.shape, info["goal"].shape, reward, info["success"]
        ((65, 65, 2), (65, 65, 2), 0.0, False)

    Raises:
        ConfigurationError: options of other values, or an action that is none of ``action_space``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, length: int = 200, **options: Any) -> None:
        self.render_mode, self.length = render_mode, checked_value(Limit, length, f"{type(self).__name__}: length")
        self.config = self._configured(options)
        reach, channels = self.config.max_step, 3 if self.config.goal_channel else 2
        self.action_space = gymnasium.spaces.Box(-reach, reach, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Box(0, 255, (SIDE, SIDE, channels), np.uint8)
        if self.config.observes == "place":
            self.observation_space = gymnasium.spaces.Box(-0.5, 0.5, (2,), np.float32)
        self._walk: Tensor | None = None

    def _configured(self, options: dict[str, Any]) -> TwoRoomsConfig:
        return TwoRoomsConfig(**options)

    @property
    def limit(self) -> int:
        """Steps after which an episode is truncated."""
        return self.length

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.layouts = self.config.layouts(self.np_random, 1)
        self.steps, self._walls = 0, walls(self.layouts[0])
        start, self.goal = (place[0] for place in sample_tasks(self.np_random, self.layouts))
        walk = self._sampled_walk()
        if self.config.task == "walk":
            start, self.goal = walk.positions[0, 0], walk.positions[0, -1]
        self.position, self._walk = start, walk.moves[0]
        self._goal_picture = self._observation(self.goal)
        return self._observation(self.position), self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._begun()
        command = shortened(self._checked(action), self.config.max_step)
        self.position = move(self.position, self._turned(command, 1), self.layouts[0])
        self.steps += 1
        info = self._info()
        ended = info["success"] and self.config.ends and self.config.task == "cross"
        return self._observation(self.position), float(info["success"]), ended, self.steps >= self.limit, info

    def explore(self) -> np.ndarray:
        """The next step of a published walk; it ends with the episode."""
        walk = self._begun()
        return self._turned(walk[min(self.steps, len(walk) - 1)], -1).numpy()

    def render(self) -> np.ndarray:
        """The rooms, the dot and a ring around the goal: uint8 (height, width, 3)."""
        self._begun()
        return drawing(self.position, self.goal, self.config.radius, self.layouts[0])

    def _begun(self) -> Tensor:
        if self._walk is None:
            raise gymnasium.error.ResetNeeded(f"{type(self).__name__}: there is no episode yet: call reset first")
        return self._walk

    def _sampled_walk(self) -> Walks:
        return self._walk_of(self.limit)

    def _walk_of(self, steps: int) -> Walks:
        crossing = self.config.crossing if self.config.task == "walk" else 0.0
        return sample_walks(self.np_random, self.layouts, steps, dataclasses.replace(self.config, crossing=crossing))

    def _turned(self, moves: Tensor, sign: int) -> Tensor:
        """Commands as moves (1), or moves as commands (-1)."""
        return moves

    def _may_succeed(self) -> bool:
        return True

    def _observation(self, position: Tensor) -> np.ndarray:
        if self.config.observes == "place":
            return places(position).numpy()
        return observation(position, self._walls, self.goal if self.config.goal_channel else None)

    def _info(self) -> dict[str, Any]:
        near = float((self.position - self.goal).norm()) <= self.config.radius
        return {
            "goal": self._goal_picture.copy(),
            "goal_position": self.goal.numpy().copy(),
            "position": self.position.numpy().copy(),
            "success": near and self._may_succeed(),
        }

    def _checked(self, action: Any) -> Tensor:
        command, reach = np.asarray(action, np.float32), self.config.max_step
        if command.shape != (2,) or not (np.abs(command) <= reach + 1e-5).all():
            raise ConfigurationError(
                f"{type(self).__name__}: action is {action!s:.60}, expected (dx, dy), each from {-reach} to {reach} "
                "pixels"
            )
        return torch.from_numpy(command)


class TurnedRooms(TwoRooms):
    """``TwoRooms`` whose commands are turned by a hidden ``angle``; ``options`` are fields of ``TurnedRoomsConfig``.

    The angle is constant in an episode. The goal counts, and ends an episode, after ``wander`` and ``rest``; ``length``
    steps are left then. A command of zero length stays, whatever the angle is.

    Attributes:
        angle: radians, from x to y.

    Example:
        >>> rooms = TurnedRooms(angles=4, wander=8, rest=4)
        >>> before = rooms.reset(seed=0)[1]["position"]
        >>> after = rooms.step([0.0, 2.0])[-1]["position"]
        >>> round(float(rooms.angle), 2), (after - before).round(2).tolist()
        (3.14, [0.0, -2.0])
    """

    config: TurnedRoomsConfig

    def _configured(self, options: dict[str, Any]) -> TwoRoomsConfig:
        return TurnedRoomsConfig(**options)

    @property
    def limit(self) -> int:
        return self.config.wander + self.config.rest + self.length

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        first = super().reset(seed=seed, options=options)
        self.angle = self.config.turns(self.np_random, 1)[0]
        return first

    def _sampled_walk(self) -> Walks:
        wander, rest = self.config.wander, self.config.rest
        walk = self._walk_of(self.limit - rest)
        stay = torch.zeros(1, rest, 2)
        moves = torch.cat([walk.moves[:, :wander], stay, walk.moves[:, wander:]], 1)
        return dataclasses.replace(walk, moves=moves)

    def _turned(self, moves: Tensor, sign: int) -> Tensor:
        return turned(moves, sign * self.angle)

    def _may_succeed(self) -> bool:
        return self.steps > self.config.wander + self.config.rest


for entry_point in ("TwoRooms", "TurnedRooms"):
    register(gymnasium, f"worldmodel.environments.two_rooms.game:{entry_point}")
