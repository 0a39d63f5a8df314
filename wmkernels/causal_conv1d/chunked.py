"""The causal convolution as a sum of shifted inputs.

Every sequence follows its window in one tensor, so packed sequences need no loop. Inputs of another segment, a
sequence or what follows a reset, are replaced by zeros: NaN does not cross.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.causal_conv1d.meta import ConvInputs
from wmkernels.checks import require_sequences, state_dtype
from wmkernels.modes import can_read_values


class _Padded(NamedTuple):
    """Inputs behind their windows, channels last."""

    x: Tensor  # (batch, rows, channels)
    segment: Tensor | None  # (batch, rows), equal in a segment


def causal_conv1d_chunked(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    x, weight, _, initial_state, reset, cu_seqlens, _, _ = inputs
    dtype, past = state_dtype(x.dtype), weight.shape[1] - 1
    window = x.new_zeros(inputs.state_shape, dtype=dtype) if initial_state is None else initial_state
    if x.numel() == 0:
        return x.clone(), window.clone()
    steps, window = x.transpose(1, 2).to(dtype), window.transpose(1, 2)
    if cu_seqlens is not None:
        out, window = _packed(inputs, steps, window, cu_seqlens)
    else:
        time = x.shape[2]
        segment = None if reset is None else F.pad(reset.cumsum(1), (past, 0))
        padded = _Padded(torch.cat([window, steps], 1), segment)
        out = _convolve(inputs, padded)
        window = padded.x[:, time:].clone()  # a view would keep the sequence alive
        if segment is not None:
            window = window.masked_fill((segment[:, time:] != segment[:, -1:])[..., None], 0)
    return out.transpose(1, 2).to(x.dtype), window.transpose(1, 2)


def _convolve(inputs: ConvInputs, padded: _Padded) -> Tensor:
    """(batch, rows - past, channels)."""
    weight, bias = inputs.weight, inputs.bias
    past = weight.shape[1] - 1
    time = padded.x.shape[1] - past
    total = None
    for start in range(past, -1, -1):  # newest first, as the kernels
        view, tap = padded.x[:, start : start + time], weight[:, start]
        if padded.segment is not None and start < past:
            same = padded.segment[:, start : start + time] == padded.segment[:, past:]
            view = torch.where(same[..., None], view, 0)
        if total is None:
            total = view * tap if bias is None else torch.addcmul(bias, view, tap)
        else:
            total = torch.addcmul(total, view, tap)
    assert total is not None
    return F.silu(total) if inputs.silu else total


def _packed(inputs: ConvInputs, steps: Tensor, window: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence follows its window."""
    sequences, past, channels = window.shape
    time, device, reset = steps.shape[1], steps.device, inputs.reset
    if can_read_values(bounds):
        require_sequences("causal_conv1d", bounds, time)
    index = torch.arange(sequences, device=device)
    recent = torch.arange(past, device=device)
    owner = torch.searchsorted(bounds, torch.arange(time, device=device), right=True) - 1
    step_rows = torch.arange(time, device=device) + (owner + 1) * past
    window_rows = (bounds[:-1] + index * past)[:, None] + recent
    rows = torch.cat([window_rows.flatten(), step_rows])
    padded = steps.new_zeros(rows.shape[0], channels).index_copy(0, rows, torch.cat([window.flatten(0, 1), steps[0]]))
    zeros = torch.zeros_like(rows)
    segment = zeros.index_copy(0, rows, torch.cat([index[:, None].expand(sequences, past).flatten(), owner]))
    if reset is not None:
        # Both terms are nondecreasing, so equal sums mean equal terms.
        segment = segment + zeros.index_copy(0, step_rows, reset[0].to(torch.int64)).cumsum(0)
    out = _convolve(inputs, _Padded(padded[None], segment[None])).index_select(1, step_rows - past)
    last_rows = (bounds[1:] + index * past)[:, None] + recent
    newest = bounds[1:] + (index + 1) * past - 1
    other = segment[last_rows] != segment[newest][:, None]
    return out, padded[last_rows].masked_fill(other[..., None], 0)
