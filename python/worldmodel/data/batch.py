"""Training batches: steps of episodes on (batch, time).

    o_t     ``observations``
    a_t     ``actions``, chosen after o_t
    r_t     ``rewards``, of a_t
    end_t   ``terminated``, whether a_t terminated the episode

An episode of n actions has n + 1 steps; at ``is_last`` there is no action. Returns bootstrap at truncations:
``is_last`` without ``terminated`` before. DreamerV3 (Hafner et al. 2023) stores
reward and end with the next observation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclasses.dataclass
class Batch:
    """Steps of episodes, then padding. Default masks are all true, default times 1.

    Attributes:
        observations: encoded, key -> (batch, time, ...).
        actions: (batch, time, *ActionSpec.shape); arbitrary where ``is_last``.
        rewards: float32 (batch, time), in the environment's units; arbitrary where ``is_last`` or not ``reward_mask``.
        terminated: bool (batch, time), as all below unless stated.
        is_last: last observation of an episode or chunk, or padding.
        is_first: first observation of an episode.
        valid: false on padding.
        state: before the first step, as ``WorldModel.init_state``; None if no row begins inside an episode.
        loss_mask: false without a loss, such as burn-in.
        reward_mask: false for unknown rewards: no loss, statistic or imagination.
        elapsed: float32 (batch, time), steps since the previous observation; scale those of scan memories.
        irregular: whether an ``elapsed`` differs from 1; found out if None.
        carry: a number of steps, after which ``RefreshedSource.refresh`` wants the memory states; 0 for none.
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
    irregular: bool | None = None
    carry: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for shapes, TypeError for dtypes."""
        shape = self.is_first.shape
        if self.is_first.dim() != 2:
            raise ValueError(f"Batch: is_first has shape {tuple(shape)}, expected (batch, time)")
        for name in ("loss_mask", "reward_mask"):
            if getattr(self, name) is None:
                setattr(self, name, torch.ones_like(self.is_first, dtype=torch.bool))
        if self.elapsed is None:
            self.elapsed, self.irregular = torch.ones_like(self.is_first, dtype=torch.float32), False
        if self.irregular is None:
            self.irregular = bool((self.elapsed != 1).any())
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
        return self.is_first.shape[0], self.is_first.shape[1]

    @property
    def losses_at(self) -> Tensor:
        """Steps with a loss, bool (batch, time)."""
        return self.valid & self.loss_mask

    @property
    def known_rewards(self) -> Tensor:
        """Steps with a known reward, bool (batch, time)."""
        return self.valid & ~self.is_last & self.reward_mask

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Applies ``function`` to all but the state."""
        fields: dict[str, Any] = {name: function(getattr(self, name)) for name in _TIMED}
        observations = {name: function(value) for name, value in self.observations.items()}
        return dataclasses.replace(self, observations=observations, **fields)

    def to(self, device: torch.device | str) -> "Batch":
        moved = self.map(lambda x: x.to(device, non_blocking=True))
        if self.state is not None:
            moved.state = {name: value.to(device) for name, value in self.state.items()}
        return moved

    def steps(self, start: int, stop: int) -> "Batch":
        """Steps ``start`` to ``stop``, without ``carry``; the state only for ``start`` 0."""
        part = self.map(lambda x: x[:, start:stop])
        part.state = self.state if start == 0 else None
        part.carry = 0
        return part


def times_of(elapsed: np.ndarray | None, device: torch.device) -> Tensor | None:
    """``elapsed`` (n,) as a tensor; None if all are 1, which memories need not be told."""
    if elapsed is None or bool((elapsed == 1).all()):
        return None
    return torch.from_numpy(elapsed).to(device)


_BOOL = ("terminated", "is_last", "is_first", "valid", "loss_mask", "reward_mask")
_TIMED = ("actions", "rewards", "elapsed", *_BOOL)
