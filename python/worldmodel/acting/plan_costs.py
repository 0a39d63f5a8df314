"""Costs of plans, and a world model's rollout for ``Planner``."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.data.batch import State
from worldmodel.model.world_model import Sampler, WorldModel


class GoalCost:
    """Distance of a path to a goal: ``nearest`` min_t d_t + ``mean`` mean_t d_t + ``last`` d_H.

    The first term alone flies past the goal; the second prefers to be early, the third to stay.

    Args:
        goal: (rows, ...), of the path's kind.
        nearest: weight of the least distance.
        mean: weight of the mean distance.
        last: weight of the distance at the end.

    Raises:
        ValueError: a goal of another shape than the path, or with NaN.

    Example:
        >>> path = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])[:, None]    # one row, one sample
        >>> GoalCost(torch.zeros(1, 2), nearest=1, mean=0.5, last=0.25)(path)       # 1 + .5 * 2 + .25 * 2
        tensor([[2.5000]])
    """

    def __init__(self, goal: Tensor, nearest: float = 1.0, mean: float = 0.02, last: float = 0.1) -> None:
        if not bool(goal.isfinite().all()):
            raise ValueError("GoalCost: goal holds NaN or infinity, expected finite numbers")
        self.goal, self.nearest, self.mean, self.last = goal, nearest, mean, last

    def __call__(self, path: Tensor) -> Tensor:
        """(rows, samples, horizon, ...) -> (rows, samples)."""
        if path.dim() < 4 or path.shape[0] != len(self.goal) or path.shape[3:] != self.goal.shape[1:]:
            expected = (*path.shape[:1], *path.shape[3:])
            raise ValueError(f"GoalCost: goal has shape {tuple(self.goal.shape)}, expected {expected}, as the path has")
        distances = (path - self.goal[:, None, None]).flatten(3).norm(dim=-1)  # (rows, samples, horizon)
        cost = self.nearest * distances.amin(-1) + self.mean * distances.mean(-1)
        return cost + self.last * distances[..., -1]


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Imagined by ``WorldModelRollout``.

    Attributes:
        latents: z_t as features, (rows, samples, horizon, latent width).
        features: s_t, with the initial state's, (rows, samples, horizon + 1, features).
        rewards: divided by the reward scale, (rows, samples, horizon).
        continues: continuation probability, (rows, samples, horizon).
    """

    latents: Tensor
    features: Tensor
    rewards: Tensor
    continues: Tensor


class WorldModelRollout:
    """``WorldModel.imagine_actions`` as a planner's rollout, differentiable in the state and the actions.

    Args:
        world_model: with continuous actions.
        sample: distribution -> latent; ``Latent.mode`` if None.

    Raises:
        ValueError: discrete actions.
    """

    def __init__(self, world_model: WorldModel, sample: Sampler | None = None) -> None:
        if world_model.action_spec.kind != "continuous":
            raise ValueError(f"WorldModelRollout: actions are {world_model.action_spec.kind}, expected continuous ones")
        self.world_model = world_model
        self.sample = sample or world_model.perception.latent.mode

    def __call__(self, state: State, actions: Tensor) -> Trajectories:
        rows, samples = actions.shape[:2]
        repeated = {name: value.repeat_interleave(samples, 0) for name, value in state.items()}
        imagined = self.world_model.imagine_actions(repeated, actions.flatten(0, 1), self.sample)
        latents = self.world_model.perception.latent.embed(imagined.latent)
        parts = latents, imagined.features, imagined.rewards, imagined.continues
        return Trajectories(*(part.unflatten(0, (rows, samples)) for part in parts))


class LatentRollout:
    """As ``WorldModelRollout``, of the latents alone, (rows, samples, horizon, latent width): for ``GoalCost``."""

    def __init__(self, world_model: WorldModel, sample: Sampler | None = None) -> None:
        self._inner = WorldModelRollout(world_model, sample)

    def __call__(self, state: State, actions: Tensor) -> Tensor:
        world_model = self._inner.world_model
        repeated = {name: value.repeat_interleave(actions.shape[1], 0) for name, value in state.items()}
        latents = world_model.imagine_latents(repeated, actions.flatten(0, 1), self._inner.sample)
        return world_model.perception.latent.embed(latents).unflatten(0, actions.shape[:2])


class LatentGoalCost:
    """``GoalCost`` of the latents of ``Trajectories``; the goal is (rows, latent width), as ``encode_goal`` returns.

    Attributes:
        of_latents: the same cost of latents alone, as ``LatentRollout`` returns.
    """

    def __init__(self, goal: Tensor, nearest: float = 1.0, mean: float = 0.02, last: float = 0.1) -> None:
        self.of_latents = GoalCost(goal, nearest, mean, last)

    def __call__(self, trajectories: Trajectories) -> Tensor:
        return self.of_latents(trajectories.latents)


class ReturnCost:
    """Minus the discounted return of ``Trajectories``, with the value of the last state."""

    def __init__(self, world_model: WorldModel) -> None:
        self.world_model = world_model

    def __call__(self, trajectories: Trajectories) -> Tensor:
        discount = self.world_model.config.evaluation.discount
        weights = torch.cumprod(discount * trajectories.continues, -1)
        before = torch.cat([torch.ones_like(weights[..., :1]), weights[..., :-1]], -1)
        value = self.world_model.evaluation.value(trajectories.features[:, :, -1])
        return -(before * trajectories.rewards).sum(-1) - weights[..., -1] * value


def encode_goal(world_model: WorldModel, observation: Mapping[str, Tensor]) -> Tensor:
    """The latent of a goal's observation, by modality (rows, *shape), as features (rows, latent width).

    Raises:
        ValueError: without a modality of the world model, or of another shape.
    """
    for name, modality in world_model.observation_spec.modalities.items():
        found = observation.get(name)
        if found is None or tuple(found.shape[1:]) != modality.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise ValueError(f"encode_goal: {name} is {shape}, expected (rows, {', '.join(map(str, modality.shape))})")
    return world_model.perception.latent.embed_mean(world_model.perception(observation))
