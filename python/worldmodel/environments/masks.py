"""Masks of legal actions, as environments give them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldmodel.data.actions import MASK, ActionSpec
from worldmodel.data.spaces import ObservationSpec


def masks_of(info: Mapping[str, Any], num_envs: int) -> list[Any]:
    """The mask of each environment, or None, from the info of a gymnasium vector environment."""
    if info.get(MASK) is None:
        return [None] * num_envs
    given = info.get(f"_{MASK}", np.ones(num_envs, bool))
    return [_of_row(info[MASK], row) if given[row] else None for row in range(num_envs)]


def _of_row(value: Any, row: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _of_row(part, row) for key, part in value.items() if not (key[:1] == "_" and key[1:] in value)}
    return tuple(_of_row(part, row) for part in value) if isinstance(value, tuple) else value[row]


class MaskReader:
    """Encodes observations with the masks of info.

    Args:
        observation_spec: of the encoded observations.
        action_spec: of the masks.
        chosen_here: whether ``observation_spec`` was made from the first reset, and is no saved one: a run of an
            earlier release has no masks.
    """

    def __init__(self, observation_spec: ObservationSpec, action_spec: ActionSpec, chosen_here: bool) -> None:
        self._observations, self._actions = observation_spec, action_spec
        self._none_expected = chosen_here and not observation_spec.action_mask and bool(action_spec.sizes)

    def encode(self, observations: Any, masks: list[Any], ended: np.ndarray) -> dict[str, np.ndarray]:
        """Batched observations, the mask of each or None, and whether its episode ended -> encoded observations.

        Raises:
            ValueError: as for ``ObservationSpec.encode_batch``, a mask of another shape or type, one that the first
                reset did not have, or no legal action where the episode goes on.
        """
        encoded = self._observations.encode_batch(observations, self.encode_masks(masks))
        legal = self._observations.legal(encoded)
        if legal is not None and not (self._actions.has_legal(legal) | ended).all():
            raise ValueError(f"{MASK} has no legal action, expected one before the episode's end")
        return encoded

    def encode_masks(self, masks: list[Any]) -> np.ndarray | None:
        """Bool (environments, classes); None if info has none."""
        if self._none_expected and any(mask is not None for mask in masks):
            raise ValueError(
                f"info has an {MASK}, and that of the first reset had none: give it there as well, with ones where "
                "every action is legal"
            )
        if self._observations.action_mask != "info":
            return None
        return np.stack([self._actions.encode_mask(mask) for mask in masks])
