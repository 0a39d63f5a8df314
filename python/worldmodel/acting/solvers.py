"""stable-worldmodel's interfaces: its solvers plan in a world model, and ``Planner`` plans for its policies.

That package (arXiv 2605.21800) calls a model's ``get_cost`` and a solver's ``configure`` and ``solve`` by name, so
nothing of it is imported here. Entries of its ``info`` are (rows, history, ...); its solvers repeat them for their
samples, (rows, samples, history, ...).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.acting.plan_costs import GoalCost, LatentRollout, encode_goal
from worldmodel.acting.planner import Planner, PlannerConfig, Project
from worldmodel.model.world_model import WorldModel

_PICTURES = {"observation": ("pixels", "goal")}


class Costable(Protocol):
    """What a solver plans in."""

    def get_cost(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        """``action_candidates`` (rows, samples, horizon, action width) -> (rows, samples)."""


class SolverModel(nn.Module):
    """A world model for stable-worldmodel's solvers: the cost of actions is that of ``GoalCost`` in its latents.

    Actions are encoded, from -1 to 1, and limited to that. Memory begins at the newest observation, because ``info``
    has no past actions.

    Args:
        world_model: with continuous actions.
        entries: of each modality, the entries of ``info`` with the observation and the goal; pixels and goal for a
            single picture.
        weights: of ``GoalCost``.

    Raises:
        ValueError: discrete actions; in ``get_cost``, an entry that is missing, or of another shape than the modality.
    """

    def __init__(
        self, world_model: WorldModel, entries: Mapping[str, tuple[str, str]] = _PICTURES, **weights: float
    ) -> None:
        super().__init__()
        self.world_model, self._entries, self._weights = world_model, dict(entries), weights
        self._rollout = LatentRollout(world_model)
        if self._entries.keys() != world_model.observation_spec.modalities.keys():
            expected = ", ".join(world_model.observation_spec.modalities)
            raise ValueError(f"SolverModel: entries are of {', '.join(self._entries)}, expected {expected}")

    def get_cost(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        model = self.world_model
        with torch.no_grad():
            goal = encode_goal(model, self._newest(info_dict, 1))
            state, first = model.init_state(len(goal)), torch.ones(len(goal), dtype=torch.bool, device=goal.device)
            _, state = model.observe_step(self._newest(info_dict, 0), state["action"], state, first)
        return GoalCost(goal, **self._weights)(self._rollout(state, action_candidates.clamp(-1, 1)))

    def criterion(self, info_dict: dict[str, Any], action_candidates: Tensor) -> Tensor:
        """The same."""
        return self.get_cost(info_dict, action_candidates)

    def _newest(self, info: Mapping[str, Any], which: int) -> dict[str, Tensor]:
        """Of each row, by modality."""
        found = {}
        for name, entries in self._entries.items():
            key, shape = entries[which], self.world_model.observation_spec.modalities[name].shape
            value = torch.as_tensor(info[key]) if key in info else None
            if value is None or value.dim() != 3 + len(shape) or tuple(value.shape[3:]) != shape:
                has = "missing" if value is None else f"of shape {tuple(value.shape)}"
                expected = ", ".join(map(str, ("rows", "samples", "history", *shape)))
                raise ValueError(f"SolverModel: info's {key} is {has}, expected ({expected})")
            found[name] = value[:, 0, -1]
        return found


class PlanningSolver:
    """``Planner`` as a solver of stable-worldmodel's policies.

    Args:
        model: theirs, or a ``SolverModel``.
        config: of the search; the horizon is that of the policy's plans.
        project: makes actions allowed; limits them to the bounds of the action space if None.
        seed: of samples.

    Raises:
        ValueError: in ``configure``, an action space without finite bounds, unless there is ``project``.
    """

    def __init__(
        self,
        model: Costable,
        config: PlannerConfig | None = None,
        project: Project | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.config, self._given = model, config or PlannerConfig(std=0.5), project
        self._generator = torch.Generator().manual_seed(seed)

    def configure(self, *, action_space: Any, n_envs: int, config: Any) -> None:
        """``action_space`` is batched over environments; ``config`` has the horizon and the actions of a block."""
        self.n_envs, self.horizon = n_envs, int(config.horizon)
        self.action_dim = int(np.prod(action_space.shape[1:])) * config.action_block
        self._project = self._given or _within(action_space, config.action_block)

    def solve(self, info_dict: dict[str, Any], init_action: Tensor | None = None) -> dict[str, Any]:
        """Plans for the rows of ``info_dict``, from ``init_action`` (rows, at most horizon, action width).

        Returns:
            "actions" (rows, horizon, action width), and their "costs", a list of numbers.
        """
        rows = len(next(iter(info_dict.values())))
        start = torch.zeros(rows, self.horizon, self.action_dim)
        if init_action is not None:
            start[:, : init_action.shape[1]] = init_action
        config = dataclasses.replace(self.config, horizon=self.horizon)
        planner = Planner(self._cost, None, self.action_dim, config, project=self._project, generator=self._generator)
        plan = planner.plan(info_dict, rows, start)
        return {"actions": plan.actions, "costs": plan.cost.tolist()}

    __call__ = solve

    def _cost(self, info: dict[str, Any], actions: Tensor) -> Tensor:
        samples = actions.shape[1]
        return self.model.get_cost({name: _repeated(value, samples) for name, value in info.items()}, actions)


def _within(space: Any, block: int) -> Project:
    low, high = (
        torch.as_tensor(bound[0], dtype=torch.float32).flatten().repeat(block) for bound in (space.low, space.high)
    )
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(f"PlanningSolver: the action space is {space}, expected finite bounds, or a project")
    return lambda actions: actions.clamp(low, high)


def _repeated(value: Any, samples: int) -> Any:
    """(rows, ...) -> (rows, samples, ...), of arrays."""
    if isinstance(value, Tensor):
        return value[:, None].expand(len(value), samples, *value.shape[1:])
    return np.repeat(value[:, None], samples, 1) if isinstance(value, np.ndarray) else value
