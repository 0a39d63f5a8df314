"""A world that a model imagines and that stays: saved, edited, forked, entered again.

    world = World.create("runs/rooms", seed=0)
    view, _ = world.reset()
    view, reward, terminated, truncated, info = world.step(action)
    world.edit((3, -2), 5)
    other = world.fork()
    world.save("my.world")

What comes into view is sampled once, and then it is there: with a map of places, everything imagined is committed to
the map at once, and what is known is not written again. Places are rows and columns from where the first body began, on
a torus of ``size`` places per side.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldmodel.acting import world_file
from worldmodel.data.batch import State
from worldmodel.learning.world_run import MOST_SIZE, load_world_model, saved_world_config
from worldmodel.model.place_map import PlaceMap
from worldmodel.model.token_codecs import CodebookTokens
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.model.views import HEADINGS, places_of, turned, view_offsets
from worldmodel.runs.optional_dependencies import missing
from worldmodel.runs.run import Run

try:
    import gymnasium
except ImportError as error:
    raise missing(error, "make worlds") from error

SURE = 0.5  # probability above which the likeliest token is there, and none is sampled
_SHARED = "place.map"


class WorldError(ValueError):
    """An action, an edit or a body that a world does not know."""


@dataclasses.dataclass
class Body:
    """An agent in a world.

    Attributes:
        view: tokens, (1, places, *token).
        certainty: (1, places), of the view when it was imagined.
        state: of the model, without the map that bodies share.
        position: int64 (2,), on the torus; None without a map of places.
        steps: so far.
    """

    view: Tensor
    certainty: Tensor
    state: State
    position: Tensor
    steps: int = 0


class World(gymnasium.Env[Any, int]):
    """An imagined world. Rewards and ends are the model's, 0 and never if it has none.

    Attributes:
        model: its weights do not change.
        bodies: agents, in one map.
        time: steps of the world; every step of a body is one.
        last_seen: int64 (size, size), the time at which a place was last in a body's view or edited, -1 never; row and
            column 0 are those of the place (-(size // 2), -(size // 2)).
        about: where it comes from: "env" and "env_args" of the run.

    Example:
        >>> from worldmodel.model.place_map import PlaceConfig
        >>> world = World(TokenWorldModel(TokenConfig(place=PlaceConfig(motion="learned"))), seed=0)
        >>> view, info = world.reset()
        >>> view, reward, terminated, truncated, info = world.step(0)
        >>> view.shape, sorted(info)
        ((5, 5), ['certainty', 'heading', 'new', 'position'])
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self, model: TokenWorldModel, seed: int = 0, bodies: int = 1, about: Mapping[str, Any] | None = None
    ) -> None:
        """See ``create``. Raises WorldError for a seed that is no whole number, or bodies without a shared map."""
        _whole("seed", seed, 2**63 - 1)
        self.model = model.eval().requires_grad_(False)
        config = model.config
        if bodies < 1 or (bodies > 1 and model.place is None):
            raise WorldError(
                f"bodies is {bodies}, expected 1, or more with a map of places (train-world --memory place)"
            )
        self._count, self.about = bodies, dict(about or {})
        self.action_space: Any = gymnasium.spaces.Discrete(config.actions)
        rows, columns = config.grid
        if not config.classes:
            raise WorldError(
                "this run predicts pixels as numbers, of which no world can be sampled: --model.classes 64"
            )
        place = config.place
        if place is not None and place.motion == "given" and not place.moves:
            raise WorldError(
                "this run was given its motion, and no world tells where actions lead: train it as learned"
            )
        if config.patch:
            shape = (rows * config.patch, columns * config.patch, 3)
            self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        else:
            self.observation_space = gymnasium.spaces.Box(0, config.classes - 1, (rows, columns), np.int64)
        self.generator = torch.Generator()
        self._begin(seed)

    @classmethod
    def create(
        cls, run: Path | str, seed: int = 0, *, size: int | None = None, bodies: int = 1, trust: bool = False
    ) -> "World":
        """A new world.

        Args:
            run: folder of a run of ``train-world``.
            seed: of everything in the world.
            size: places per side of its torus; by default that of training, at most ``MOST_SIZE``.
            bodies: agents in it.
            trust: import memory blocks that the run names also if their modules are not installed.

        Raises:
            RunError: no such run, or a damaged one.
            WorldError: a seed that is no whole number, or a size that the views do not fit into or that is too large.
        """
        opened = Run(run)
        model = load_world_model(opened, trust=trust)
        if size is not None:
            least = max(model.config.grid)
            if model.place is None:
                raise WorldError(f"size is {size}, and this run has no map of places (train-world --memory place)")
            if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= MOST_SIZE:
                raise WorldError(f"size is {size!r:.40}, expected from {least}, the view's side, to {MOST_SIZE}")
            model = load_world_model(opened, size, trust=trust)
        config = saved_world_config(opened)
        return cls(model, seed, bodies, {"env": config.env, "env_args": config.env_args})

    @property
    def config(self) -> TokenConfig:
        return self.model.config

    @property
    def place(self) -> PlaceMap:
        """The map. Raises WorldError without one."""
        if self.model.place is None:
            raise WorldError("this world has no map of places to look at or edit (train-world --memory place)")
        return self.model.place

    @property
    def size(self) -> int:
        """Places per side of the torus; 0 without a map of places."""
        return 0 if self.config.place is None else self.config.place.period

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins another world, of the ``seed``, or of the generator's next number; the first body's view of it."""
        super().reset(seed=seed)
        self._begin(int(torch.randint(2**62, (), generator=self.generator)) if seed is None else seed)
        return self.observe(), self._info(self.bodies[0], torch.ones(1, self.config.places, dtype=torch.bool))

    def observe(self, body: int = 0) -> np.ndarray:
        """The view of a body, as ``observation_space``."""
        shown = self.model.codec.observations(self._body(body).view)[0]
        if self.config.patch:
            return (shown * 255).round().to(torch.uint8).numpy()
        return shown.view(self.config.grid).numpy()

    @torch.no_grad()
    def step(self, action: int, body: int = 0) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """A step of a body.

        Returns:
            As gymnasium; ``info`` has, of the view, the ``certainty`` and which places are ``new``, and the body's
            ``position`` and ``heading``.

        Raises:
            WorldError: an action or a body that the world does not know.
        """
        acting = self._body(body)
        chosen = action.item() if isinstance(action, np.ndarray | Tensor) and action.ndim == 0 else action
        chosen = _whole("action", chosen, self.config.actions - 1)
        if self.time >= world_file.MOST_TIME:
            raise WorldError(f"time is {self.time:,} steps, the most of a world: begin another, or reset this one")
        given = torch.tensor([chosen])
        outputs, features, moved, state = self.model.imagine(acting.view, given, self._state(acting))
        if moved is not None:
            acting.position = self._wrapped(acting.position + moved[0].round().long())
        self._keep(acting, state)
        acting.view, new = self._decide(outputs, acting)
        self._commit(acting, new)
        acting.steps += 1
        self._pass(1, acting)
        reward, terminated = self._judge(features)
        return self.observe(body), reward, terminated, False, self._info(acting, new)

    @torch.no_grad()
    def wait(self, steps: int) -> None:
        """Lets ``steps`` steps pass, up to ``world_file.MOST_TIME`` of the world: what drifts has drifted.

        Raises:
            WorldError: another number.
        """
        self._pass(_whole("steps", steps, world_file.MOST_TIME - self.time), None)

    @torch.no_grad()
    def look(self, places: Any) -> tuple[np.ndarray, np.ndarray]:
        """What the map holds at ``places`` (..., 2): the likeliest tokens, (...), and their probabilities.

        Raises:
            WorldError: a place outside the world, or no map.
        """
        asked = self._checked(places)
        body = self.bodies[0]
        offsets = (asked.view(-1, 2) - body.position).double()
        read = self.place.memory.read(_memory(self._state(body)), offsets)
        outputs = self.model.head(read)[0]
        tokens, certainty = self.model.codec.mode(outputs), self.model.codec.certainty(outputs)
        return tokens.reshape(asked.shape[:-1] + tokens.shape[1:]).numpy(), certainty.reshape(asked.shape[:-1]).numpy()

    @torch.no_grad()
    def edit(self, place: Sequence[int], value: Any) -> None:
        """Puts a token at a place: a class, or what is nearest to a patch of pixels. All else stays.

        Raises:
            WorldError: a place outside the world, a value that is no token, or no map.
        """
        asked, token = self._checked(place), self._token(value)
        if asked.dim() != 1:
            raise WorldError(f"place is {place!r:.60}, expected one row and one column")
        asked = asked.view(1, 2)
        values = self.model.codec.embed(token[None, None])  # (1, 1, width)
        body = self.bodies[0]
        state = self._state(body)
        written = self.place.write(_part(state), (asked - body.position).double(), values, torch.ones(1, 1, 1))
        self._keep(body, state | {_SHARED: written["map"]})
        self.last_seen[tuple((asked[0] + self.size // 2).tolist())] = self.time
        for seeing in self.bodies:
            offset = self._wrapped(asked - seeing.position)
            index = int(places_of(turned(offset, -seeing.state["place.heading"]), view_offsets(self.config.grid)))
            if index >= 0:
                seeing.view = seeing.view.clone()
                seeing.view[0, index] = token

    def save(self, path: Path | str) -> None:
        """Writes all of it, the weights too, in one safetensors file. After any error ``path`` is as it was.

        Raises:
            OSError: it cannot be written.
        """
        world_file.write(self, Path(path))

    @classmethod
    def load(cls, path: Path | str, *, trust: bool = False) -> "World":
        """The world of a file, as it was; nothing in the file is executed.

        Args:
            path: of ``save``.
            trust: import memory blocks that the file names also if their modules are not installed.

        Raises:
            RunError: no such file, a link, another version, or a damaged one.
        """
        return world_file.read(cls, Path(path), trust)

    def fork(self, seed: int | None = None) -> "World":
        """A world that is the same now and goes its own way; its chances are the same as well, without a ``seed``."""
        model, self.model = self.model, None  # type: ignore[assignment]
        try:
            other = copy.deepcopy(self)
        finally:
            self.model = model
        other.model = model
        if seed is not None:
            other.generator.manual_seed(seed)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "World":
        other = object.__new__(type(self))
        memo[id(self)] = other
        other.__dict__ = {
            name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name != "generator"
        }
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        return other

    @torch.no_grad()
    def _begin(self, seed: int) -> None:
        self.generator.manual_seed(seed)
        self.time, self.shared_map = 0, None
        state = self.model.init_state(1)
        self.bodies: list[Body] = []
        if self.model.place is not None:
            self.shared_map = state[_SHARED]
        own = {name: value for name, value in state.items() if name != _SHARED}
        start = int(torch.randint(len(self.model.starts), (), generator=self.generator))
        view = self.model.starts[start : start + 1].clone()
        certain = torch.ones(1, self.config.places)
        for _ in range(self._count):
            self.bodies.append(Body(view.clone(), certain, dict(own), torch.zeros(2, dtype=torch.long)))
        self.last_seen = torch.full((self.size, self.size), -1)
        self._commit(self.bodies[0], certain.bool())
        if self.model.place is not None:
            self._see(self.bodies[0])

    def _body(self, index: int) -> Body:
        return self.bodies[_whole("body", index, len(self.bodies) - 1)]

    def _state(self, body: Body) -> State:
        """The model's, of a body in the map that all share."""
        return dict(body.state) if self.shared_map is None else {**body.state, _SHARED: self.shared_map}

    def _keep(self, body: Body, state: State) -> None:
        self.shared_map = state.get(_SHARED)
        body.state = {name: value for name, value in state.items() if name != _SHARED}

    def _decide(self, outputs: Tensor, body: Body) -> tuple[Tensor, Tensor]:
        """Tokens, and which of them were sampled: where the likeliest is not likely enough."""
        codec = self.model.codec
        body.certainty = codec.certainty(outputs)
        new = body.certainty < SURE
        likeliest = codec.mode(outputs)
        if not bool(new.any()):
            return likeliest, new
        drawn = codec.sample(outputs, self.generator)
        return torch.where(new.view(*new.shape, *[1] * (drawn.dim() - 2)), drawn, likeliest), new

    def _commit(self, body: Body, new: Tensor) -> None:
        """Writes what was sampled; nothing else is touched."""
        if self.model.place is None or not bool(new.any()):
            return
        state = self._state(body)
        place = self.model.place.commit(_part(state), self.model.codec.embed(body.view), new.float())
        self._keep(body, state | {f"place.{name}": value for name, value in place.items()})

    def _pass(self, steps: int, stepped: Body | None) -> None:
        """Time passes; blocks drift for all but the body that made the step, whose map has moved on. All see."""
        self.time += steps
        if self.config.place is None:
            return
        for body in self.bodies:
            if body is not stepped and self.config.place.velocities:
                self._drift(body, steps)
            self._see(body)

    def _drift(self, body: Body, steps: int) -> None:
        """Moves the body's frame on, and recalls its view."""
        moved = self.place.memory.move(_memory(self._state(body)), torch.zeros(1, 2), steps)
        body.state = {**body.state, "place.angle": moved["angle"]}
        outputs = self.model.head(self.place.recall(_part(self._state(body))))
        body.view, new = self._decide(outputs, body)
        self._commit(body, new)

    def _see(self, body: Body) -> None:
        """What is in view is seen now."""
        places = turned(view_offsets(self.config.grid), body.state["place.heading"]) + body.position
        rows, columns = ((places + self.size // 2) % self.size).unbind(-1)
        self.last_seen[rows, columns] = self.time

    def _judge(self, features: Tensor) -> tuple[float, bool]:
        if not self.model.scalars:
            return 0.0, False
        reward, continues = (float(self.model.scalars[name](features)) for name in ("reward", "continues"))
        return reward, continues < 0

    def _info(self, body: Body, new: Tensor) -> dict[str, Any]:
        info: dict[str, Any] = {
            "certainty": body.certainty.view(self.config.grid).numpy(),
            "new": new.view(self.config.grid).numpy(),
        }
        if self.model.place is not None:
            info["position"] = tuple(body.position.tolist())
            info["heading"] = int(body.state["place.heading"]) % HEADINGS
        return info

    def _wrapped(self, position: Tensor) -> Tensor:
        """The same place of the torus nearest to the start."""
        half = self.size // 2
        return (position + half) % self.size - half

    def _checked(self, places: Any) -> Tensor:
        try:
            asked = torch.as_tensor(places)
        except (TypeError, ValueError, RuntimeError) as error:
            raise WorldError(f"places are {places!r:.60}, expected rows and columns") from error
        half = self.place.config.period // 2
        low, high = -half, self.size - 1 - half
        if asked.is_floating_point() or asked.dtype == torch.bool or asked.dim() < 1 or asked.shape[-1] != 2:
            raise WorldError(f"places are {places!r:.60}, expected rows and columns, as whole numbers")
        if not asked.numel():
            raise WorldError(f"places are {places!r:.60}, expected at least one")
        if not low <= int(asked.min()) <= int(asked.max()) <= high:
            raise WorldError(
                f"place {asked.tolist()!s:.60} is outside the world of {self.size} x {self.size} places: rows and "
                f"columns from the start are {low} to {high}"
            )
        return asked.long()

    def _token(self, value: Any) -> Tensor:
        """Raises WorldError for what is no token."""
        codec = self.model.codec
        if isinstance(codec, CodebookTokens):
            patch = np.asarray(value)
            shape = (self.config.patch, self.config.patch, 3)
            if patch.shape != shape or patch.dtype != np.uint8:
                raise WorldError(f"value is {patch.dtype} {patch.shape}, expected uint8 {shape}, pixels of a place")
            return codec.nearest(torch.from_numpy(patch.astype(np.float32) / 255).view(1, -1))[0]
        return torch.tensor(_whole("value", value, self.config.classes - 1))


def _whole(name: str, value: Any, most: int, least: int = 0) -> int:
    """Raises WorldError for what is no whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise WorldError(f"{name} is {value!r:.40}, expected a whole number from {least} to {most:,}")
    return int(value)


def _part(state: State) -> State:
    return {name.removeprefix("place."): value for name, value in state.items() if name.startswith("place.")}


def _memory(state: State) -> State:
    return {"map": state["place.map"], "angle": state["place.angle"]}
