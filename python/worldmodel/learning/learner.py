"""The learner: one optimiser step per batch, with running statistics."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from worldmodel.data.batch import Batch, State
from worldmodel.learning.ema import ema_of
from worldmodel.learning.objectives import (
    ImaginedReturns,
    ObjectiveConfig,
    imagination_losses,
    imagine_returns,
    model_loss,
    replayed_value_loss,
)
from worldmodel.learning.reduction import LOCAL, Reduction
from worldmodel.learning.running_stats import (
    ReturnNormaliser,
    update_reward_scale,
    update_standardisation,
)
from worldmodel.model.latents import EmbeddingConfig
from worldmodel.model.world_model import WorldModel
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Count, Positive
from worldmodel.runs.template import check_like

Rate = Annotated[float, Bounds(0, 100)]


@dataclasses.dataclass(frozen=True)
class LearnerConfig(Checked):
    """Settings of the learner.

    Attributes:
        model_lr: of perception, memory, prediction and exploration.
        value_lr: of evaluation.
        policy_lr: of decision.
        warm_up: updates over which the learning rates rise from zero.
        max_grad_norm: largest gradient norm per parameter group.
        ema: updates averaged into ``Agent``'s weights; 0 for the newest.
        objective: weights of the losses.
    """

    model_lr: Rate = 3e-3
    value_lr: Rate = 1e-3
    policy_lr: Rate = 1e-3
    warm_up: Count = 50
    max_grad_norm: Positive = 1.0
    ema: Count = 0
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)


@dataclasses.dataclass
class Losses:
    """One loss per parameter group, and metrics."""

    model: Tensor
    value: Tensor
    policy: Tensor
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return self.model + self.value + self.policy


@dataclasses.dataclass
class _Forward:
    model: Tensor
    metrics: dict[str, Tensor]
    found: ImaginedReturns
    observe_seconds: float
    carried: State | None
    replayed: Tensor | None


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite."""


