"""Episodes of two rooms, many at once, by any controller, such as those that plan: in true or in learned dynamics."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from worldmodel.acting.plan_costs import GoalCost, LatentGoalCost, LatentRollout, encode_goal
from worldmodel.acting.plan_decider import FRESH_IN_LATENTS, IN_LATENTS, PlanningDecider
from worldmodel.acting.planner import Plan, Planner, PlannerConfig, shifted, within_norm
from worldmodel.environments.two_rooms.moves import Layouts, move, shortened, travel, turned
from worldmodel.environments.two_rooms.pictures import pixels, places
from worldmodel.model.world_model import WorldModel

Controller = Callable[[Tensor], Tensor]
"""Places of dots, float32 (rows, 2) -> their next moves, at least one, (rows, steps, 2)."""
CONFIG = PlannerConfig(std=0.8)  # pixels


@dataclasses.dataclass(frozen=True)
class Driven:
    """Episodes.

    Attributes:
        first: steps until the first success, ``steps + 1`` without one: int64 (rows,).
        held: whether the last step was a success, bool (rows,).
        path: places, (rows, steps + 1, 2).
    """

    first: Tensor
    held: Tensor
    path: Tensor

    @property
    def hit(self) -> Tensor:
        """Whether there was a success, bool (rows,)."""
        return self.first < self.path.shape[1]


def drive(
    controller: Controller,
    start: Tensor,
    goal: Tensor,
    layouts: Layouts,
    steps: int = 200,
    radius: float = 4.5,
    max_step: float = 2.45,
    until_hit: bool = False,
    angles: Tensor | None = None,
) -> Driven:
    """Episodes of ``steps`` from start to goal, (rows, 2); a controller is asked again when its moves are used up.

    With ``until_hit`` all end as soon as each had its first success. Moves are turned by ``angles``, (rows,), radians.

    Example:
        >>> start, goal = torch.tensor([[20.0, 10.0]]), torch.tensor([[44.0, 10.0]])
        >>> driven = drive(lambda places: (goal - places)[:, None], start, goal, Layouts.fixed(1), steps=20)
        >>> int(driven.first), bool(driven.held)          # 24 pixels, 4.5 of them within the radius
        (8, True)
    """
    path = [start]
    waiting: list[Tensor] = []
    hit = torch.zeros(len(start), dtype=torch.bool)
    for _ in range(steps):
        if until_hit and bool(hit.all()):
            break
        if not waiting:
            waiting = list(shortened(controller(path[-1]), max_step).unbind(1))
        command = waiting.pop(0)
        path.append(move(path[-1], command if angles is None else turned(command, angles), layouts))
        hit |= (path[-1] - goal).norm(dim=-1) <= radius
    places = torch.stack(path, 1)
    near = (places[:, 1:] - goal[:, None]).norm(dim=-1) <= radius  # (rows, steps)
    first = torch.where(near.any(1), near.int().argmax(1) + 1, steps + 1)
    return Driven(first, near[:, -1], places)


class TrueDynamics:
    """A controller that plans with ``move`` itself, towards goals of known place; it knows ``angles``, as of ``drive``.

    Args:
        goal: (rows, 2).
        layouts: (rows,).
        config: of the search, in pixels.
        repeat: steps for which an action of a plan is repeated.
        every: actions after which plans are renewed.
        max_step: longest move, pixels.
        seed: of samples.
        angles: by which moves are turned, (rows,), radians; None for none.

    Attributes:
        plan: the newest.
    """

    def __init__(
        self,
        goal: Tensor,
        layouts: Layouts,
        config: PlannerConfig = CONFIG,
        repeat: int = 4,
        every: int = 4,
        max_step: float = 2.45,
        seed: int = 0,
        angles: Tensor | None = None,
    ) -> None:
        self.layouts, self.repeat, self.every, self.angles = layouts, repeat, every, angles
        generator = torch.Generator().manual_seed(seed)
        project = within_norm(max_step)
        self._planner = Planner(self._rollout, GoalCost(goal), 2, config, project=project, generator=generator)
        self.plan: Plan | None = None

    def __call__(self, places: Tensor) -> Tensor:
        warm = None if self.plan is None else shifted(self.plan.actions, self.every)
        self.plan = self._planner.plan(places, len(places), warm)
        return self.plan.actions[:, : self.every].repeat_interleave(self.repeat, 1)

    def _rollout(self, places: Tensor, actions: Tensor) -> Tensor:
        if self.angles is not None:
            actions = turned(actions, self.angles[:, None, None])
        moves = actions.repeat_interleave(self.repeat, 2)  # (rows, samples, steps, 2)
        path = travel(places[:, None], moves, self.layouts[:, None])
        return path[:, :, self.repeat :: self.repeat]


class LearnedDynamics:
    """A controller that sees what its world model observes, pictures or places, and plans in its latents.

    Args:
        world_model: trained on ``worldmodel/TwoRooms-v0`` or ``TurnedRooms-v0`` with actions of ``repeat`` moves.
        goal: (rows, 2); the model gets its observation.
        layouts: (rows,).
        config: of the search, in shares of the longest move.
        repeat: steps for which a move of a plan is repeated.
        every: moves of a plan after which it is renewed: a model's errors drift from a goal that is not looked at.
        longest: move that is planned, pixels; recorded walks have few that are longer.
        max_step: longest move, pixels.
        seed: of samples.
        fresh: as of ``PlanningDecider``.
    """

    def __init__(
        self,
        world_model: WorldModel,
        goal: Tensor,
        layouts: Layouts,
        config: PlannerConfig = IN_LATENTS,
        repeat: int = 4,
        every: int = 1,
        longest: float = 1.1,
        max_step: float = 2.45,
        seed: int = 0,
        fresh: PlannerConfig | None = FRESH_IN_LATENTS,
    ) -> None:
        self.world_model, self.layouts = world_model, layouts
        cost = LatentGoalCost(encode_goal(world_model, self._seen(goal)).detach())
        project = within_norm(longest / max_step)
        self._decider = PlanningDecider(cost, config, every, project=project, repeats=repeat, seed=seed, fresh=fresh)
        self._state = world_model.init_state(len(goal))
        self._is_first = torch.ones(len(goal), dtype=torch.bool)

    def __call__(self, positions: Tensor) -> Tensor:
        actions, self._state = self.world_model.act(self._seen(positions), self._state, self._is_first, self._decider)
        self._is_first = torch.zeros_like(self._is_first)
        return torch.from_numpy(self.world_model.action_spec.to_env(actions.numpy()))

    def follow(self, positions: Tensor, moves: Tensor) -> None:
        """Observes ``positions`` (rows, 2) and takes in that ``moves`` (rows, repeat, 2) are made there, not a plan."""
        spec, seen = self.world_model.action_spec, self._seen(positions)
        taken = spec.encode(torch.from_numpy(np.stack([spec.from_env(row) for row in moves.numpy()])))
        _, self._state = self.world_model.act(seen, self._state, self._is_first, lambda *_: taken)
        self._is_first = torch.zeros_like(self._is_first)

    def foreseen(self) -> Tensor:
        """Latents of the rest of the plan, from the newest call on: (rows, actions, latent width)."""
        with torch.no_grad():
            return LatentRollout(self.world_model)(self._state, self._decider.left[:, None])[:, 0]

    def _seen(self, positions: Tensor) -> dict[str, Tensor]:
        if self.world_model.observation_spec.modalities["observation"].kind == "vector":
            return {"observation": places(positions)}
        return {"observation": torch.from_numpy(pixels(positions, self.layouts))}
