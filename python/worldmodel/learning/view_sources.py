"""Batches of views for a ``TokenWorldModel``: from batched worlds, a gymnasium environment or recorded files."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from worldmodel.data.datasets import EpisodeFile, RecordedSource
from worldmodel.model.views import HEADINGS, turned


@dataclasses.dataclass
class ViewBatch:
    """Steps of episodes; ``time`` steps have ``time + 1`` views.

    Attributes:
        views: (batch, time + 1, ...) of the codec.
        actions: int64 (batch, time).
        displacement: (batch, time, 2), of each step in the agent's own frame; None if unknown.
        turn: int64 (batch, time), quarter turns clockwise; None if views do not turn.
        ahead: (batch, time, 2), where the predicted view is, if that is not where the next step stands, as for the next
            agent's; None if it is.
        target: (batch, time, ...) of the codec, the views predicted, if not the next ones of ``views``: of several
            agents, each step's own next view.
        elapsed: (batch, time), from each view to the next in steps; None: 1.
        is_first: bool (batch, time + 1), first views of episodes; None: the first column alone, or none.
        gap: int64 (batch, time, places), of the next view: 0 in the view before, -1 never seen, else steps since last
            seen; None if unknown.
        rewards: (batch, time), or None.
        terminated: bool (batch, time), or None.
    """

    views: Tensor
    actions: Tensor
    displacement: Tensor | None = None
    turn: Tensor | None = None
    ahead: Tensor | None = None
    target: Tensor | None = None
    elapsed: Tensor | None = None
    is_first: Tensor | None = None
    gap: Tensor | None = None
    rewards: Tensor | None = None
    terminated: Tensor | None = None

    def motion(self, padded: bool = False) -> dict[str, Tensor | None]:
        """Arguments of ``TokenWorldModel.forward``; ``padded`` to as many steps as there are views."""
        named = {name: getattr(self, name) for name in ("displacement", "turn", "ahead", "elapsed")}
        return {name: pad_step(x) if padded and x is not None else x for name, x in named.items()}


def pad_step(x: Tensor) -> Tensor:
    """``x`` (batch, time, ...) with a step more, a repetition of the last."""
    return torch.cat([x, x[:, -1:]], 1)


class ViewSource(Protocol):
    """A source of batches, whose state is that of its random generator."""

    def sample(self, batch_size: int, steps: int) -> ViewBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...


class WorldSource:
    """New worlds for each batch.

    Args:
        make: ``environments.grids.Worlds`` for a batch size, a configuration and a generator.
        config: of the worlds.
        generator: of all of them.
    """

    def __init__(self, make: Any, config: Any, generator: torch.Generator) -> None:
        self.make, self.config, self.generator = make, config, generator

    def sample(self, batch_size: int, steps: int) -> ViewBatch:
        worlds = self.make(batch_size, self.config, self.generator)
        positions = worlds.positions
        rollout = worlds.rollout(max(1, steps // worlds.agents))
        rewards = worlds.rewards(rollout).float()
        batch = batch_of(rollout, positions)
        batch.rewards = rewards if worlds.agents == 1 else woven(rewards)
        batch.terminated = torch.zeros(batch.actions.shape, dtype=torch.bool)  # these worlds have no end
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        self.generator.set_state(saved["generator"])


class EpisodeSource:
    """Parts of recorded episodes, of a file's one observation.

    Args:
        file: of episodes.
        batch_size, steps: of all batches.
        seed: of their order.
    """

    def __init__(self, file: EpisodeFile, batch_size: int, steps: int, seed: int) -> None:
        self.recorded = RecordedSource(file, batch_size, steps + 1, seed)
        (self.name,) = file.observation_spec.modalities

    def sample(self, batch_size: int, steps: int) -> ViewBatch:
        rows = {name: torch.from_numpy(array) for name, array in self.recorded.rows().items()}
        views = rows[f"observations/{self.name}"]
        moved, turn, elapsed = rows.get("displacement"), None, rows.get("elapsed")
        if (heading := rows.get("heading")) is not None:
            turn = heading.diff(dim=1) % HEADINGS
            moved = None if moved is None else turned(moved, -heading)
        return ViewBatch(
            views.squeeze(-1) if views.shape[-1] == 1 else views,
            rows["actions"][:, :-1],
            None if moved is None else moved[:, :-1],
            turn,
            elapsed=None if elapsed is None else elapsed[:, 1:],
            is_first=rows["is_first"],
            rewards=rows["rewards"][:, :-1],
            terminated=rows["terminated"][:, :-1],
        )

    def state_dict(self) -> dict[str, Any]:
        return self.recorded.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.recorded.load_state_dict(saved)


def batch_of(rollout: Mapping[str, Tensor], positions: Tensor | None = None) -> ViewBatch:
    """A rollout of ``Worlds`` as a batch.

    Several agents take turns: (batch, agents, time, ...) becomes (batch, time * agents, ...), one sequence in which
    each view is the next agent's, and each step predicts its own agent's next view. That needs their ``positions``
    before the rollout, (batch, agents, 2).

    Raises:
        ValueError: several agents without positions, or with headings of their own.
    """
    views, after = ("pixels", "next_pixels") if "pixels" in rollout else ("tokens", "next_tokens")
    actions, moved, gap = rollout["actions"], rollout["displacement"], rollout["gap"]
    heading, following = rollout.get("heading"), rollout.get("next_heading")
    if actions.dim() == 3:
        if positions is None or (following is not None and bool(following.any())):
            raise ValueError("batch_of: several agents need positions, and views that do not turn")
        stands = positions[:, :, None] + torch.cat([torch.zeros_like(moved[:, :, :1]), moved.cumsum(2)], 2)
        path = woven(stands)[:, : woven(moved).shape[1] + 1]  # to the first agent's next view
        seen = torch.cat([woven(rollout[views]), rollout[after][:, 0, -1:]], 1)
        own = woven(rollout[after])
        return ViewBatch(seen, woven(actions), path.diff(dim=1), ahead=woven(moved), target=own, gap=woven(gap))
    seen = torch.cat([rollout[views], rollout[after][:, -1:]], 1)
    turn = None
    if heading is not None and following is not None:
        moved = turned(moved, -heading)
        turn = (following - heading) % HEADINGS if bool((following != 0).any()) else None
    return ViewBatch(seen, actions, moved, turn, elapsed=rollout.get("elapsed"), gap=gap)


def woven(x: Tensor) -> Tensor:
    """(batch, agents, time, ...) as (batch, time * agents, ...)."""
    return x.transpose(1, 2).flatten(1, 2)
