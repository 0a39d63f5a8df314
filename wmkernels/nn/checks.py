"""Checks of modules' arguments and inputs."""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from wmkernels import checks
from wmkernels.checks import (
    FLOATS,
    MAX_SIZE,
    dtype_name,
    has_shape,
    require_device,
    require_dtype,
    require_flag,
    require_sequences,
    require_shape,
    require_size,
    require_tensor,
    shown,
)
from wmkernels.modes import can_read_values

State = dict[str, Tensor]
Init = Callable[..., None]


def checked(init: Init) -> Init:
    """An ``__init__`` that compares its arguments with its annotations first. Raises TypeError, ValueError."""
    signature, hints = inspect.signature(init), typing.get_type_hints(init)

    @functools.wraps(init)
    def checked_init(self: Any, *arguments: Any, **named: Any) -> None:
        name = type(self).__name__
        try:
            given = signature.bind(self, *arguments, **named).arguments
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        for argument, value in given.items():
            if argument in hints and signature.parameters[argument].kind is not inspect.Parameter.VAR_KEYWORD:
                _require_kind(name, argument, value, hints[argument])
        init(self, *arguments, **named)

    return checked_init


def _require_kind(module: str, name: str, value: object, annotation: Any) -> None:
    """Sizes are at least 1, numbers finite. Kinds that are not named here are left to the module."""
    options = [annotation] if typing.get_origin(annotation) is Literal else [*typing.get_args(annotation)]
    options = options or [annotation]
    words = [word for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)]
    kinds = [option for option in options if typing.get_origin(option) is not Literal]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (value is None and type(None) in kinds) or (isinstance(value, str) and value in words):
        return
    if kinds == [bool]:
        require_flag(module, name, value)
    elif torch.dtype in kinds:
        if value not in FLOATS:
            expected = ", ".join(map(dtype_name, FLOATS))
            raise TypeError(f"{module}: {name} is {shown(value)}, expected {expected} or None")
    elif torch.device in kinds:
        try:
            torch.device(value)  # type: ignore[call-overload]
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{module}: {name} is {shown(value)}, expected a device of PyTorch: {error}") from error
    elif kinds == [float]:
        if not whole and not isinstance(value, float):
            raise TypeError(f"{module}: {name} is {shown(value)}, expected a number")
        if not -math.inf < value < math.inf:  # type: ignore[operator]
            raise ValueError(f"{module}: {name} is {value}, expected a finite number")
    elif kinds == [int]:
        also = f" or {words[0]!r}" if words else ""
        if not whole:
            raise TypeError(f"{module}: {name} is {shown(value)}, expected a whole number{also}")
        if not 1 <= value <= MAX_SIZE:  # type: ignore[operator]
            raise ValueError(f"{module}: {name} is {value}, expected a whole number, at least 1 and at most {MAX_SIZE}")
    elif not kinds:
        raise ValueError(f"{module}: {name} is {shown(value)}, expected {' or '.join(map(repr, words))}")
    elif str in kinds and not isinstance(value, str):
        raise TypeError(f"{module}: {name} is {shown(value)}, expected a str or None")


def require_inputs(module: str, name: str, inputs: Tensor, labels: tuple[str, ...], features: int | None) -> None:
    """Checks dtype and shape; any number of ``features`` if None."""
    require_tensor(module, name, inputs)
    require_dtype(module, name, inputs, FLOATS, "")
    if inputs.dim() != len(labels) or features not in (None, inputs.shape[-1]):
        expected = ", ".join(labels if features is None else (*labels[:-1], f"{labels[-1]}={features}"))
        hint = "; step() takes one step of time" if inputs.dim() == 2 < len(labels) else ""
        raise ValueError(f"{module}: {name} has shape {tuple(inputs.shape)}, expected ({expected}){hint}")


def require_state(
    module: str, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], like: Tensor
) -> None:
    """Checks keys, dtypes, devices and shapes."""
    if not isinstance(state, Mapping) or any(name not in state for name in shapes):
        held = f"the keys {sorted(state)}" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise TypeError(f"{module}: state is {held}, expected a dict with {sorted(shapes)} as init_state() makes it")
    for name, shape in shapes.items():
        value = state[name]
        require_tensor(module, f"state[{name!r}]", value)
        require_dtype(module, f"state[{name!r}]", value, FLOATS, "")
        require_device(module, f"state[{name!r}]", value, like.device, "the input")
        if not has_shape(value, shape):
            raise ValueError(f"{module}: state[{name!r}] has shape {tuple(value.shape)}, expected {tuple(shape)}")


def require_reset(module: str, reset: Tensor | None, like: Tensor) -> None:
    """Expects a bool per feature vector of ``like``."""
    labels = ("batch", "time")[: like.dim() - 1]
    checks.require_reset(module, reset, labels, like.shape[:-1], like, "the input")


def require_packing(module: str, cu_seqlens: Tensor | None, like: Tensor) -> None:
    """Expects ``like`` (1, time, features)."""
    checks.require_packing(module, cu_seqlens, like, "the input")
    if cu_seqlens is not None and can_read_values(cu_seqlens):
        require_sequences(module, cu_seqlens, like.shape[1])


def require_tokens(
    module: str, name: str, inputs: Tensor, labels: tuple[str, ...], tokens: int, features: int | None = None
) -> None:
    """As ``require_inputs``, with ``tokens`` in the dimension before the last."""
    require_inputs(module, name, inputs, labels, features)
    if inputs.shape[-2] != tokens:
        raise ValueError(
            f"{module}: {name} has shape {tuple(inputs.shape)}, expected {tokens} tokens before the features"
        )


def require_elapsed(module: str, elapsed: Tensor | None, like: Tensor) -> None:
    """Expects a floating number per feature vector of ``like``."""
    if elapsed is not None:
        require_tensor(module, "elapsed", elapsed)
        require_dtype(module, "elapsed", elapsed, FLOATS, "(time since the step before)")
        require_device(module, "elapsed", elapsed, like.device, "the input")
        require_shape(module, "elapsed", elapsed, ("batch", "time")[: like.dim() - 1], like.shape[:-1], "the input")


def require_not_negative(module: str, name: str, value: object) -> None:
    """Expects a finite number, at least 0, or None. Raises TypeError, ValueError."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{module}: {name} is {shown(value)}, expected a number or None")
    if not 0 <= value < math.inf:
        raise ValueError(f"{module}: {name} is {value}, expected a finite number, at least 0")


def require_pair(module: str, name: str, value: object) -> tuple[int, int]:
    """Two whole numbers, at least 1. Raises TypeError, ValueError."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{module}: {name} is {shown(value)}, expected two whole numbers, rows and columns")
    for size in value:
        require_size(module, name, size, 1)
    return value[0], value[1]


def require_heads(module: str, d_model: int, heads: int) -> None:
    """Expects heads of equal, even width. Raises ValueError."""
    if d_model % (2 * heads):
        raise ValueError(f"{module}: heads is {heads} and d_model {d_model}, expected a multiple of 2 * heads")
