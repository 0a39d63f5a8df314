"""Losses of the five functions, which only read running statistics.

perception    reconstruction, and KL of the posterior from the prior
prediction    KL with its gradient on the prior, reward, continuation; also trains memory
both          of an ``EmbeddingLatent`` instead of reconstruction and KL: ``latent_objective``
exploration   KL of the posterior from what each of its networks predicts
evaluation    λ-returns of imagination, with the bonus of exploration, and of the rewards that were got
decision      a gradient of ``worldmodel.model.decision``
"""

import dataclasses
from typing import Annotated

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
from worldmodel.runs.fields import Bounds, Checked, Positive, Size, Weight


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
        sampled: share of the rows whose memory sees sampled latents, as in imagination, instead of their means, as when
            acting. The memory states that the replay keeps of such rows are those after the samples.
        value_gradient: weight of the values' gradient to memory.
        replayed_value: weight of the values' loss at replayed steps, beside 1 of imagination.
        return_floor: smallest return scale, in units of the reward scale.
    """

    dynamics: Weight = 1.0
    representation: Weight = 0.1
    free_nats: Weight = 1.0
    reward: Weight = 1.0
    continuation: Weight = 1.0
    horizon: Size = 4
    imagination_starts: Size = 8
    sampled: Annotated[float, Bounds(0, 1)] = 0.0
    value_gradient: Weight = 0.1
    replayed_value: Weight = 0.0
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
        bonus: of exploration / reward scale, (rows * tries, horizon); None without.
    """

    start: Tensor
    mask: Tensor
    imagined: Imagined
    returns: Tensor
    q: Tensor | None
    policy: Policy
    first_target: Tensor
    weights: Tensor
    bonus: Tensor | None
    legal: Tensor | None = None

    @property
    def policy_returns(self) -> Tensor:
        """At starts with a loss, (starts, horizon or actions); of legal actions, (returns,)."""
        if self.q is not None and self.legal is not None:
            return self.q[self.legal & self.mask[:, None]]
        return (self.returns.detach() if self.q is None else self.q)[self.mask]


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
    if world_model.exploration is not None:
        actions = world_model.action_spec.encode(batch.actions)[:, :-1]
        learned = world_model.exploration.loss(observed.features[:, :-1], actions, posterior)
        parts["exploration"] = weighted_mean(learned, followed)
        total = total + parts["exploration"]
    return total, {f"loss/{name}": part.detach() for name, part in (("model", total), *parts.items())} | metrics


def imagine_returns(world_model: WorldModel, states: State, mask: Tensor, config: ObjectiveConfig) -> ImaginedReturns:
    """Imagines from ``states``, (rows, ...); those in ``mask``, bool (rows,), have a loss."""
    decision = world_model.decision
    start = {name: value.detach() for name, value in states.items()}
    if decision.gradient == "all_action":
        imagined, returns, q, bonus = _try_all(world_model, start, config.horizon)
        policy = world_model.policy(start)
        assert isinstance(policy, DiscretePolicy)
        probabilities = policy.probability_of(decision.all_actions(q)).detach()  # (rows, actions)
        legal = decision.legal_actions(start[MASK]) if MASK in start else None
        tried = mask[:, None].expand(q.shape) if legal is None else legal & mask[:, None]
        weights = _weights(imagined, tried.flatten())
        first_target = (probabilities * q).sum(-1)
        return ImaginedReturns(
            states["features"], mask, imagined, returns, q, policy, first_target, weights, bonus, legal
        )
    with torch.set_grad_enabled(decision.gradient == "pathwise" and torch.is_grad_enabled()):
        imagined = world_model.imagine(start, decision, config.horizon)
        returns, bonus = _returns(world_model, imagined)
    masks = [] if imagined.action_masks is None else [imagined.action_masks[:, :-1]]
    policy = decision(imagined.features[:, :-1].detach(), *masks)
    weights = _weights(imagined, mask)
    first_target = returns[:, 0].detach()
    return ImaginedReturns(states["features"], mask, imagined, returns, None, policy, first_target, weights, bonus)


