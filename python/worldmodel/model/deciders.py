"""Deciders choose the actions of ``WorldModel.act``."""

import warnings
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldmodel.data.actions import MASK
from worldmodel.data.batch import State

if TYPE_CHECKING:
    from worldmodel.model.world_model import WorldModel


class Decider(Protocol):
    """Chooses an action per row, without gradients."""

    def __call__(self, world_model: "WorldModel", state: State) -> Tensor:
        """``state`` after ``WorldModel.observe_step`` -> encoded actions (batch, action width).

        Where the environment gives masks, ``state["action_mask"]``, bool (batch, classes), has the legal classes.
        """


@runtime_checkable
class EpisodeDecider(Decider, Protocol):
    """A decider that is told when an episode begins in a row of its batch."""

    def begin(self, row: int, seed: int) -> None:
        """An episode of ``seed`` begins in ``row``; called before the first action."""


def policy_sample(world_model: "WorldModel", state: State) -> Tensor:
    """Samples the policy by PyTorch's generator."""
    return world_model.policy(state).sample()


def random_seed() -> int:
    """Drawn by PyTorch's generator."""
    return int(torch.randint(2**31, ()))


class SampledPolicy:
    """``policy_sample`` with a generator for each row, so that an episode is the same beside any others.

    Rows of which no episode was begun have generators seeded by PyTorch's.
    """

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def begin(self, row: int, seed: int) -> None:
        self._generators[row] = torch.Generator().manual_seed(seed)

    def __call__(self, world_model: "WorldModel", state: State) -> Tensor:
        for row in range(len(state["features"])):
            if row not in self._generators:
                self.begin(row, random_seed())
        return world_model.policy(state).sample([self._generators[row] for row in range(len(state["features"]))])


def policy_mode(world_model: "WorldModel", state: State) -> Tensor:
    """The policy's mode."""
    return world_model.policy(state).mode()


def one_step_planning(world_model: "WorldModel", state: State) -> Tensor:
    """The action of largest Q; needs ``Decision.is_enumerable``."""
    q, actions = action_values(world_model, state)
    return actions[q.argmax(-1)]


def action_values(world_model: "WorldModel", state: State) -> tuple[Tensor, Tensor]:
    """Q(s, a) = r + γ c v' of every action, with continuation probability c; memory sees the prior as a posterior.

    Returns:
        ``(q, actions)``: (batch, actions), divided by the reward scale, minus infinity for illegal actions, and
        (actions, action width).
    """
    features = state["features"]
    actions = world_model.decision.all_actions(features)
    rows, count = features.shape[0], actions.shape[0]
    repeated = {name: value.repeat_interleave(count, 0) for name, value in state.items()}
    first, as_observed = actions.repeat(rows, 1), world_model.perception.latent.as_observed
    imagined = world_model.imagine(repeated, world_model.decision, 1, first, sample=as_observed)
    values = world_model.evaluation.value(imagined.features[:, 1])
    q = imagined.rewards[:, 0] + world_model.config.evaluation.discount * imagined.continues[:, 0] * values
    q = q.view(rows, count)
    if MASK in state:
        q = q.masked_fill(~world_model.decision.legal_actions(state[MASK]), -torch.inf)
    return q, actions


def decider_of(decider: Decider | None, greedy: bool | None, default: Decider) -> Decider:
    """Resolves the deprecated ``greedy``; raises TypeError if ``decider`` is given as well."""
    if greedy is None:
        return decider or default
    if decider is not None:
        raise TypeError("act: decider and greedy are both given, expected decider alone")
    warnings.warn(
        "greedy= is decider= now: worldmodel.model.deciders.policy_sample for greedy=False, none for greedy=True",
        FutureWarning,
        stacklevel=3,
    )
    return default if greedy else policy_sample


def greedy_decider(world_model: "WorldModel") -> Decider:
    """The decider of ``DecisionConfig.greedy``."""
    plans = world_model.config.decision.greedy == "one_step_planning" and world_model.decision.is_enumerable
    return one_step_planning if plans else policy_mode
