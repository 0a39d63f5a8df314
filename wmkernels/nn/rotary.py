"""Rotary positions of attention (Su et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmkernels.checks import state_dtype


def axial_angles(positions: Sequence[Tensor], extents: Sequence[int], pairs: int) -> Tensor:
    """Float64 angles (n, pairs) from positions (n,) per axis.

    The pairs are divided among the axes with an extent above 1; an axis's frequencies fall geometrically from 1 to
    1 / extent radians.
    """
    axes = [(position, extent) for position, extent in zip(positions, extents, strict=True) if extent > 1]
    angles = [positions[0].new_zeros(len(positions[0]), 0 if axes else pairs, dtype=torch.float64)]
    for index, (position, extent) in enumerate(axes):
        count = pairs // len(axes) + (index < pairs % len(axes))
        exponents = torch.linspace(0, 1, count, device=position.device, dtype=torch.float64)
        angles.append(position[:, None] * extent**-exponents)
    return torch.cat(angles, 1)


def phases(angles: Tensor) -> Tensor:
    """exp(i angle), complex128."""
    return torch.polar(torch.ones_like(angles), angles)


def rotate_by(x: Tensor, factors: Tensor) -> Tensor:
    """Complex ``factors`` (..., pairs) times the adjacent pairs of heads ``x`` (..., heads * 2 pairs).

    One complex product: a third of the time of sines and cosines on halves of the heads.
    """
    heads = torch.view_as_complex(x.to(state_dtype(x.dtype)).unflatten(-1, (-1, factors.shape[-1], 2)))
    return torch.view_as_real(heads * factors[..., None, :].to(heads.dtype)).flatten(-3).to(x.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """``rotate_by`` the phases of ``angles`` (..., pairs)."""
    return rotate_by(x, phases(angles))
