"""Losses of latents that are learned by predicting them, ``EmbeddingConfig``.

dynamics      z'_{t+1} from observed steps (teacher-forced)
rollout       z'_{t+1}, ..., z'_{t+k} from step t, each prediction from the one before, at the imagination's starts
sigreg        normality of random projections
variance      deviations below 1
covariance    of two entries
inverse       a_t from z_t and z_{t+1}

The first two are mean squared errors per entry. Their targets are the latents of the encoder or of the slow one, with
the gradient into the encoder scaled by ``target_gradient``.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.data.batch import Batch
from worldmodel.learning.masked import weighted_mean
from worldmodel.model.latents import EmbeddingConfig
from worldmodel.model.prediction import Predicted
from worldmodel.model.world_model import Observed, WorldModel

_DIRECTIONS = 64  # of SIGReg
_KNOTS, _WIDEST = 17, 3.0  # of its integral over the characteristic function's argument
_COLLAPSED_DEVIATION = 0.1
_COLLAPSED_RANK = 1.5
_CONSTANT = 3e-4  # squared change per step, of the squared deviation


def embedding_parts(
    world_model: WorldModel, batch: Batch, observed: Observed, predicted: Predicted, followed: Tensor
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    """Losses by name, their weights, and metrics.

    Args:
        world_model: whose latent is an embedding.
        batch: (batch, time) steps.
        observed: of ``batch``, with ``states_after``.
        predicted: from ``observed``.
        followed: bool (batch, time - 1), whether a step's next one has a target.
    """
    config = world_model.config.perception.latent
    assert isinstance(config, EmbeddingConfig)
    z, masked = observed.latent, batch.losses_at
    targets = _targets(world_model, batch, z, config)
    seen = z[masked]  # (steps, size)
    ahead, reached = _rolled_out(world_model, batch, observed, config.rollout)
    errors = (predicted.prior[:, :-1] - targets[:, 1:]).square().mean(-1)
    parts = {
        "dynamics": weighted_mean(errors, followed),
        "rollout": weighted_mean((ahead - _ahead(targets, observed.steps, config.rollout)).square().mean(-1), reached),
    }
    weights = {"dynamics": 1.0, "rollout": config.rollout_weight}
    if config.sigreg:
        parts["sigreg"], weights["sigreg"] = sigreg(seen), config.sigreg
    if config.variance or config.covariance:
        parts["variance"], parts["covariance"] = vicreg(seen)
        weights |= {"variance": config.variance, "covariance": config.covariance}
    if world_model.inverse is not None:
        actions = world_model.action_spec.encode(batch.actions[:, :-1]).to(z.dtype)
        parts["inverse"] = weighted_mean(world_model.inverse.loss(z[:, :-1], z[:, 1:], actions), followed)
        weights["inverse"] = config.inverse
    if config.reconstruction:
        lost = world_model.perception.reconstruction_loss(z, batch.observations)
        parts["reconstruction"], weights["reconstruction"] = weighted_mean(lost, masked), config.reconstruction
    with torch.no_grad():
        still = (z[:, :-1] - targets[:, 1:]).square().mean(-1)
        metrics = {"latent/persistence": weighted_mean(still, followed), **spread(seen)}
    return parts, weights, metrics


def _targets(world_model: WorldModel, batch: Batch, z: Tensor, config: EmbeddingConfig) -> Tensor:
    value = z
    if world_model.slow_perception is not None:
        with torch.no_grad():
            value = world_model.slow_perception(batch.observations)
    return value.detach() + config.target_gradient * (z - z.detach())


def _rolled_out(world_model: WorldModel, batch: Batch, observed: Observed, horizon: int) -> tuple[Tensor, Tensor]:
    """From each of ``observed.steps``: latents (starts, horizon, size), and whether there is such a step to compare."""
    actions = _ahead(world_model.action_spec.encode(batch.actions), observed.steps, horizon, -1)
    latents = world_model.imagine_latents(observed.states_after, actions.to(observed.latent.dtype))
    goes_on = batch.losses_at & ~batch.is_first
    goes_on[:, 1:] &= ~batch.is_last[:, :-1]
    starts = torch.cat([batch.losses_at[:, step - 1] for step in observed.steps])[:, None]
    return latents, starts & _ahead(goes_on, observed.steps, horizon, pad=True).cumprod(1).bool()


def _ahead(values: Tensor, steps: tuple[int, ...], horizon: int, shift: int = 0, pad: bool = False) -> Tensor:
    """``values`` (batch, time, ...) at the ``horizon`` steps after each number of steps, (starts, horizon, ...).

    Beyond the end there are those of the last step, or, with ``pad``, false.
    """
    time = values.shape[1]
    windows = []
    for step in steps:
        index = torch.arange(step + shift, step + shift + horizon, device=values.device)
        window = values[:, index.clamp(max=time - 1)]
        windows.append(window & (index < time) if pad else window)
    return torch.cat(windows)


def sigreg(z: Tensor) -> Tensor:
    """Distance of random projections of z, (steps, size), from a standard normal: a scalar.

    The mean over directions of ∫ |φ(t) - exp(-t²/2)|² exp(-t²/2) dt, from -3 to 3, where φ is the empirical
    characteristic function (Epps and Pulley 1983; SIGReg of LeJEPA, arXiv 2511.08544, which multiplies it by the number
    of steps).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> normal = torch.randn(4096, 8, generator=generator)
        >>> bool(sigreg(normal) < 0.01), bool(sigreg(0.1 * normal) > 0.2)
        (True, True)
    """
    directions = F.normalize(torch.randn(z.shape[-1], _DIRECTIONS, dtype=z.dtype, device=z.device), dim=0)
    knots = torch.linspace(0, _WIDEST, _KNOTS, dtype=z.dtype, device=z.device)
    normal = (-0.5 * knots.square()).exp()
    phase = (z @ directions)[..., None] * knots  # (steps, directions, knots)
    errors = (phase.cos().mean(0) - normal).square() + phase.sin().mean(0).square()
    return 2 * torch.trapezoid(errors * normal, knots).mean()


def vicreg(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of z, (steps, size): the mean of max(0, 1 - deviation), and the mean squared covariance of two entries.

    The latter is 0 for one entry. Bardes et al. 2021, arXiv 2105.04906, eq. 1 to 4.

    Example:
        >>> [round(float(part), 2) for part in vicreg(torch.tensor([[1.0, 0.5], [-1.0, -0.5]]).repeat(500, 1))]
        [0.25, 0.25]
    """
    centred = z - z.mean(0)
    deviations = (centred.square().mean(0) + 1e-4).sqrt()
    covariance = centred.T @ centred / len(z)
    size = z.shape[-1]
    others = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviations).mean(), others / max(1, size * (size - 1))


