"""What the five functions are trained for: the loss of a batch, and the losses of imagination.

perception    reconstruction, and the divergence of what is seen from what was predicted, a little
prediction    that divergence the other way round, reward, continuation; memory learns from these
evaluation    λ-returns of imagination
decision      one of the ways that ``worldmodel.model.decision`` names, from the same returns
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.data.batch import Batch, State
from worldmodel.learning.running_stats import ReturnRange
from worldmodel.model.evaluation import lambda_returns
from worldmodel.model.policies import DiscretePolicy
from worldmodel.model.world_model import Imagined, Observed, WorldModel


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses, and how far is imagined.

    Attributes:
        dynamics: weight of the divergence that trains the prediction.
        representation: weight of the divergence that trains perception.
        free_nats: divergence at which perception pays nothing; without it, what is random is not kept.
        reward: weight of the reward's loss.
        continuation: weight of the loss of whether the episode goes on.
        horizon: steps that are imagined.
        starts: steps of each row from which imagination starts.
        value_gradient: share of the gradient of the values that reaches memory.
        return_floor: smallest range that returns are divided by, in units of the running scale of rewards.
    """

    dynamics: float = 1.0
    representation: float = 0.1
    free_nats: float = 1.0
    reward: float = 1.0
    continuation: float = 1.0
    horizon: int = 4
    starts: int = 8
    value_gradient: float = 0.1
    return_floor: float = 1.0

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.starts < 1:
            raise ValueError(
                f"ObjectiveConfig: horizon is {self.horizon} and starts {self.starts}, expected at least 1 of each"
            )


@dataclasses.dataclass
class ImaginationLosses:
    """Losses of evaluation and decision, with figures to report."""

    value: Tensor
    policy: Tensor
    metrics: dict[str, Tensor]


