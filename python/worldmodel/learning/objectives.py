"""Losses of the five functions, which only read running statistics.

perception    reconstruction, and KL of the posterior from the prior
prediction    KL with its gradient on the prior, reward, continuation; also trains memory
both          of an ``EmbeddingLatent`` instead of reconstruction and KL: ``latent_objective``
evaluation    λ-returns of imagination
decision      a gradient of ``worldmodel.model.decision``
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.data.actions import MASK
from worldmodel.data.batch import Batch, State
from worldmodel.learning.latent_objective import embedding_parts
from worldmodel.learning.masked import weighted_mean
from worldmodel.model.evaluation import lambda_returns
from worldmodel.model.policies import DiscretePolicy, Policy
from worldmodel.model.world_model import Imagined, Observed, WorldModel
from worldmodel.runs.fields import Checked, Positive, Size, Weight


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """Loss weights and imagination lengths.

    Attributes:
        dynamics: weight of the KL that trains the prior.
        representation: weight of the KL that trains perception.
        free_nats: KL below which perception has no loss; without it, random content is lost.
        reward: loss weight.
        continuation: loss weight.
        horizon: imagined steps.
        imagination_starts: per row.
        value_gradient: weight of the values' gradient to memory.
        return_floor: smallest return scale, in units of the reward scale.
    """

    dynamics: Weight = 1.0
    representation: Weight = 0.1
    free_nats: Weight = 1.0
    reward: Weight = 1.0
    continuation: Weight = 1.0
    horizon: Size = 4
    imagination_starts: Size = 8
    value_gradient: Weight = 0.1
    return_floor: Positive = 1.0


@dataclasses.dataclass
class ImaginedReturns:
    """Rollouts from observed states, with targets of evaluation and decision.

    ``tries`` is the number of actions for all-action, else 1.

    Attributes:
        start: features, (rows, features), with gradients to memory.
        mask: bool (rows,): starts with a loss.
        imagined: (rows * tries, ...).
        returns: λ-returns / reward scale, (rows * tries, horizon).
        q: first returns, (rows, actions); None unless all-action.
        legal: actions with a q to learn from, bool (rows, actions); None without masks.
        policy: distributions, (rows,) for all-action, else (rows, horizon).
        first_target: the start's value target, (rows,).
        weights: probability of reaching each step, (rows * tries, horizon); 0 without ``mask``.
    """

    start: Tensor
    mask: Tensor
    imagined: Imagined
    returns: Tensor
    q: Tensor | None
    policy: Policy
    first_target: Tensor
    weights: Tensor
    legal: Tensor | None = None

    @property
    def policy_returns(self) -> Tensor:
        """At starts with a loss, (starts, horizon or actions); of legal actions, (returns,)."""
        if self.q is not None and self.legal is not None:
            return self.q[self.legal & self.mask[:, None]]
        return (self.returns.detach() if self.q is None else self.q)[self.mask]

    @property
    def value_targets(self) -> Tensor:
        """All with a loss, (targets,)."""
        later = self.returns.detach()[:, 1:][self.weights[:, 1:] > 0]
        return torch.cat([self.first_target[self.mask], later])


@dataclasses.dataclass
class ImaginationLosses:
    """Losses of evaluation and decision."""

    value: Tensor
    policy: Tensor
    metrics: dict[str, Tensor]


def model_loss(
    world_model: WorldModel, batch: Batch, observed: Observed, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of perception, memory and prediction, (), and its unweighted parts."""
    masked = batch.losses_at
    acted = masked & ~batch.is_last
    rewarded = masked & batch.known_rewards
    followed = acted[:, :-1] & batch.valid[:, 1:] & ~batch.is_first[:, 1:]

    perception, prediction = world_model.perception, world_model.prediction
    latent = perception.latent
    predicted = world_model.predict(observed, batch)
    prior, posterior = predicted.prior[:, :-1], observed.posterior[:, 1:]
    rewards = torch.where(rewarded, batch.rewards / world_model.reward_scale.scale, 0).to(prior.dtype)
    goes_on = (~batch.terminated).to(prior.dtype)

    if latent.residual:
        parts, weights, metrics = embedding_parts(world_model, batch, observed, predicted, followed)
        weights["dynamics"] = config.dynamics
    else:
        reconstruction = perception.reconstruction_loss(observed.latent, batch.observations)
        dynamics = latent.kl(posterior.detach(), prior)
        representation = latent.kl(posterior, prior.detach()).clamp(min=config.free_nats)
        parts = {
            "reconstruction": weighted_mean(reconstruction, masked),
            "dynamics": weighted_mean(dynamics, followed),
            "representation": weighted_mean(representation, followed),
        }
        weights = {"reconstruction": 1.0, "dynamics": config.dynamics, "representation": config.representation}
        with torch.no_grad():
            metrics = {"latent/entropy": weighted_mean(latent.entropy(observed.posterior), masked)}
    continuation = F.binary_cross_entropy_with_logits(predicted.continues, goes_on, reduction="none")
    parts["reward"] = weighted_mean(prediction.reward.loss(predicted.reward, rewards), rewarded)
    parts["continuation"] = weighted_mean(continuation, acted)
    weights |= {"reward": config.reward, "continuation": config.continuation}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return total, {f"loss/{name}": part.detach() for name, part in (("model", total), *parts.items())} | metrics


