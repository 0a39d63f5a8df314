"""The linear scan as a loop: the specification.

    h_t = gates_t h_{t-1} + tokens_t        forward
    h_t = gates_t h_{t+1} + tokens_t        in reverse

reset[t] cuts h_{t-1} from h_t, in reverse h_t from h_{t-1}.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.linear_scan.meta import LinearScanInputs


def linear_scan_reference(inputs: LinearScanInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    gates, tokens, initial_state, reset, reverse, _ = inputs
    assert tokens is not None
    batch, channels, time = gates.shape
    dtype = state_dtype(gates.dtype)
    if initial_state is None:
        state = torch.zeros((batch, channels), dtype=dtype, device=gates.device)
    else:
        state = initial_state.to(dtype)
    outputs: list[Tensor] = []
    cuts = None if reset is None else F.pad(reset[:, 1:], (0, 1)) if reverse else reset
    for t in reversed(range(time)) if reverse else range(time):
        gate, token = gates[..., t].to(dtype), tokens[..., t].to(dtype)
        if cuts is not None:
            # also drops NaN, and a zero state times an infinite gate
            gate, state = (x.masked_fill(cuts[:, t, None], 0) for x in (gate, state))
        state = gate * state + token
        outputs.append(state)
    if not outputs:
        return gates.clone(), state.clone()
    if reset is not None and reverse:
        state = state.masked_fill(reset[:, :1], 0)
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, 2).to(gates.dtype), state
