"""What the world model learns from: steps of episodes on (batch, time), and how they are named.

Step t of a row is one observation and what followed it:

    o_t     ``observations`` at t
    a_t     ``actions`` at t, chosen after o_t was seen
    r_t     ``rewards`` at t, what a_t brought
    end_t   ``terminated`` at t, whether a_t ended the episode for good

and o_{t+1} is the next step of the row. So an episode of n actions takes n + 1 steps, the last of which holds an
observation alone: ``has_action`` is false there. It is where a truncated episode bootstraps. A new episode begins at
the next step with ``reset``; a row may hold any number of episodes and end in padding, where ``valid`` is false.
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

    Attributes:
        observations: leaf name -> (batch, time, ...), named, shaped and typed as ``ObservationSpec.leaves`` says.
        actions: (batch, time, ...) as ``ActionSpec.shape`` and ``dtype`` say; anything without ``has_action``.
        rewards: float32 (batch, time).
        terminated: bool (batch, time).
        has_action: bool (batch, time), false where a step holds the last observation of an episode, and on padding.
        reset: bool (batch, time), true where an episode begins.
        valid: bool (batch, time), false on padding.
        state: the state in front of the first step, as ``WorldModel.init_state`` names it, for windows that begin
            inside an episode; None for rows that begin with an episode.
        burn_in: steps at the start of every row that only warm the state up: they carry no loss.
    """

    observations: dict[str, Tensor]
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    has_action: Tensor
    reset: Tensor
    valid: Tensor
    state: State | None = None
    burn_in: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where the tensors do not share (batch, time)."""
        shape = self.reset.shape
        if self.reset.dim() != 2:
            raise ValueError(f"Batch: reset has shape {tuple(shape)}, expected (batch, time)")
        named = {f"observations[{name!r}]": value for name, value in self.observations.items()}
        named |= {name: getattr(self, name) for name in ("actions", "rewards", "terminated", "has_action", "valid")}
        for name, value in named.items():
            if value.shape[:2] != shape:
                expected = f"(batch={shape[0]}, time={shape[1]}, ...) to match reset"
                raise ValueError(f"Batch: {name} has shape {tuple(value.shape)}, expected {expected}")
        for name in ("terminated", "has_action", "reset", "valid"):
            if getattr(self, name).dtype != torch.bool:
                raise TypeError(f"Batch: {name} has dtype {getattr(self, name).dtype}, expected torch.bool")
        if not 0 <= self.burn_in < max(shape[1], 1):
            raise ValueError(f"Batch: burn_in is {self.burn_in}, expected at least 0 and below time={shape[1]}")

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, time)."""
        return self.reset.shape[0], self.reset.shape[1]

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
        """Steps ``start`` to ``stop`` of every row, without burn-in. Only a piece that starts at 0 keeps the state."""
        piece = dataclasses.replace(self, burn_in=0).map(lambda x: x[:, start:stop])
        piece.state = self.state if start == 0 else None
        return piece


_TIMED = ("actions", "rewards", "terminated", "has_action", "reset", "valid")