def imagine_returns(world_model: WorldModel, states: State, mask: Tensor, config: ObjectiveConfig) -> ImaginedReturns:
    """Imagines from ``states``, (rows, ...); those in ``mask``, bool (rows,), have a loss."""
    decision = world_model.decision
    start = {name: value.detach() for name, value in states.items()}
    if decision.gradient == "all_action":
        imagined, returns, q = _try_all(world_model, start, config.horizon)
        policy = world_model.policy(start)
        assert isinstance(policy, DiscretePolicy)
        probabilities = policy.probability_of(decision.all_actions(q)).detach()  # (rows, actions)
        legal = decision.legal_actions(start[MASK]) if MASK in start else None
        tried = mask[:, None].expand(q.shape) if legal is None else legal & mask[:, None]
        weights = _weights(imagined, tried.flatten())
        first_target = (probabilities * q).sum(-1)
        return ImaginedReturns(states["features"], mask, imagined, returns, q, policy, first_target, weights, legal)
    with torch.set_grad_enabled(decision.gradient == "pathwise" and torch.is_grad_enabled()):
        imagined = world_model.imagine(start, decision, config.horizon)
        returns = _returns(world_model, imagined)
    masks = [] if imagined.action_masks is None else [imagined.action_masks[:, :-1]]
    policy = decision(imagined.features[:, :-1].detach(), *masks)
    weights = _weights(imagined, mask)
    return ImaginedReturns(states["features"], mask, imagined, returns, None, policy, returns[:, 0].detach(), weights)


def imagination_losses(
    world_model: WorldModel, found: ImaginedReturns, return_scale: float, config: ObjectiveConfig
) -> ImaginationLosses:
    """Losses of evaluation and decision; ``return_scale`` divides the returns."""
    decision, policy = world_model.decision, found.policy
    if found.q is not None:
        assert isinstance(policy, DiscretePolicy)
        probabilities = policy.probability_of(decision.all_actions(found.q))
        objective = (probabilities * (found.q - found.first_target[:, None])).sum(-1) / return_scale
        entropy, policy_weights = policy.entropy(), found.mask.to(found.q.dtype)
    else:
        entropy, policy_weights = policy.entropy(), found.weights
        if decision.gradient == "pathwise":
            objective = found.returns / return_scale
        else:
            values = world_model.evaluation.value(found.imagined.features[:, :-1].detach())
            advantage = (found.returns - values).detach() / return_scale
            objective = policy.log_probability(found.imagined.actions) * advantage
    policy_loss = -weighted_mean(objective + decision.config.entropy * entropy, policy_weights)

    share = config.value_gradient
    first = share * found.start + (1 - share) * found.start.detach()
    value_loss = _value_loss(world_model, first, found.first_target, found.mask)
    if config.horizon > 1:
        later = found.imagined.features[:, 1:-1].detach(), found.returns[:, 1:].detach(), found.weights[:, 1:]
        value_loss = (value_loss + (config.horizon - 1) * _value_loss(world_model, *later)) / config.horizon
    metrics = {
        "loss/value": value_loss.detach(),
        "loss/policy": policy_loss.detach(),
        "policy/entropy": weighted_mean(entropy, policy_weights).detach(),
        "policy/return": weighted_mean(found.first_target, found.mask),
    }
    return ImaginationLosses(value_loss, policy_loss, metrics)


@torch.no_grad()
def _try_all(world_model: WorldModel, start: State, horizon: int) -> tuple[Imagined, Tensor, Tensor]:
    """For every first action: rollouts, returns (rows * actions, horizon), Q (rows, actions)."""
    actions = world_model.decision.all_actions(start["features"])
    rows, count = start["features"].shape[0], actions.shape[0]
    tried = {name: value.repeat_interleave(count, 0) for name, value in start.items()}
    imagined = world_model.imagine(tried, world_model.decision, horizon, actions.repeat(rows, 1))
    returns = _returns(world_model, imagined)
    return imagined, returns, returns[:, 0].view(rows, count)


def _returns(world_model: WorldModel, imagined: Imagined) -> Tensor:
    """With target-network values, (rows, horizon)."""
    config = world_model.config.evaluation
    next_values = world_model.evaluation.value(imagined.features[:, 1:], target=True)
    return lambda_returns(imagined.rewards, config.discount * imagined.continues, next_values, config.lambda_)


def _weights(imagined: Imagined, mask: Tensor) -> Tensor:
    lasting = imagined.continues.detach()[:, :-1].cumprod(1)
    return torch.cat([torch.ones_like(lasting[:, :1]), lasting], 1) * mask[:, None]


def _value_loss(world_model: WorldModel, features: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    evaluation = world_model.evaluation
    return weighted_mean(evaluation.head.loss(evaluation(features), targets), weights)
