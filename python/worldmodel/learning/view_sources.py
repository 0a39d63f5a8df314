"""Batches of views for a ``TokenWorldModel``: from batched worlds, a gymnasium environment or recorded files."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

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
        elapsed: (batch, time), from each view to the next in steps; None: 1.
        is_first: bool (batch, time + 1), first views of episodes; None: the first column alone, or none.
        gap: int64 (batch, time, places), of the next view: 0 in the view before, -1 never seen, else steps since last
            seen; None if unknown.
        truth: what a score takes as well: ``tokens`` (the next view's classes), ``inside``, ``edited``, ``fresh``, as
            ``Worlds.rollout``.
        rewards: (batch, time), or None.
        terminated: bool (batch, time), or None.
    """

    views: Tensor
    actions: Tensor
    displacement: Tensor | None = None
    turn: Tensor | None = None
    ahead: Tensor | None = None
    elapsed: Tensor | None = None
    is_first: Tensor | None = None
    gap: Tensor | None = None
    truth: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
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

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None: ...


class WorldStream:
    """``batch_size`` worlds that go on from call to call.

    With several agents per world their steps alternate: one sequence, in which each agent's view follows the last
    one's.
    """

    def __init__(self, worlds: Any) -> None:
        self.worlds = worlds

    def next(self, steps: int, actions: Tensor | None = None) -> ViewBatch:
        """The next ``steps`` steps."""
        positions = self.worlds.positions
        return batch_of(self.worlds.rollout(steps, actions), positions)


class WorldSource:
    """New worlds for each batch.

    Args:
        make: ``Worlds`` for a batch size, a configuration and a generator.
        config: of the worlds.
        generator: of all of them.
    """

    def __init__(self, make: Any, config: Any, generator: torch.Generator) -> None:
        self.make, self.config, self.generator = make, config, generator

    def stream(self, batch_size: int) -> WorldStream:
        return WorldStream(self.make(batch_size, self.config, self.generator))

    def sample(self, batch_size: int, steps: int) -> ViewBatch:
        agents = getattr(self.config, "agents", 1)
        return self.stream(batch_size).next(max(1, steps // agents))

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        self.generator.set_state(saved["generator"])


def batch_of(rollout: Mapping[str, Tensor], positions: Tensor | None = None) -> ViewBatch:
    """A rollout of ``Worlds`` as a batch; ``positions`` (batch, agents, 2) before it, for several agents."""
    views, after = ("pixels", "next_pixels") if "pixels" in rollout else ("tokens", "next_tokens")
    truth = {"tokens": rollout["next_tokens"], **{name: rollout[name] for name in ("inside", "edited", "fresh")}}
    displacement, elapsed = rollout["displacement"], rollout.get("elapsed")
    heading = rollout.get("heading")
    if rollout["actions"].dim() == 3:
        return _alternating(rollout, positions, views, truth)
    turn = None
    if heading is not None and "next_heading" in rollout and bool((rollout["next_heading"] != heading).any()):
        turn = (rollout["next_heading"] - heading) % HEADINGS
    if heading is not None:
        displacement = turned(displacement, -heading)
    joined = torch.cat([rollout[views], rollout[after][:, -1:]], 1)
    return ViewBatch(joined, rollout["actions"], displacement, turn, elapsed=elapsed, gap=rollout["gap"], truth=truth)


def _alternating(
    rollout: Mapping[str, Tensor], positions: Tensor | None, views: str, truth: Mapping[str, Tensor]
) -> ViewBatch:
    """(batch, agents, time, ...) as (batch, time * agents, ...): agents take turns."""
    if positions is None or bool(rollout["heading"].any()):
        raise ValueError("batch_of: several agents need positions, and a heading that stays")

    def woven(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1, 2)

    moved = rollout["displacement"]
    stands = positions[:, :, None] + torch.cat([torch.zeros_like(moved[:, :, :1]), moved.cumsum(2)], 2)
    path = woven(stands)[:, : moved.shape[1] * moved.shape[2] + 1]  # up to the first agent's next step
    joined = torch.cat([woven(rollout[views]), rollout["next_" + views][:, :1, -1]], 1)
    return ViewBatch(
        joined,
        woven(rollout["actions"]),
        path[:, 1:] - path[:, :-1],
        ahead=woven(moved),
        gap=woven(rollout["gap"]),
        truth={name: woven(x) for name, x in truth.items()},
    )
