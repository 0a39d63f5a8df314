"""Caches of transformers before 5.15: the states of one layer, read and written in one way."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class States(NamedTuple):
    """Of one layer, before the inputs of a call.

    Attributes:
        conv: (batch, channels, at least width - 1), the last inputs of the convolution.
        scan: (batch, ..., state).
    """

    conv: Tensor
    scan: Tensor


class LayeredCache:
    """``cache.layers[i]``, of transformers 5.5 to 5.14."""

    def __init__(self, cache: Any, layer: int, arguments: Mapping[str, Any]) -> None:
        self.cache, self.layer = cache, layer

    def read(self) -> States | None:
        """None at the start of a sequence."""
        if not self.cache.has_previous_state(self.layer):
            return None
        layer = self.cache.layers[self.layer]
        return States(layer.conv_states[0], layer.recurrent_states[0])

    def write(self, inputs: Tensor, width: int, scan: Tensor) -> None:
        """Of the convolution with this width, the inputs; of the scan, the last state."""
        first = not self.cache.has_previous_state(self.layer)
        self.cache.update_conv_state(_window(inputs, width) if first else inputs, self.layer)
        self.cache.update_recurrent_state(scan, self.layer)


class ListedCache:
    """``cache.conv_states[i]`` and ``cache.ssm_states[i]``, of transformers 4."""

    def __init__(self, cache: Any, layer: int, arguments: Mapping[str, Any]) -> None:
        self.cache, self.layer = cache, layer
        position = arguments.get("cache_position")
        known = getattr(cache, "has_previous_state", None)
        self.continues = bool(known) if known is not None else position is not None and bool(position[0] > 0)

    def read(self) -> States | None:
        """None at the start of a sequence."""
        if not self.continues:
            return None
        return States(self.cache.conv_states[self.layer], self.cache.ssm_states[self.layer])

    def write(self, inputs: Tensor, width: int, scan: Tensor) -> None:
        """Of the convolution with this width, the inputs; of the scan, the last state."""
        conv = self.cache.conv_states[self.layer]
        known = torch.cat([conv, inputs[..., -width:]], -1) if self.continues else inputs
        conv.copy_(_window(known, width))
        self.cache.ssm_states[self.layer].copy_(scan)


def _window(inputs: Tensor, width: int) -> Tensor:
    """The last ``width`` inputs, zeros before the first."""
    return F.pad(inputs, (width - inputs.shape[-1], 0))
