"""What the ConvLSTM's ops return: shapes, dtypes and strides, on which the fakes and every backend agree.

Maps that the kernels write lie in memory channels last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.conv_lstm.reference import output_size

KEEP_NOTHING, KEEP_CELLS, KEEP_GATES = 0, 1, 2


class Sizes(NamedTuple):
    """Of one call."""

    time: int
    batch: int
    hidden: int
    height: int
    width: int


def sizes_of(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Sizes:
    """Of the states, from canonical inputs."""
    size = output_size(x.shape[-2:], weight_ih.shape[-2:], stride, padding, dilation)
    return Sizes(x.shape[0], x.shape[1], weight_hh.shape[1], *size)


def empty_maps(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(..., channels, height, width), uninitialised, with the channels contiguous."""
    *leading, channels, height, width = shape
    return torch.empty((*leading, height, width, channels), dtype=dtype, device=device).movedim(-1, -3)


def forward_outputs(x: Tensor, sizes: Sizes, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, h, c, cells, gates).

    ``cells`` (time, batch, height, width, hidden) and ``gates`` (time, batch, height, width, 4, hidden), after their
    nonlinearities, are for the backward pass, in the state's dtype, and of shape (0,) where they are not kept.
    """
    time, batch, hidden, height, width = sizes
    dtype = state_dtype(x.dtype)
    state = (batch, hidden, height, width)
    cells = (time, batch, height, width, hidden) if keep >= KEEP_CELLS else (0,)
    gates = (time, batch, height, width, 4, hidden) if keep >= KEEP_GATES else (0,)
    return (
        empty_maps((time, *state), x.dtype, x.device),
        empty_maps(state, x.dtype, x.device),
        empty_maps(state, dtype, x.device),
        torch.empty(cells, dtype=dtype, device=x.device),
        torch.empty(gates, dtype=dtype, device=x.device),
    )


def backward_outputs(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of these, uninitialised; of shape (0,) where there is none."""
    absent = torch.empty((0,), dtype=x.dtype, device=x.device)

    def like(given: Tensor | None) -> Tensor:
        if given is None:
            return absent.clone()
        return torch.empty(tuple(given.shape), dtype=given.dtype, device=given.device)

    def maps_like(given: Tensor | None) -> Tensor:
        return absent.clone() if given is None else empty_maps(given.shape, given.dtype, given.device)

    return (
        maps_like(x),
        like(weight_ih),
        like(weight_hh),
        like(bias),
        like(peephole),
        maps_like(h),
        maps_like(c),
    )
