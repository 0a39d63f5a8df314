"""Planning as a decider of ``WorldModel.act``."""

from typing import Any

import torch
from torch import Tensor

from worldmodel.acting.plan_costs import LatentGoalCost, LatentRollout, ReturnCost, WorldModelRollout
from worldmodel.acting.planner import Cost, Planner, PlannerConfig, Project, Rollout, shifted
from worldmodel.data.batch import State
from worldmodel.model.world_model import Sampler, WorldModel

IN_LATENTS = PlannerConfig(std=0.4, samples=16, first=4, iterations=2)
"""For learned latents and plans that are renewed after every action: small searches, each beginning with the last."""
FRESH_IN_LATENTS = PlannerConfig(std=0.4)
"""For the first of them."""


class PlanningDecider:
    """Plans in the world model's latents, and acts by the plan's first actions: an ``EpisodeDecider``.

    A row whose previous action is the plan's begins the next search with the rest of the plan; others, such as those of
    a new episode, begin afresh. All rows plan as soon as one of them has to, each with random numbers of its own.

    Args:
        cost: of ``Trajectories``, (rows, samples); ``ReturnCost`` if None. May be set between two calls.
        config: of the search; actions are encoded, from -1 to 1.
        every: actions that are taken from a plan, at most its horizon.
        sample: as for ``WorldModelRollout``.
        project: makes actions of a plan allowed, as for ``Planner``.
        repeats: equal parts of an action: those of a world model with ``action_steps`` are searched as one move each.
        seed: of the first row's samples; the other rows' follow it. That of an episode that was begun replaces it.
        fresh: of the search where a row begins afresh, with the horizon of ``config``, which it is if None.

    Raises:
        ValueError: ``every`` of less than 1 or beyond the horizon; discrete actions, or not a multiple of ``repeats``.

    Example:
        >>> decider = PlanningDecider(config=PlannerConfig(horizon=12, samples=64, iterations=3))
        >>> action, state = agent.act(observation, state, decider=decider)                   # doctest: +SKIP
    """

    def __init__(
        self,
        cost: Cost | None = None,
        config: PlannerConfig | None = None,
        every: int = 1,
        sample: Sampler | None = None,
        project: Project | None = None,
        repeats: int = 1,
        seed: int = 0,
        fresh: PlannerConfig | None = None,
    ) -> None:
        self.cost, self.config, self.every, self.sample = cost, config or PlannerConfig(std=0.5), every, sample
        if not 1 <= every <= self.config.horizon:
            raise ValueError(f"PlanningDecider: every is {every}, expected 1 to the horizon of {self.config.horizon}")
        self.project, self.repeats, self.fresh = project, repeats, fresh or self.config
        if self.fresh.horizon != self.config.horizon:
            raise ValueError(
                f"PlanningDecider: fresh has a horizon of {self.fresh.horizon}, expected config's {self.config.horizon}"
            )
        self._seed, self._generators = seed, list[torch.Generator]()
        self._actions: Tensor | None = None
        self._used = 0

    @property
    def left(self) -> Tensor:
        """The newest plan from the newest action on, encoded: (rows, at most horizon, action width)."""
        if self._actions is None:
            raise ValueError("PlanningDecider.left: there is no plan yet, expected a call before")
        return self._actions[:, self._used - 1 :].repeat(1, 1, self.repeats)

    def begin(self, row: int, seed: int) -> None:
        """Forgets the row's plan, and draws its samples by ``seed``."""
        self._add_generators(row + 1)
        self._generators[row].manual_seed(seed)
        if self._actions is not None and row < len(self._actions):
            self._actions[row] = torch.nan  # no action is the next of it

    def _add_generators(self, rows: int) -> None:
        for row in range(len(self._generators), rows):
            self._generators.append(torch.Generator().manual_seed(self._seed + row))

    def __call__(self, world_model: WorldModel, state: State) -> Tensor:
        previous = state["action"]
        rows, width = previous.shape
        self._add_generators(rows)
        if self.repeats < 1 or width % self.repeats:
            raise ValueError(f"PlanningDecider: repeats is {self.repeats}, expected a divisor of the {width} numbers")
        plan, follows = self._actions, torch.zeros(rows, dtype=torch.bool, device=previous.device)
        if plan is not None and (len(plan), plan.shape[2] * self.repeats) == (rows, width):
            follows = (previous == plan[:, self._used - 1].repeat(1, self.repeats)).all(-1)
        if plan is None or self._used >= self.every or not bool(follows.all()):
            shape = rows, self.config.horizon, width // self.repeats
            warm = previous.new_zeros(shape)
            if plan is not None and bool(follows.any()):
                warm = torch.where(follows[:, None, None], shifted(plan, self._used), warm)
            config = self.config if bool(follows.all()) else self.fresh
            planner = self._planner(world_model, shape[2], config, self._generators[:rows])
            plan, self._used = planner.plan(state, rows, warm).actions, 0
            self._actions = plan
        self._used += 1
        return plan[:, self._used - 1].repeat(1, self.repeats)

    def _planner(
        self, world_model: WorldModel, width: int, config: PlannerConfig, generators: list[torch.Generator]
    ) -> Planner:
        cost: Cost = self.cost or ReturnCost(world_model)
        imagined: Rollout = WorldModelRollout(world_model, self.sample)
        if isinstance(cost, LatentGoalCost):  # which needs no rewards
            imagined, cost = LatentRollout(world_model, self.sample), cost.of_latents

        def rollout(state: State, actions: Tensor) -> Any:
            return imagined(state, actions.repeat(1, 1, 1, self.repeats))

        return Planner(rollout, cost, width, config, project=self.project, generator=generators)
