"""Open loop: some steps are observed, and from there on the world model goes by the actions alone.

The actions are those that were really done, so what is imagined can be laid beside what was seen, step by step. The
latents are the likeliest ones unless a draw is asked for: nothing is random then, and no random generator moves.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodel.data.batch import Batch
from worldmodel.data.spaces import ActionSpec, Modality, ObservationSpec
from worldmodel.model.networks import symlog
from worldmodel.model.world_model import Sampler, WorldModel

# What ``error`` measures, by kind of modality.
UNITS = {
    "image": "root mean square of pixels, 0 to 1",
    "grid": "share of cells that are wrong",
    "categorical": "share of entries that are wrong",
    "vector": "root mean square through symlog",
}


@dataclasses.dataclass
class OpenLoop:
    """What was seen in some rows of steps, and what the world model says of it.

    Step t holds an observation, and the action, reward and end that followed it, as in a ``Batch``. The prediction of
    what followed step t rests on the observations up to t, or on the first ``context`` ones if those are fewer.

    Attributes:
        context: observations that were given, in every row.
        valid: bool (rows, steps), whether there is an observation of the episode that the row begins with.
        seen: modality name -> (rows, steps, ...).
        reconstructed: modality name -> (rows, steps, ...), each from the observation of its own step.
        imagined: modality name -> (rows, steps - context, ...), of the steps from ``context`` on.
        rewards: (rows, steps - 1), what was got.
        predicted_rewards: (rows, steps - 1), in the environment's units.
        ends: (rows, steps - 1), whether the episode ended for good.
        predicted_ends: (rows, steps - 1), the probability of that.
    """

    context: int
    valid: Tensor
    seen: dict[str, Tensor]
    reconstructed: dict[str, Tensor]
    imagined: dict[str, Tensor]
    rewards: Tensor
    predicted_rewards: Tensor
    ends: Tensor
    predicted_ends: Tensor

    def errors(self, modalities: Mapping[str, Modality]) -> dict[str, Tensor]:
        """The error of what was imagined, by modality: (rows, steps - context), in the units that ``UNITS`` names."""
        return {
            name: error(modality, self.imagined[name], self.seen[name][:, self.context :])
            for name, modality in modalities.items()
        }


@torch.no_grad()
def open_loop(world_model: WorldModel, batch: Batch, context: int, sample: Sampler | None = None) -> OpenLoop:
    """Observes the first ``context`` steps of every row, and imagines the others.

    Args:
        world_model: who observes and imagines.
        batch: rows that begin with an episode, or inside one with a state. Only that episode counts.
        context: how many observations are given, from 1 to time - 1.
        sample: distribution -> latent; ``Latent.mode`` if None.

    Raises:
        ValueError: a context that leaves nothing to see or nothing to imagine.
    """
    time = batch.shape[1]
    if not 1 <= context < time:
        raise ValueError(f"open_loop: context is {context}, expected at least 1 and below time={time}")
    sample = sample or world_model.perception.latent.mode
    observed = world_model.observe(batch, cuts=[context], sample=sample)
    actions = world_model.action_spec.encode(batch.actions)[:, context - 1 : time - 1]
    imagined = world_model.imagine_actions(observed.cut_states, actions, sample)
    predicted = world_model.predict(observed, batch)
    known = slice(0, context - 1)
    rewards = world_model.prediction.mean_reward(predicted)[:, known], imagined.rewards
    continues = predicted.continues[:, known].sigmoid(), imagined.continues
    later = torch.zeros_like(batch.is_first)
    later[:, 1:] = batch.is_first[:, 1:]  # another episode begins
    return OpenLoop(
        context,
        batch.valid & (later.cumsum(1) == 0),
        dict(batch.observations),
        world_model.perception.reconstruct(observed.latent),
        world_model.perception.reconstruct(imagined.latent),
        batch.rewards[:, :-1],
        torch.cat(rewards, 1) * world_model.reward_scale.scale,
        batch.terminated[:, :-1],
        1 - torch.cat(continues, 1),
    )


def error(modality: Modality, predicted: Tensor, seen: Tensor) -> Tensor:
    """How far a prediction is off, (...) for modalities (..., *modality.shape), in the units that ``UNITS`` names."""
    inner = tuple(range(-len(modality.shape), 0))
    if modality.kind == "grid":
        return (predicted.long() != seen.long()).any(-1).double().mean((-2, -1))
    if modality.kind == "categorical":
        return (predicted.long() != seen.long()).double().mean(inner)
    scaled = (x.double() / 255 if modality.kind == "image" else symlog(x.double()) for x in (predicted, seen))
    difference = next(scaled) - next(scaled)
    return difference.square().mean(inner).sqrt()


def episode_batch(
    observation_spec: ObservationSpec,
    action_spec: ActionSpec,
    observations: Sequence[Mapping[str, np.ndarray]],
    actions: Sequence[np.ndarray],
    rewards: Sequence[float],
    terminated: bool,
) -> Batch:
    """One row that holds one episode from its beginning.

    Args:
        observation_spec: of the observations.
        action_spec: of the actions.
        observations: n + 1, encoded.
        actions: n, encoded.
        rewards: n.
        terminated: whether the last action ended the episode for good.
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
    )
