"""A loaded state against one of the same kind."""

import math
from typing import Any

import numpy as np
import torch


def check_like(saved: Any, like: Any, where: str) -> None:
    """Compares what ``like`` has, in nested dicts: types, and of tensors and arrays shape and dtype.

    Names that only one of them has, but for dicts of tensors or arrays, the items of lists, and what is None in
    ``like`` are left to the reader.

    Raises:
        TypeError: another type, shape or dtype.
        ValueError: NaN, infinity, a negative number, or other names.

    Example:
        >>> check_like({"steps": -1}, {"steps": 0}, "trainer")
        Traceback (most recent call last):
            ...
        ValueError: trainer.steps is -1, expected a finite number of at least 0
    """
    if like is None:
        return
    kinds = (int, float) if type(like) is float else (type(like),)
    if type(saved) not in kinds:
        raise TypeError(f"{where} is a {type(saved).__name__}, expected a {type(like).__name__}")
    if isinstance(like, dict):
        arrays = bool(like) and all(isinstance(value, torch.Tensor | np.ndarray) for value in like.values())
        if arrays and like.keys() != saved.keys():
            raise ValueError(f"{where} has the names {[*saved]!r:.200}, expected {[*like]!r:.200}")
        for name in like.keys() & saved.keys():
            check_like(saved[name], like[name], f"{where}.{name}")
    elif isinstance(like, torch.Tensor | np.ndarray):
        if (saved.shape, saved.dtype) != (like.shape, like.dtype):
            described = f"{saved.dtype} {tuple(saved.shape)}, expected {like.dtype} {tuple(like.shape)}"
            raise TypeError(f"{where} is {described}")
        if not np.isfinite(np.asarray(saved.cpu()) if isinstance(saved, torch.Tensor) else saved).all():
            raise ValueError(f"{where} has NaN or infinity")
    elif isinstance(like, int | float) and not 0 <= saved < math.inf:
        raise ValueError(f"{where} is {saved}, expected a finite number of at least 0")
