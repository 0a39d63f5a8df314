"""Module input checks."""

from collections.abc import Mapping

from torch import Tensor

from wmkernels import checks
from wmkernels.checks import (
    FLOATS,
    has_shape,
    require_device,
    require_dtype,
    require_sequences,
    require_tensor,
)
from wmkernels.modes import can_read_values

State = dict[str, Tensor]


def require_inputs(module: str, name: str, inputs: Tensor, labels: tuple[str, ...], features: int) -> None:
    """Checks dtype and shape."""
    require_tensor(module, name, inputs)
    require_dtype(module, name, inputs, FLOATS, "")
    if inputs.dim() != len(labels) or inputs.shape[-1] != features:
        expected = ", ".join((*labels[:-1], f"{labels[-1]}={features}"))
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
