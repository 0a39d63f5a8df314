"""Checks linear scan arguments."""

import math
from collections.abc import Sequence

from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    common_dtype,
    has_shape,
    is_autocast,
    promote_dtypes,
    require_dtype,
    require_float,
    require_reset,
    require_shape,
    state_dtype,
)
from wmkernels.linear_scan.meta import LinearScanInputs

OP = "linear_scan"


def canonical(
    gates: Tensor,
    tokens: Tensor,
    initial_state: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    channel_last: bool,
) -> tuple[LinearScanInputs, Sequence[int]]:
    """Inputs, gates and tokens of unlike dtypes in the state dtype, and the sizes merged into channels."""
    require_dtype(OP, "gates", gates, FLOATS, "")
    if is_autocast(gates.device):
        dtype = promote_dtypes([gates.dtype, tokens.dtype])
        gates, tokens = gates.to(dtype), tokens.to(dtype)
    require_float(OP, "tokens", tokens, gates, "gates")
    if gates.dim() < 2:
        wanted = "(batch, time, ...)" if channel_last else "(batch, ..., time)"
        raise ValueError(f"{OP}: gates has shape {tuple(gates.shape)}, expected {wanted}")
    if not has_shape(tokens, gates.shape):
        raise ValueError(f"{OP}: tokens has shape {tuple(tokens.shape)}, expected {tuple(gates.shape)} to match gates")
    if channel_last:
        gates, tokens = gates.movedim(1, -1), tokens.movedim(1, -1)
    batch, *inner, time = gates.shape
    _check_states(gates, initial_state, reset)

    gates, tokens = common_dtype((gates, tokens), gates)  # type: ignore[assignment]
    channels = math.prod(inner)
    # Conditional: PyTorch 2.11 drops second derivatives of compiled graphs that save only input views
    if len(inner) != 1:
        gates, tokens = gates.reshape(batch, channels, time), tokens.reshape(batch, channels, time)
        initial_state = None if initial_state is None else initial_state.reshape(batch, channels)
    if initial_state is not None:
        initial_state = initial_state.to(state_dtype(gates.dtype))
    return LinearScanInputs(gates, tokens, initial_state, reset, reverse, channel_last), inner


def _check_states(gates: Tensor, initial_state: Tensor | None, reset: Tensor | None) -> None:
    if initial_state is not None:
        require_float(OP, "initial_state", initial_state, gates, "gates")
        labels = ["batch", *("channels",) * (gates.dim() - 2)]
        require_shape(OP, "initial_state", initial_state, labels, gates.shape[:-1], "gates")
    sizes = (gates.shape[0], gates.shape[-1])
    require_reset(OP, reset, ("batch", "time"), sizes, gates, "gates")
