"""Checks place memory arguments."""

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    require_dtype,
    require_float,
    require_packing,
    require_reset,
    require_shape,
    state_dtype,
)
from wmkernels.place_memory.meta import PlaceMemoryInputs

OP = "place_memory"


def canonical(
    values: Tensor,
    phase: Tensor,
    keys: Tensor,
    inverse: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    initial_phase: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> PlaceMemoryInputs:
    """All but ``values`` in the state dtype. Raises ValueError, TypeError."""
    require_dtype(OP, "values", values, FLOATS, "")
    if values.dim() != 4:
        raise ValueError(f"{OP}: values has shape {tuple(values.shape)}, expected (batch, time, places, channels)")
    if keys.dim() != 2 or keys.shape[1] % 2 or 0 in keys.shape:
        raise ValueError(
            f"{OP}: keys has shape {tuple(keys.shape)}, expected (places, 2 * frequencies), cosines before sines"
        )
    if phase.dim() != 4:
        raise ValueError(f"{OP}: phase has shape {tuple(phase.shape)}, expected (batch, time, groups, 2 * frequencies)")
    batch, time, places, channels = values.shape
    groups, rows = phase.shape[2], keys.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{OP}: phase has {groups} groups, expected a divisor of channels={channels}")
    require_packing(OP, cu_seqlens, values, "values")
    first = ("batch", batch) if cu_seqlens is None else ("sequences", cu_seqlens.shape[0] - 1)
    features = "2 * frequencies"
    expected = {
        "keys": (keys, ("places", features), (places, rows), "values"),
        "phase": (phase, ("batch", "time", "groups", features), (batch, time, groups, rows), "values and keys"),
        "inverse": (inverse, ("places", "places"), (places, places), "values"),
        "gate": (gate, ("batch", "time", "places", "groups"), (batch, time, places, groups), "values and phase"),
        "initial_state": (
            initial_state,
            (first[0], "groups", features, "channels / groups"),
            (first[1], groups, rows, channels // groups),
            "values and phase",
        ),
        "initial_phase": (initial_phase, (first[0], "groups", features), (first[1], groups, rows), "values and phase"),
    }
    dtype = state_dtype(values.dtype)
    canonical: dict[str, Tensor | None] = {}
    for name, (x, labels, sizes, against) in expected.items():
        if x is not None:
            require_float(OP, name, x, values, "values")
            require_shape(OP, name, x, labels, sizes, against)
        canonical[name] = None if x is None else x.to(dtype)
    require_reset(OP, reset, ("batch", "time"), (batch, time), values, "values")
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
    return PlaceMemoryInputs(values, **canonical, reset=reset, cu_seqlens=bounds)  # type: ignore[arg-type]
