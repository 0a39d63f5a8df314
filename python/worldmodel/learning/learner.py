"""Learning: one ``update`` for a batch, with the optimisers and the running scales that it needs.

One update observes the batch in parallel, and imagines from the states after a few steps of every row; the losses are
in ``worldmodel.learning.objectives``. Perception, memory and prediction are one group of parameters, evaluation is
another and decision the third: the policy's gain never changes what the world is believed to be.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.data.batch import Batch
from worldmodel.learning.ema import Average
from worldmodel.learning.objectives import ObjectiveConfig, imagination_losses, model_loss
from worldmodel.learning.running_stats import ReturnRange, RewardScale
from worldmodel.model.world_model import WorldModel


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Learning.

    Attributes:
        learning_rate: of perception, memory and prediction.
        value_rate: of evaluation.
        policy_rate: of decision.
        warm_up: updates over which the learning rates rise from zero.
        clip: largest norm of the gradient of each of the three groups.
        average: updates over which weights are averaged for ``Agent``; 0 gives it the newest ones.
        objective: weights of the losses.
    """

    learning_rate: float = 3e-3
    value_rate: float = 1e-3
    policy_rate: float = 1e-3
    warm_up: int = 50
    clip: float = 1.0
    average: int = 0
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        if self.average < 0:
            raise ValueError(f"LearnerConfig: average is {self.average}, expected at least 0")


@dataclasses.dataclass
class Losses:
    """One loss for each group of parameters, and figures to report."""

    model: Tensor
    value: Tensor
    policy: Tensor
    metrics: dict[str, Tensor]
    seconds: dict[str, float]

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.model + self.value + self.policy


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


class Learner:
    """Trains a world model.

    Args:
        world_model: its parameters are changed in place.
        config: optimisers and losses.

    Attributes:
        average: the world model with averaged weights, where the configuration asks for it.
    """

    def __init__(self, world_model: WorldModel, config: LearnerConfig) -> None:
        self.world_model = world_model
        self.config = config
        model = world_model
        modules = {
            "model": (model.perception, model.entry, model.memory, model.prediction),
            "value": (model.evaluation.network,),
            "policy": (model.decision,),
        }
        self._parameters = {name: [p for part in parts for p in part.parameters()] for name, parts in modules.items()}
        self._rates = {"model": config.learning_rate, "value": config.value_rate, "policy": config.policy_rate}
        groups = [{"params": parameters} for parameters in self._parameters.values()]
        self._optimizer = torch.optim.Adam(groups, lr=config.learning_rate, betas=(0.9, 0.98), foreach=True)
        self._updates = 0
        self._rewards = RewardScale()
        self._returns = ReturnRange(config.objective.return_floor)
        self.average = Average(world_model, config.average) if config.average else None

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self._updates

    @property
    def reward_scale(self) -> float:
        """What rewards are divided by."""
        return self._rewards.scale

    def losses(self, batch: Batch) -> Losses:
        """The losses of ``batch``; gradients of ``total`` reach all five functions."""
        began = time.perf_counter()
        objective = self.config.objective
        cuts = self._cuts(batch)
        observed = self.world_model.observe(batch, cuts=cuts)
        model, metrics = model_loss(self.world_model, batch, observed, self._rewards.scale, objective)
        seen = time.perf_counter()
        usable = torch.cat([(batch.losses_at & batch.known_rewards)[:, cut - 1] for cut in cuts])
        imagined = imagination_losses(self.world_model, observed.cut_states, usable, self._returns, objective)
        seconds = {"observe": seen - began, "imagine": time.perf_counter() - seen}
        return Losses(model, imagined.value, imagined.policy, metrics | imagined.metrics, seconds)

    def update(self, batch: Batch) -> dict[str, float]:
        """One step of the optimisers.

        Args:
            batch: on the device of the world model.

        Returns:
            Losses and other figures by name. "seconds/observe" and "seconds/imagine" hold their share of the backward
            pass; on a GPU, which runs behind, they tell nothing.

        Raises:
            NonFiniteError: a loss or a gradient is not finite; parameters and optimisers are as they were.
        """
        began = time.perf_counter()
        rewards = batch.rewards[batch.known_rewards]
        if not rewards.isfinite().all():
            raise NonFiniteError(f"Learner: a reward is NaN or infinite at update {self._updates}")
        self._rewards.update(rewards)
        losses = self.losses(batch)
        for name, loss in (("model", losses.model), ("value", losses.value), ("policy", losses.policy)):
            if not loss.isfinite():
                raise NonFiniteError(f"Learner: the {name} loss is {loss.item()} at update {self._updates}")
        marks = [time.perf_counter()]
        self._optimizer.zero_grad()
        # The policy's gain may come through the whole model, whose parameters it leaves alone.
        policy = self._parameters["policy"]
        for parameter, gradient in zip(policy, torch.autograd.grad(losses.policy, policy), strict=True):
            parameter.grad = gradient
        marks.append(time.perf_counter())
        (losses.model + losses.value).backward()
        marks.append(time.perf_counter())
        norms = self._clip()
        self._set_rates()
        self._optimizer.step()
        self.world_model.evaluation.update_target()
        self.world_model.perception.update(batch.observations, batch.valid)
        self._updates += 1
        if self.average:
            self.average.follow(self.world_model, self._updates)
        figures = {name: float(value) for name, value in losses.metrics.items()}
        figures |= {f"gradient/{name}": norm for name, norm in norms.items()}
        figures |= {"scale/reward": self._rewards.scale, "scale/return": self._returns.range}
        figures["seconds/imagine"] = losses.seconds["imagine"] + marks[1] - marks[0]
        figures["seconds/observe"] = losses.seconds["observe"] + marks[2] - marks[1]
        figures["seconds/update"] = time.perf_counter() - began
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Optimisers, running scales and the number of updates, as tensors and plain numbers in nested dicts.

        The slow target and the ranges of the heads are in the world model's own state dict, the average in its own.
        """
        return {
            "optimizer": self._optimizer.state_dict(),
            "rewards": self._rewards.state_dict(),
            "returns": self._returns.state_dict(),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` said."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._rewards.load_state_dict(state["rewards"])
        self._returns.load_state_dict(state["returns"])
        self._updates = int(state["updates"])

    def _cuts(self, batch: Batch) -> list[int]:
        """Numbers of steps after which imagination starts, one drawn from each of ``starts`` stretches of the rows."""
        length = batch.shape[1]
        first = int(batch.loss_mask.any(0).to(torch.uint8).argmax())  # before it, no row has a loss
        count = min(self.config.objective.starts, length - first)
        edges = torch.linspace(first + 1, length + 1, count + 1).long()
        places = edges[:-1] + (torch.rand(count) * (edges[1:] - edges[:-1])).long()
        return [int(place) for place in places]

    def _clip(self) -> dict[str, float]:
        norms = {}
        for name, parameters in self._parameters.items():
            norms[name] = float(nn.utils.clip_grad_norm_(parameters, self.config.clip))
            if not norms[name] < float("inf"):
                self._optimizer.zero_grad()
                raise NonFiniteError(
                    f"Learner: the gradient of the {name} group is {norms[name]} at update {self._updates}"
                )
        return norms

    def _set_rates(self) -> None:
        warm = min(1.0, (self._updates + 1) / max(1, self.config.warm_up))
        for group, rate in zip(self._optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * warm
