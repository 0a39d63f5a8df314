"""The steps of episodes that the world model learns from, on (batch, time).

Step t of a row is one observation and the transition after it:

    o_t     ``observations`` at t
    a_t     ``actions`` at t, chosen after o_t
    r_t     ``rewards`` at t, the reward of a_t
    end_t   ``terminated`` at t, whether a_t terminated the episode

and o_{t+1} is the next step of the row. An episode of n actions takes n + 1 steps; the last one holds an observation
alone and has ``is_last``. A row may hold any number of episodes, each with ``is_first`` at its first step, and end in
padding, where ``valid`` is false.

DreamerV3 (Hafner et al. 2023) stores the reward and the end with the observation that they arrive with. Its
``is_terminal`` at t + 1 is ``terminated`` at t here; ``is_last`` and ``is_first`` are at the same steps. A truncated
episode has ``is_last`` without ``terminated`` at the step before: its last observation is where returns bootstrap.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclasses.dataclass
class Batch:
    """Steps of episodes; the head of this file says what a step holds.

    The three fields with a default are made by ``__post_init__``: no step is masked, and all steps are one apart.

    Attributes:
        observations: key -> (batch, time, ...), with the keys, shapes and dtypes of ``ObservationSpec.modalities``.
        actions: (batch, time, ...) as ``ActionSpec.shape`` and ``dtype`` say; arbitrary where ``is_last``.
        rewards: float32 (batch, time), in the environment's units; arbitrary where ``is_last`` or not ``reward_mask``.
        terminated: bool (batch, time).
        is_last: bool (batch, time), true where no action follows in the row: at the last observation of an episode,
            terminated or truncated; at the last observation of a chunk whose episode goes on in another; on padding.
        is_first: bool (batch, time), true at the first observation of an episode.
        valid: bool (batch, time), false on padding.
        state: the state before the first step, as ``WorldModel.init_state`` names it, for rows that begin inside an
            episode; rows that begin with an episode ignore theirs. None if all rows do.
        loss_mask: bool (batch, time), false at steps without a loss, such as those that warm up a stored state.
        reward_mask: bool (batch, time), false where the reward is unknown: no loss and no statistic reads it, and no
            imagination starts there.
        elapsed: float32 (batch, time), time since the observation before, in steps. It is stored and batched; no part
            of the world model reads it yet.
    """

    observations: dict[str, Tensor]
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    is_last: Tensor
    is_first: Tensor
    valid: Tensor
    state: State | None = None
    loss_mask: Tensor = dataclasses.field(default=None)  # type: ignore[assignment]
    reward_mask: Tensor = dataclasses.field(default=None)  # type: ignore[assignment]
    elapsed: Tensor = dataclasses.field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raises ValueError where the tensors do not share (batch, time), TypeError for a wrong dtype."""
        shape = self.is_first.shape
        if self.is_first.dim() != 2:
            raise ValueError(f"Batch: is_first has shape {tuple(shape)}, expected (batch, time)")
        for name in ("loss_mask", "reward_mask"):
            if getattr(self, name) is None:
                setattr(self, name, torch.ones_like(self.is_first, dtype=torch.bool))
        if self.elapsed is None:
            self.elapsed = torch.ones_like(self.is_first, dtype=torch.float32)
        named = {f"observations[{name!r}]": value for name, value in self.observations.items()}
        named |= {name: getattr(self, name) for name in _TIMED if name != "is_first"}
        for name, value in named.items():
            if value.shape[:2] != shape:
                expected = f"(batch={shape[0]}, time={shape[1]}, ...) to match is_first"
                raise ValueError(f"Batch: {name} has shape {tuple(value.shape)}, expected {expected}")
        for name in _BOOL:
            if getattr(self, name).dtype != torch.bool:
                raise TypeError(f"Batch: {name} has dtype {getattr(self, name).dtype}, expected torch.bool")

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, time)."""
        return self.is_first.shape[0], self.is_first.shape[1]

    @property
    def losses_at(self) -> Tensor:
        """bool (batch, time): steps that are no padding and carry a loss."""
        return self.valid & self.loss_mask

    @property
    def known_rewards(self) -> Tensor:
        """bool (batch, time): steps whose action has a reward that is known."""
        return self.valid & ~self.is_last & self.reward_mask

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with ``function`` applied to every tensor that has (batch, time)."""
        fields: dict[str, Any] = {name: function(getattr(self, name)) for name in _TIMED}
        observations = {name: function(value) for name, value in self.observations.items()}
        return dataclasses.replace(self, observations=observations, **fields)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        moved = self.map(lambda x: x.to(device, non_blocking=True))
        if self.state is not None:
            moved.state = {name: value.to(device) for name, value in self.state.items()}
        return moved

    def steps(self, start: int, stop: int) -> "Batch":
        """Steps ``start`` to ``stop`` of every row. The state is kept only if ``start`` is 0."""
        part = self.map(lambda x: x[:, start:stop])
        part.state = self.state if start == 0 else None
        return part


_BOOL = ("terminated", "is_last", "is_first", "valid", "loss_mask", "reward_mask")
_TIMED = ("actions", "rewards", "elapsed", *_BOOL)
