"""The gated delta rule as a loop: the specification.

A state S of d_k x d_v numbers per head maps keys to values. A step forgets, then corrects what the key recalls (Yang,
Kautz & Hatamizadeh 2024, "Gated Delta Networks", equation 10, transposed):

    S_t = exp(gate_t) S_{t-1} + k_t u_t^T
    u_t = beta_t (v_t - exp(gate_t) S_{t-1}^T k_t)
    y_t = scale S_t^T q_t
"""

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.gated_delta_rule.meta import DeltaRuleInputs
from wmkernels.packed import by_sequence


def gated_delta_rule_reference(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    if inputs.cu_seqlens is not None:
        timed = ("q", "k", "v", "gate", "beta", "reset")
        return by_sequence("gated_delta_rule", gated_delta_rule_reference, inputs, timed, ("initial_state",), -1)
    q, k, v, gate, beta, state, reset = inputs[:7]
    dtype = state_dtype(v.dtype)
    if state is None:
        state = torch.zeros(inputs.state_shape, dtype=dtype, device=v.device)
    outputs = []
    for t in range(v.shape[3]):
        q_t, k_t = (x[..., t, None].to(dtype) for x in (q, k))  # (batch, heads, d_k, 1)
        v_t = v[..., t].to(dtype)  # (batch, heads, d_v)
        decay = torch.exp(gate[..., t])[..., None, None]  # (batch, heads, 1, 1)
        if reset is not None:
            # also drops NaN, and a zero state times an infinite decay
            decay, state = (x.masked_fill(reset[:, t, None, None, None], 0) for x in (decay, state))
        state = decay * state  # (batch, heads, d_k, d_v)
        u_t = beta[..., t, None] * (v_t - (state * k_t).sum(-2))
        state = state + k_t * u_t[..., None, :]
        outputs.append(inputs.scale * (state * q_t).sum(-2))
    if not outputs:
        return v.clone(), state.clone()
    return torch.stack(outputs, 3).to(v.dtype), state
