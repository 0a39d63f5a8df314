"""The causal convolution as a loop: the specification.

    y_t = act(bias + sum_k weight[k] x_{t - (width - 1) + k})        per channel; act is the identity or silu

Inputs before the sequence are those of the initial state, oldest first. reset[t] makes all inputs before t zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.causal_conv1d.meta import ConvInputs
from wmkernels.checks import state_dtype
from wmkernels.packed import by_sequence


def causal_conv1d_reference(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    if inputs.cu_seqlens is not None:
        timed = ("x", "reset")
        return by_sequence("causal_conv1d", causal_conv1d_reference, inputs, timed, ("initial_state",), -1)
    x, weight, bias, initial_state, reset, _, silu, _ = inputs
    dtype = state_dtype(x.dtype)
    window = x.new_zeros(inputs.state_shape, dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[2]):
        if reset is not None:
            window = window.masked_fill(reset[:, t, None, None], 0)
        window = torch.cat([window, x[:, :, t, None].to(dtype)], 2)  # (batch, channels, width)
        out = (window * weight).sum(2)  # (batch, channels)
        out = out if bias is None else out + bias
        outputs.append(F.silu(out) if silu else out)
        window = window[:, :, 1:]
    if not outputs:
        return x.clone(), window.clone()
    return torch.stack(outputs, 2).to(x.dtype), window.clone()