class Learner:
    """Trains a world model in place.

    Attributes:
        ema: ``AveragedModel``, or None without ``LearnerConfig.ema``.
        carried: memory states after ``Batch.carry`` steps of the newest update, by the weights before it; or None.
    """

    def __init__(self, world_model: WorldModel, config: LearnerConfig, reduction: Reduction = LOCAL) -> None:
        self.world_model = world_model
        self.config = config
        if config.objective.sampled and not world_model.config.perception.latent.stochastic:
            raise ConfigurationError(
                f"learner.objective.sampled is {config.objective.sampled:g}, expected 0, as the latent is deterministic"
            )
        if isinstance(world_model.config.perception.latent, EmbeddingConfig):
            for name in ("representation", "free_nats"):
                if (value := getattr(config.objective, name)) != getattr(ObjectiveConfig, name):
                    raise ConfigurationError(
                        f"learner.objective.{name} is {value:g}, which is of a KL: leave it out with embeddings"
                    )
        model = world_model
        modules: dict[str, tuple[nn.Module, ...]] = {
            "model": (model.perception, model.entry, model.memory, model.prediction, model.inverse or nn.Identity()),
            "value": (model.evaluation.network,),
            "policy": (model.decision,),
        }
        if model.exploration is not None:
            modules["exploration"] = (model.exploration,)
        self._parameters = {name: [p for part in parts for p in part.parameters()] for name, parts in modules.items()}
        rates = {"value": config.value_lr, "policy": config.policy_lr}
        self._lrs = {name: rates.get(name, config.model_lr) for name in modules}
        groups = [{"params": parameters} for parameters in self._parameters.values()]
        self._optimizer = torch.optim.Adam(groups, lr=config.model_lr, betas=(0.9, 0.98), fused=True)
        self._updates = 0
        self._returns = ReturnNormaliser(config.objective.return_floor)
        self._reduction = reduction
        self.ema = ema_of(world_model, config.ema) if config.ema else None
        self.carried: State | None = None

    @property
    def updates(self) -> int:
        return self._updates

    def losses(self, batch: Batch) -> Losses:
        """Losses under the current statistics, which do not change."""
        return self._losses(self._forward(batch))

    @torch.no_grad()
    def held_out_losses(self, batch: Batch, seed: int = 0) -> dict[str, float]:
        """Validation losses; nothing changes. ``seed`` is for latents and actions.

        Example:
            >>> learner.held_out_losses(batch)["loss/reconstruction"]                            # doctest: +SKIP
        """
        device = next(self.world_model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return {name: float(value) for name, value in self.losses(batch).metrics.items()}

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns losses and metrics.

        "seconds/observe" and "seconds/imagine" include backward passes and mean nothing on an asynchronous GPU.

        Raises:
            NonFiniteError: non-finite reward, loss or gradient; parameters, optimiser and statistics are unchanged.
        """
        began = time.perf_counter()
        with self._statistics_restored_on_error():
            first = not self.world_model.perception.begun
            if first:
                self._standardise(batch)  # what begins is standardised for standardised observations
            self.world_model.begin(batch, self._reduction.reduce_statistics)
            self._update_batch_statistics(batch)
            start = time.perf_counter()
            forward = self._forward(batch)
            self._update_return_statistics(forward.found)
            losses = self._losses(forward)
            for name, loss in (("model", losses.model), ("value", losses.value), ("policy", losses.policy)):
                if not loss.isfinite():
                    raise NonFiniteError(f"Learner: the {name} loss is {loss.item()} at update {self._updates}")
            marks = [time.perf_counter()]
            self._backward(losses, marks)
            norms = self._clip()
        self.carried = forward.carried and {name: value.detach() for name, value in forward.carried.items()}
        self._set_lrs()
        self._optimizer.step()
        if not first:
            self._standardise(batch)
        self.world_model.update_targets()
        self._updates += 1
        if self.ema:
            self.ema.update_parameters(self.world_model)
        metrics = {name: float(value) for name, value in losses.metrics.items()}
        metrics |= {f"gradient/{name}": norm for name, norm in norms.items()}
        metrics |= {"scale/reward": float(self.world_model.reward_scale.scale), "scale/return": self._returns.scale}
        observe, both = forward.observe_seconds, marks[0] - start
        metrics["seconds/imagine"] = both - observe + marks[1] - marks[0]
        metrics["seconds/observe"] = observe + marks[2] - marks[1]
        metrics["seconds/update"] = time.perf_counter() - began
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer.state_dict(),
            "returns": self._returns.state_dict(),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_like(state, {**self.state_dict(), "optimizer": {"state": {}}}, "learner")
        groups = self._optimizer.state_dict()["param_groups"]  # settings are the run's, not the checkpoint's
        self._optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        for parameter, moments in self._optimizer.state.items():
            like = {"step": moments["step"].new_zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            check_like(moments, {name: value.detach() for name, value in like.items()}, "learner.optimizer.state")
            if moments["step"] < 1 or moments.keys() != like.keys():
                raise ValueError("learner.optimizer.state is not that of Adam after an update")
        self._returns.load_state_dict(state["returns"])
        self._updates = int(state["updates"])
        if self.ema:
            self.ema.n_averaged.fill_(self._updates)

    def _forward(self, batch: Batch) -> _Forward:
        start, objective = time.perf_counter(), self.config.objective
        steps = self._imagination_starts(batch)
        stops = sorted({*steps, *([batch.carry] if batch.carry else [])})
        observed = self.world_model.observe(batch, states_after=stops, sampled=self._sampled_rows(batch))
        starts = _states_at(observed.states_after, [stops.index(step) for step in steps], len(stops))
        carried = _states_at(observed.states_after, [stops.index(batch.carry)], len(stops)) if batch.carry else None
        observed = dataclasses.replace(observed, states_after=starts, steps=tuple(steps))
        model, metrics = model_loss(self.world_model, batch, observed, objective)
        seconds = time.perf_counter() - start
        mask = torch.cat([(batch.losses_at & batch.known_rewards)[:, step - 1] for step in steps])
        found = imagine_returns(self.world_model, starts, mask, objective)
        replayed = (
            replayed_value_loss(self.world_model, batch, observed, objective) if objective.replayed_value else None
        )
        return _Forward(model, metrics, found, seconds, carried, replayed)

    def _losses(self, forward: _Forward) -> Losses:
        imagined = imagination_losses(self.world_model, forward.found, self._returns.scale, self.config.objective)
        value, metrics = imagined.value, forward.metrics | imagined.metrics
        if forward.replayed is not None:
            value = value + self.config.objective.replayed_value * forward.replayed
            metrics["loss/replayed_value"] = forward.replayed.detach()
        return Losses(forward.model, value, imagined.policy, metrics)

    def _update_batch_statistics(self, batch: Batch) -> None:
        rewards = batch.rewards[batch.known_rewards]
        if not rewards.isfinite().all():
            raise NonFiniteError(f"Learner: a reward is NaN or infinite at update {self._updates}")
        scale = self.world_model.reward_scale
        update_reward_scale(scale, rewards, self._reduction)

    def _standardise(self, batch: Batch) -> None:
        update_standardisation(self.world_model.perception, batch.observations, batch.valid, self._reduction)

    def _update_return_statistics(self, found: ImaginedReturns) -> None:
        self._returns.update(found.policy_returns, self._reduction)

    @contextlib.contextmanager
    def _statistics_restored_on_error(self) -> Iterator[None]:
        buffers = {name: buffer.clone() for name, buffer in self.world_model.named_buffers()}
        returns = self._returns.state_dict()
        try:
            yield
        except Exception:
            for name, buffer in self.world_model.named_buffers():
                buffer.copy_(buffers[name])
            self._returns.load_state_dict(returns)
            raise

    def _imagination_starts(self, batch: Batch) -> list[int]:
        """One random step per equal section; followed by as many as the loss of an embedding's rollouts compares."""
        first = int(batch.loss_mask.any(0).to(torch.uint8).argmax())  # first step with a loss
        length, latent = batch.shape[1], self.world_model.config.perception.latent
        if isinstance(latent, EmbeddingConfig):
            length = max(first + 1, length - latent.rollout)
        count = min(self.config.objective.imagination_starts, length - first)
        edges = torch.linspace(first + 1, length + 1, count + 1).long()
        steps = edges[:-1] + (torch.rand(count) * (edges[1:] - edges[:-1])).long()
        return [int(step) for step in steps]

    def _sampled_rows(self, batch: Batch) -> Tensor | None:
        share, rows = self.config.objective.sampled, batch.shape[0]
        return torch.rand(rows, device=batch.loss_mask.device) < share if share else None

    def _backward(self, losses: Losses, marks: list[float]) -> None:
        self._optimizer.zero_grad()
        # The policy's objective flows through the model but must not train it.
        policy = self._parameters["policy"]
        for parameter, gradient in zip(policy, torch.autograd.grad(losses.policy, policy), strict=True):
            parameter.grad = gradient
        marks.append(time.perf_counter())
        (losses.model + losses.value).backward()
        marks.append(time.perf_counter())
        for parameters in self._parameters.values():
            self._reduction.reduce_gradients(parameters)

    def _clip(self) -> dict[str, float]:
        norms = {}
        for name, parameters in self._parameters.items():
            norms[name] = float(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm, foreach=True))
            if not norms[name] < float("inf"):
                self._optimizer.zero_grad()
                raise NonFiniteError(
                    f"Learner: the gradient of the {name} group is {norms[name]} at update {self._updates}"
                )
        return norms

    def _set_lrs(self) -> None:
        warm = min(1.0, (self._updates + 1) / max(1, self.config.warm_up))
        for group, lr in zip(self._optimizer.param_groups, self._lrs.values(), strict=True):
            group["lr"] = lr * warm


def _states_at(states: State, stops: list[int], count: int) -> State:
    """Those of ``stops`` among states after ``count`` stops, (count * rows, ...) -> (stops * rows, ...)."""
    if len(stops) == count:
        return states
    return {name: value.unflatten(0, (count, -1))[stops].flatten(0, 1) for name, value in states.items()}