def imagination_losses(
    world_model: WorldModel, found: ImaginedReturns, return_scale: float, config: ObjectiveConfig
) -> ImaginationLosses:
    """Losses of evaluation and decision; ``return_scale`` divides the returns."""
    decision, evaluation, policy = world_model.decision, world_model.evaluation, found.policy
    share = config.value_gradient
    first = share * found.start + (1 - share) * found.start.detach()
    rows = first.shape[0]
    later = found.imagined.features[:, 1:-1].detach().flatten(0, 1)
    outputs = evaluation(torch.cat([first, later]))  # read once: (rows + rows * tries * (horizon - 1), ...)
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
            values = evaluation.head.mean(outputs.detach())
            values = torch.cat([values[:rows, None], values[rows:].view(rows, -1)], 1)
            advantage = (found.returns - values).detach() / return_scale
            objective = policy.log_probability(found.imagined.actions) * advantage
    policy_loss = -weighted_mean(objective + decision.config.entropy * entropy, policy_weights)

    targets = torch.cat([found.first_target, found.returns[:, 1:].detach().flatten()])
    losses = evaluation.head.loss(outputs, targets)
    value_loss = weighted_mean(losses[:rows], found.mask)
    if config.horizon > 1:
        later_loss = weighted_mean(losses[rows:], found.weights[:, 1:].flatten())
        value_loss = (value_loss + (config.horizon - 1) * later_loss) / config.horizon
    metrics = {
        "loss/value": value_loss.detach(),
        "loss/policy": policy_loss.detach(),
        "policy/entropy": weighted_mean(entropy, policy_weights).detach(),
        "policy/return": weighted_mean(found.first_target, found.mask),
    }
    if found.bonus is not None:
        metrics["policy/bonus"] = weighted_mean(found.bonus, found.weights).detach()
    return ImaginationLosses(value_loss, policy_loss, metrics)


def replayed_value_loss(world_model: WorldModel, batch: Batch, observed: Observed, config: ObjectiveConfig) -> Tensor:
    """Loss of λ-returns of the rewards that were got, (), which no error of the model can raise.

    A policy may put off for ever what imagination promises (Hafner et al. 2023, arXiv 2301.04104, critic learning). A
    return goes on as far as its episode in its row, then with the target network's value.
    """
    evaluation, features = world_model.evaluation, observed.features
    followed = batch.known_rewards[:, :-1] & batch.valid[:, 1:] & ~batch.is_first[:, 1:]
    with torch.no_grad():
        values = evaluation.value(features, target=True)
        rewards = batch.rewards[:, :-1].to(values.dtype) / world_model.reward_scale.scale
        if world_model.exploration is not None:
            actions = world_model.action_spec.encode(batch.actions)[:, :-1]
            rewards = rewards + world_model.exploration.bonus(features[:, :-1], actions)
        discounts = evaluation.config.discount * (followed & ~batch.terminated[:, :-1]).to(values.dtype)
        goes_on = F.pad(followed[:, 1:], (0, 1)).to(values.dtype)
        rewards = torch.where(followed, rewards, 0)
        returns = lambda_returns(rewards, discounts, values[:, 1:], evaluation.config.lambda_ * goes_on)
    share = config.value_gradient
    given = share * features + (1 - share) * features.detach()
    losses = evaluation.head.loss(evaluation(given[:, :-1]), returns)
    return weighted_mean(losses, followed & batch.losses_at[:, :-1])


@torch.no_grad()
def _try_all(world_model: WorldModel, start: State, horizon: int) -> tuple[Imagined, Tensor, Tensor, Tensor | None]:
    """For every first action: rollouts, returns (rows * actions, horizon), Q (rows, actions), and their bonus."""
    actions = world_model.decision.all_actions(start["features"])
    rows, count = start["features"].shape[0], actions.shape[0]
    tried = {name: value.repeat_interleave(count, 0) for name, value in start.items()}
    imagined = world_model.imagine(tried, world_model.decision, horizon, actions.repeat(rows, 1))
    returns, bonus = _returns(world_model, imagined)
    return imagined, returns, returns[:, 0].view(rows, count), bonus


def _returns(world_model: WorldModel, imagined: Imagined) -> tuple[Tensor, Tensor | None]:
    """With target-network values, and the bonus of exploration that is in them, both (rows, horizon)."""
    config, evaluation, features = world_model.config.evaluation, world_model.evaluation, imagined.features[:, 1:]
    rewards, bonus = imagined.rewards, None
    if world_model.exploration is not None:
        bonus = world_model.exploration.bonus(imagined.features[:, :-1], imagined.actions)
        rewards = rewards + bonus
    differentiable = world_model.decision.gradient == "pathwise"
    next_values = (
        evaluation.value(features, target=True) if differentiable else evaluation.target_value_in_one_call(features)
    )
    return lambda_returns(rewards, config.discount * imagined.continues, next_values, config.lambda_), bonus


def _weights(imagined: Imagined, mask: Tensor) -> Tensor:
    lasting = imagined.continues.detach()[:, :-1].cumprod(1)
    return torch.cat([torch.ones_like(lasting[:, :1]), lasting], 1) * mask[:, None]