def model_loss(
    world_model: WorldModel, batch: Batch, observed: Observed, reward_scale: float, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of perception, memory and prediction on what was seen, and its parts by name."""
    masked = batch.losses_at
    acted = masked & ~batch.is_last
    rewarded = masked & batch.known_rewards
    followed = acted[:, :-1] & batch.valid[:, 1:] & ~batch.is_first[:, 1:]

    perception, prediction = world_model.perception, world_model.prediction
    latent = perception.latent
    predicted = world_model.predict(observed, batch)
    prior, posterior = predicted.prior[:, :-1], observed.posterior[:, 1:]
    rewards = torch.where(rewarded, batch.rewards / reward_scale, 0).to(prior.dtype)
    prediction.reward.extend_support(rewards[rewarded])
    goes_on = (~batch.terminated).to(prior.dtype)

    reconstruction = perception.reconstruction_loss(observed.latent, batch.observations)
    dynamics = latent.kl(posterior.detach(), prior)
    representation = latent.kl(posterior, prior.detach()).clamp(min=config.free_nats)
    continuation = F.binary_cross_entropy_with_logits(predicted.continues, goes_on, reduction="none")
    parts = {
        "reconstruction": weighted_mean(reconstruction, masked),
        "dynamics": weighted_mean(dynamics, followed),
        "representation": weighted_mean(representation, followed),
        "reward": weighted_mean(prediction.reward.loss(predicted.reward, rewards), rewarded),
        "continuation": weighted_mean(continuation, acted),
    }
    weights = {"reconstruction": 1.0, **{name: getattr(config, name) for name in parts if name != "reconstruction"}}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    metrics = {f"loss/{name}": part.detach() for name, part in (("model", total), *parts.items())}
    with torch.no_grad():
        entropy = latent.entropy(observed.posterior)
        metrics["latent/entropy"] = weighted_mean(entropy, masked)
    return total, metrics


def imagination_losses(
    world_model: WorldModel, states: State, usable: Tensor, returns_range: ReturnRange, config: ObjectiveConfig
) -> ImaginationLosses:
    """The losses of evaluation and decision.

    Args:
        world_model: imagines.
        states: of observed steps, (rows, ...), with gradients.
        usable: bool (rows,): the others carry no loss.
        returns_range: what returns are divided by; it takes this call's returns in.
        config: weights, horizon.
    """
    decision = world_model.decision
    start = {name: value.detach() for name, value in states.items()}
    if decision.gradient == "all_action":
        imagined, returns, q = _try_all(world_model, start, config.horizon)
        spread = returns_range.update(q[usable])
        policy = decision(start["features"])
        assert isinstance(policy, DiscretePolicy)
        probabilities = policy.probability_of(decision.all_actions(q))  # (rows, actions)
        expected = (probabilities.detach() * q).sum(-1, keepdim=True)  # (rows, 1)
        gain = (probabilities * (q - expected)).sum(-1) / spread
        entropy, weights = policy.entropy(), usable.to(q.dtype)
        first_target = expected.squeeze(-1)
        tries = q.shape[1]
    else:
        through = decision.gradient == "pathwise"
        with torch.set_grad_enabled(through):
            imagined = world_model.imagine(start, decision, config.horizon)
            returns = _returns(world_model, imagined)  # (rows, horizon)
        spread = returns_range.update(returns.detach()[usable])
        states_met = imagined.features[:, :-1].detach()
        policy = decision(states_met)
        entropy, weights = policy.entropy(), _weights(imagined, usable)
        if through:
            gain = returns / spread
        else:
            advantage = (returns - world_model.evaluation.value(states_met)).detach() / spread
            gain = policy.log_probability(imagined.actions) * advantage
        first_target = returns[:, 0].detach()
        tries = 1
    policy_loss = -weighted_mean(gain + decision.config.entropy * entropy, weights)

    share = config.value_gradient
    first = share * states["features"] + (1 - share) * start["features"]
    value_loss = _value_loss(world_model, first, first_target, usable.to(first.dtype))
    if config.horizon > 1:
        later = imagined.features[:, 1:-1].detach(), returns[:, 1:].detach()
        later_weights = _weights(imagined, usable.repeat_interleave(tries, 0))[:, 1:]
        value_loss = (value_loss + (config.horizon - 1) * _value_loss(world_model, *later, later_weights)) / (
            config.horizon
        )
    metrics = {
        "loss/value": value_loss.detach(),
        "loss/policy": policy_loss.detach(),
        "policy/entropy": weighted_mean(entropy, weights).detach(),
        "policy/return": weighted_mean(first_target, usable),
    }
    return ImaginationLosses(value_loss, policy_loss, metrics)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of ``values`` under ``weights``, bool or not; zero where there are none. NaN without weight is lost."""
    weights = weights.to(values.dtype)
    return torch.where(weights > 0, values * weights, 0).sum() / weights.sum().clamp(min=1e-8)


@torch.no_grad()
def _try_all(world_model: WorldModel, start: State, horizon: int) -> tuple[Imagined, Tensor, Tensor]:
    """Every action in every state, then the policy: rollouts, returns (rows * actions, horizon), Q (rows, actions)."""
    actions = world_model.decision.all_actions(start["features"])
    rows, count = start["features"].shape[0], actions.shape[0]
    tried = {name: value.repeat_interleave(count, 0) for name, value in start.items()}
    imagined = world_model.imagine(tried, world_model.decision, horizon, actions.repeat(rows, 1))
    returns = _returns(world_model, imagined)
    return imagined, returns, returns[:, 0].view(rows, count)


def _returns(world_model: WorldModel, imagined: Imagined) -> Tensor:
    """λ-returns (rows, horizon), their values from the target network."""
    config = world_model.config.evaluation
    next_values = world_model.evaluation.value(imagined.features[:, 1:], target=True)
    return lambda_returns(imagined.rewards, config.discount * imagined.continues, next_values, config.lambda_)


def _weights(imagined: Imagined, usable: Tensor) -> Tensor:
    """How likely it is that the episode lasts until each imagined step, (rows, horizon)."""
    lasting = imagined.continues.detach()[:, :-1].cumprod(1)
    return torch.cat([torch.ones_like(lasting[:, :1]), lasting], 1) * usable[:, None]


def _value_loss(world_model: WorldModel, features: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    evaluation = world_model.evaluation
    evaluation.head.extend_support(targets[weights > 0])
    return weighted_mean(evaluation.head.loss(evaluation(features), targets), weights)
