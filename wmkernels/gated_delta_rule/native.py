"""Runs the gated delta rule's native kernels."""

import struct

import torch
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.gated_delta_rule.meta import (
    CHUNK,
    DIFFERENTIABLE,
    DeltaRuleInputs,
    backward_outputs,
    chunk_count,
    forward_outputs,
)
from wmkernels.native_call import DTYPE_CODES, Members, output, run


def _members(inputs: DeltaRuleInputs, chunk: int) -> Members:
    q, v = inputs.q, inputs.v
    batch, heads, d_k, time = q.shape
    dtype, held = q.dtype, state_dtype(q.dtype)
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous()
    return {
        "batch": batch,
        "heads": heads,
        "d_k": d_k,
        "d_v": v.shape[2],
        "time": time,
        "sequences": inputs.sequences,
        "chunk": chunk,
        "dtype": DTYPE_CODES[dtype],
        "scale": struct.unpack("q", struct.pack("d", inputs.scale))[0],
        "q": (q, q.shape, dtype),
        "k": (inputs.k, q.shape, dtype),
        "gate": (inputs.gate, (batch, heads, time), held),
        "beta": (inputs.beta, (batch, heads, time), held),
        "initial_state": (inputs.initial_state, inputs.state_shape, held),
        "reset": (inputs.reset, (batch, time), torch.bool),
        "cu_seqlens": (cu_seqlens, (inputs.sequences + 1,), torch.int64),
    }


def forward(inputs: DeltaRuleInputs, chunk: int) -> tuple[Tensor, ...]:
    """As ``meta.forward_outputs``."""
    v = inputs.v
    outputs = forward_outputs(inputs, chunk)
    members = _members(inputs, chunk or CHUNK)
    members["v"] = (v, v.shape, v.dtype)
    for name, tensor in zip(("out", "last_state", "chunk_states", "residuals"), outputs, strict=True):
        members[name] = output(tensor)
    run("gated_delta_rule_forward", members, v.device)
    return outputs


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    inputs: DeltaRuleInputs,
    chunk_states: Tensor,
    residuals: Tensor,
    chunk: int,
) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    v = inputs.v
    batch, heads, d_v, time = v.shape
    held, shape = state_dtype(v.dtype), inputs.state_shape
    members = _members(inputs, chunk)
    members["chunk_states"] = (chunk_states.contiguous(), (chunk_count(inputs, chunk), *shape[1:]), held)
    members["residuals"] = (residuals.contiguous(), (batch, heads, time, d_v), held)
    members["grad_out"] = (grad_out, v.shape, v.dtype)
    members["grad_last_state"] = (grad_last_state, shape, held)
    gradients = backward_outputs(inputs)
    for name, gradient in zip(DeltaRuleInputs._fields[:DIFFERENTIABLE], gradients, strict=True):
        members[f"grad_{name}"] = output(gradient)
    run("gated_delta_rule_backward", members, v.device)
    return gradients