def spread(z: Tensor) -> dict[str, Tensor]:
    """How much of its space z, (steps, size), fills.

    "latent/deviation" is the mean over entries of their standard deviation, "latent/least_deviation" the least and
    "latent/most_deviation" the largest. "latent/rank" is the effective rank, exp of the entropy of the covariance's
    normalised eigenvalues (Roy and Vetterli 2007), of two entries at least: a small latent of many directions has a
    high one.
    """
    centred = (z - z.mean(0)).double()
    deviations = centred.square().mean(0).sqrt()
    found = {
        "latent/deviation": deviations.mean(),
        "latent/least_deviation": deviations.min(),
        "latent/most_deviation": deviations.max(),
    }
    if z.shape[-1] == 1:
        return found
    shares = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=1e-30)
    shares = shares / shares.sum()
    return {"latent/rank": (-(shares * shares.log()).sum()).exp(), **found}


def collapse_notice(metrics: Mapping[str, float]) -> str | None:
    """A collapse of the latents in words, if these metrics show one: to a point, a line, or what an episode has."""
    deviation, rank = metrics.get("latent/deviation", math.inf), metrics.get("latent/rank", math.inf)
    if deviation >= _COLLAPSED_DEVIATION and rank >= _COLLAPSED_RANK:
        change = metrics.get("latent/persistence", math.inf)
        if change >= _CONSTANT * deviation**2:
            return None
        return (
            f"the latents have collapsed to what is constant in an episode: from one step to the next they change by "
            f"{math.sqrt(change):.2g}, and deviate by {deviation:.2g} over all. What moves is not in them, so plans in "
            "them mean nothing. Raise latent.inverse"
        )
    filled = "" if math.isinf(rank) else f", and fill {rank:.1f} directions"
    return (
        f"the latents have collapsed: their entries deviate by {deviation:.2g}, expected about 1{filled}. "
        "What differs looks the same to the model, so plans in it mean nothing. Raise latent.sigreg, or "
        "latent.variance and latent.covariance, or lower latent.target_gradient with latent.tau above 0"
    )
