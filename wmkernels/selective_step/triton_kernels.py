"""Selective step in Triton: small programs, since rollouts are launch-bound."""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.selective_step.meta import StepInputs
from wmkernels.triton_device import exponential, sigmoid, softplus

STATES_PER_PROGRAM = 512


@triton.jit
def step_kernel(
    state_in,  # (states, channels, state)
    state_out,  # as state_in, same or disjoint memory
    states,  # number of rows
    u,  # inputs as in StepInputs, reset in bytes
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    reset,
    indices,  # (batch,) or None; outside the states: state unchanged, out = 0
    out,  # (batch, channels)
    in_strides,
    out_state_strides,
    u_strides,
    delta_strides,
    A_strides,
    B_strides,
    C_strides,
    D_stride,
    z_strides,
    bias_stride,
    reset_stride,
    index_stride,
    out_strides,
    state,
    group_channels,
    group_tiles,
    tiles,
    SOFTPLUS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    dtype: tl.constexpr = A.dtype.element_ty
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles).to(tl.int64)
    group = (tile // group_tiles).to(tl.int64)
    local = (tile % group_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    d_in = local < group_channels
    d = group * group_channels + local
    n = tl.arange(0, STATES).to(tl.int64)
    row = b
    if indices is not None:
        row = tl.load(indices + b * index_stride)
    rows = row + d * 0
    row_in = (rows >= 0) & (rows < states)
    state_in_range = (d_in & row_in)[:, None] & (n < state)[None, :]
    n_in = n < state

    step = tl.load(delta + b * delta_strides[0] + d * delta_strides[1], mask=d_in, other=0.0).to(dtype)
    if delta_bias is not None:
        step += tl.load(delta_bias + d * bias_stride, mask=d_in, other=0.0)
    if SOFTPLUS:
        step = softplus(step)
    u_t = tl.load(u + b * u_strides[0] + d * u_strides[1], mask=d_in, other=0.0).to(dtype)
    in_tile = row * in_strides[0] + d[:, None] * in_strides[1] + n[None, :] * in_strides[2]
    h = tl.load(state_in + in_tile, mask=state_in_range, other=0.0).to(dtype)
    rate = tl.load(A + d[:, None] * A_strides[0] + n[None, :] * A_strides[1], mask=state_in_range, other=0.0)
    decayed = exponential(step[:, None] * rate) * h
    if reset is not None:
        is_reset = tl.load(reset + b * reset_stride + d * 0)[:, None] != 0
        decayed = tl.where(is_reset, 0.0, decayed)
    B_t = tl.load(B + b * B_strides[0] + group * B_strides[1] + n * B_strides[2], mask=n_in, other=0.0).to(dtype)
    C_t = tl.load(C + b * C_strides[0] + group * C_strides[1] + n * C_strides[2], mask=n_in, other=0.0).to(dtype)
    h = decayed + (step * u_t)[:, None] * B_t[None, :]
    out_tile = row * out_state_strides[0] + d[:, None] * out_state_strides[1] + n[None, :] * out_state_strides[2]
    tl.store(state_out + out_tile, h.to(state_out.dtype.element_ty), mask=state_in_range)
    y = tl.sum(h * C_t[None, :], 1)
    if D is not None:
        y += tl.load(D + d * D_stride, mask=d_in, other=0.0) * u_t
    if z is not None:
        z_t = tl.load(z + b * z_strides[0] + d * z_strides[1], mask=d_in, other=0.0).to(dtype)
        y *= z_t * sigmoid(z_t)
    if indices is not None:
        y = tl.where(row_in, y, 0.0)
    tl.store(out + b * out_strides[0] + d * out_strides[1], y.to(out.dtype.element_ty), mask=d_in)


def step(inputs: StepInputs, state_out: Tensor, indices: Tensor | None) -> Tensor:
    """As ``native.step``."""
    state_in, u, delta, A, B, C, D, z, delta_bias, reset, delta_softplus = inputs
    batch, channels = u.shape
    state = state_in.shape[2]
    groups = B.shape[1]
    out = torch.empty((batch, channels), dtype=u.dtype, device=u.device)
    reset = runtime.as_bytes(reset)
    states_tile = runtime.next_power_of_2(state)
    group_channels = channels // groups
    channels_tile = min(max(1, STATES_PER_PROGRAM // states_tile), runtime.next_power_of_2(group_channels))
    group_tiles = runtime.ceil_div(group_channels, channels_tile)
    tiles = groups * group_tiles
    with runtime.on_device(u):
        runtime.launch(
            step_kernel,
            tiles * batch,
            *(state_in, state_out, state_in.shape[0], u, delta, A, B, C, D, z, delta_bias, reset, indices, out),
            runtime.strides(state_in, 3),
            runtime.strides(state_out, 3),
            runtime.strides(u, 2),
            runtime.strides(delta, 2),
            runtime.strides(A, 2),
            runtime.strides(B, 3),
            runtime.strides(C, 3),
            *runtime.strides(D, 1),
            runtime.strides(z, 2),
            *runtime.strides(delta_bias, 1),
            *runtime.strides(reset, 1),
            *runtime.strides(indices, 1),
            runtime.strides(out, 2),
            state,
            group_channels,
            group_tiles,
            tiles,
            SOFTPLUS=delta_softplus,
            CHANNELS=channels_tile,
            STATES=states_tile,
            num_warps=max(1, min(4, channels_tile * states_tile // 128)),
        )
    return out
