"""Frequencies of the place memory's keys."""

import itertools
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from wmkernels.checks import require_size


def lattice(period: int | Sequence[int], count: int | None = None, dims: int = 2) -> Tensor:
    """Frequencies of a torus of whole positions, lowest first, one of each pair w and -w.

    Args:
        period: positions per dimension, after which places repeat; a number, or one per dimension.
        count: how many; None: all, with which keys of unlike places are orthogonal.
        dims: dimensions, where ``period`` is one number.

    Returns:
        (count, dims), float64 on the CPU, radians per position.

    Raises:
        ValueError: a number below 1, no period, or too high a ``count``.
        TypeError: not a whole number.

    Example:
        >>> import wmkernels
        >>> wmkernels.nn.lattice(15).shape
        torch.Size([113, 2])
    """
    require_size("lattice", "dims", dims, 1)
    given = list(period) if isinstance(period, Sequence) else [period] * dims
    periods = [int(p) if isinstance(p, numbers.Integral) and not isinstance(p, bool) else p for p in given]  # of NumPy
    for p in periods:
        require_size("lattice", "period", p, 1)
    if not periods:
        raise ValueError(f"lattice: period is {period}, expected a whole number per dimension")
    chosen = []
    for k in itertools.product(*(range(-((p - 1) // 2), p // 2 + 1) for p in periods)):
        opposite = tuple(-i if 2 * i != p else i for i, p in zip(k, periods, strict=True))
        if k >= opposite:
            chosen.append(k)
    chosen.sort(key=lambda k: sum((i / p) ** 2 for i, p in zip(k, periods, strict=True)))
    if count is not None:
        require_size("lattice", "count", count, 1)
    if count is not None and count > len(chosen):
        raise ValueError(f"lattice: count is {count}, expected 1 to {len(chosen)} for period={period}")
    scale = torch.tensor(periods, dtype=torch.float64, device="cpu")
    return torch.tensor(chosen[:count], dtype=torch.float64, device="cpu") * 2 * math.pi / scale
