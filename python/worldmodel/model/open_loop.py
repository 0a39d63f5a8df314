"""Open-loop prediction: observes some steps and imagines the rest from recorded actions."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodel.data.batch import Batch
from worldmodel.data.spaces import ActionSpec, Modality, ObservationSpec
from worldmodel.model.networks import symlog
from worldmodel.model.world_model import Sampler, WorldModel

# Units of ``error``.
UNITS = {
    "image": "root mean square of pixels, 0 to 1",
    "grid": "share of cells that are wrong",
    "categorical": "share of entries that are wrong",
    "vector": "root mean square through symlog",
    "map": "root mean square through symlog",
}


@dataclasses.dataclass
class OpenLoop:
    """Observed, reconstructed and imagined steps.

    Rewards and ends of step t are predicted from observations up to min(t, context - 1).

    Attributes:
        context: observed steps.
        valid: bool (rows, steps), true in the row's first episode.
        observed: encoded, by modality, (rows, steps, ...).
        reconstructed: by modality, (rows, steps, ...).
        imagined: by modality, (rows, steps - context, ...).
        rewards: (rows, steps - 1).
        predicted_rewards: (rows, steps - 1), in the environment's units.
        reward_mask: where rewards are known, bool (rows, steps - 1).
        ends: termination, (rows, steps - 1).
        predicted_ends: its probability, (rows, steps - 1).
    """

    context: int
    valid: Tensor
    observed: dict[str, Tensor]
    reconstructed: dict[str, Tensor]
    imagined: dict[str, Tensor]
    rewards: Tensor
    reward_mask: Tensor
    predicted_rewards: Tensor
    ends: Tensor
    predicted_ends: Tensor

    def errors(self, modalities: Mapping[str, Modality]) -> dict[str, Tensor]:
        """Imagination errors, (rows, steps - context), in ``UNITS``."""
        return {
            name: error(modality, self.imagined[name], self.observed[name][:, self.context :])
            for name, modality in modalities.items()
        }


@torch.no_grad()
def open_loop(world_model: WorldModel, batch: Batch, context: int, sample: Sampler | None = None) -> OpenLoop:
    """Observes ``context`` steps of every row and imagines the others.

    Args:
        world_model: trained.
        batch: rows that begin with an episode or hold a state.
        context: from 1 to time - 1, else ValueError.
        sample: distribution -> latent; ``Latent.mode`` if None.
    """
    time = batch.shape[1]
    if not 1 <= context < time:
        raise ValueError(f"open_loop: context is {context}, expected at least 1 and below time={time}")
    sample = sample or world_model.perception.latent.mode
    observed = world_model.observe(batch, states_after=[context], sample=sample)
    actions = world_model.action_spec.encode(batch.actions)[:, context - 1 : time - 1]
    imagined = world_model.imagine_actions(observed.states_after, actions, sample)
    predicted = world_model.predict(observed, batch)
    known = slice(0, context - 1)
    rewards = world_model.prediction.mean_reward(predicted)[:, known], imagined.rewards
    continues = predicted.continues[:, known].sigmoid(), imagined.continues
    later = torch.zeros_like(batch.is_first)
    later[:, 1:] = batch.is_first[:, 1:]
    return OpenLoop(
        context,
        batch.valid & (later.cumsum(1) == 0),
        dict(batch.observations),
        world_model.perception.reconstruct(observed.latent),
        world_model.perception.reconstruct(imagined.latent),
        batch.rewards[:, :-1],
        batch.reward_mask[:, :-1],
        torch.cat(rewards, 1) * world_model.reward_scale.scale,
        batch.terminated[:, :-1],
        1 - torch.cat(continues, 1),
    )


def error(modality: Modality, predicted: Tensor, observed: Tensor) -> Tensor:
    """Encoded (..., *modality.shape) -> error in ``UNITS``, (...)."""
    inner = tuple(range(-len(modality.shape), 0))
    if modality.kind == "grid":
        return (predicted.long() != observed.long()).any(-1).double().mean((-2, -1))
    if modality.kind == "categorical":
        return (predicted.long() != observed.long()).double().mean(inner)
    scaled = (x.double() / 255 if modality.kind == "image" else symlog(x.double()) for x in (predicted, observed))
    difference = next(scaled) - next(scaled)
    return difference.square().mean(inner).sqrt()


def episode_batch(
    observation_spec: ObservationSpec,
    action_spec: ActionSpec,
    observations: Sequence[Mapping[str, np.ndarray]],
    actions: Sequence[np.ndarray],
    rewards: Sequence[float],
    terminated: bool,
    elapsed: Sequence[float] | None = None,
) -> Batch:
    """Packs an encoded episode of n + 1 ``observations``, n ``actions`` and n ``rewards`` into one row.

    ``elapsed`` has n + 1 times, as in ``Batch``.
    """
    n = len(actions)
    steps = torch.arange(n + 1)
    joined = {
        name: np.stack([observation[name] for observation in observations]) for name in observation_spec.modalities
    }
    padded = np.concatenate([np.stack(actions), action_spec.zeros(1)])
    return Batch(
        observations={name: modality[None] for name, modality in observation_spec.to_tensors(joined).items()},
        actions=torch.from_numpy(padded)[None],
        rewards=torch.tensor([*rewards, 0.0])[None],
        terminated=((steps == n - 1) & terminated)[None],
        is_last=(steps == n)[None],
        is_first=(steps == 0)[None],
        valid=torch.ones(1, n + 1, dtype=torch.bool),
        elapsed=None if elapsed is None else torch.tensor([elapsed]),  # type: ignore[arg-type]
    )
