"""The gated delta rule in Triton: step by step, with the state in registers.

A program holds up to 4,096 numbers of a head's state, d_k keys of some of its values, and reads each input once: a step
is bound by latency. Values do not depend on each other; gradients of what they share are summed over programs. The
backward pass runs each chunk again from its saved state with the saved residuals, writes the states before its steps to
scratch memory, which stays in the L2 cache, and reads them in reverse.
"""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.gated_delta_rule.meta import CHUNK, DeltaRuleInputs, backward_outputs, forward_outputs

STATE_BYTES, BYTES_PER_WARP = 16384, 2048  # of a program and of a warp


@triton.jit
def sequence_of(cu_seqlens, head_program, heads, time, chunk):
    """(sequence, batch row, head, begin, end, first row of chunk_states)."""
    sequence, head = head_program // heads, head_program % heads
    if cu_seqlens is None:
        row, begin, end = sequence, time * 0, time
        chunk_row = sequence * tl.cdiv(time, chunk)
    else:
        row, begin, end = sequence * 0, tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
        chunk_row = begin // chunk + sequence
    return sequence, row, head, begin, end, chunk_row


@triton.jit
def vector_at(x, strides, row, head, index, t):
    return x + row * strides[0] + head * strides[1] + index * strides[2] + t * strides[3]


@triton.jit
def scalar_at(x, strides, row, head, t):
    return x + row * strides[0] + head * strides[1] + t * strides[2]


@triton.jit
def forward_kernel(
    q,  # (batch, heads, d_k, time)
    k,  # as q
    v,  # (batch, heads, d_v, time)
    gate,  # (batch, heads, time)
    beta,  # as gate
    initial_state,  # (sequences, heads, d_k, d_v) or None
    reset,  # (batch, time) bytes or None
    cu_seqlens,  # (sequences + 1,) or None
    out,  # as v
    last_state,  # (sequences, heads, d_k, d_v)
    chunk_states,  # (rows, heads, d_k, d_v) or None
    residuals,  # (batch, heads, time, d_v) or None
    q_strides,
    k_strides,
    v_strides,
    gate_strides,
    beta_strides,
    initial_strides,
    reset_strides,
    out_strides,
    heads,
    d_k,
    d_v,
    time,
    chunk,
    blocks,
    SCALE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    dtype: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head_program, block = program // blocks, (program % blocks).to(tl.int32)
    sequence, row, head, begin, end, chunk_row = sequence_of(cu_seqlens, head_program, heads, time, chunk)
    i, j = tl.arange(0, KEYS), block * VALUES + tl.arange(0, VALUES)
    in_k, in_v = i < d_k, j < d_v
    in_state = in_k[:, None] & in_v[None, :]
    flat = i[:, None] * d_v + j[None, :]
    state = tl.zeros([KEYS, VALUES], dtype)
    if initial_state is not None:
        first = initial_state + sequence * initial_strides[0] + head * initial_strides[1]
        first += i[:, None] * initial_strides[2] + j[None, :] * initial_strides[3]
        state = tl.load(first, mask=in_state, other=0.0)
    for t in range(begin, end):
        if chunk_states is not None:  # noqa: SIM102 (one is known when compiled)
            if (t - begin) % chunk == 0:
                kept = chunk_states + ((chunk_row + (t - begin) // chunk) * heads + head) * d_k * d_v
                tl.store(kept + flat, state, mask=in_state)
        k_t = tl.load(vector_at(k, k_strides, row, head, i, t), mask=in_k, other=0.0).to(dtype)
        q_t = tl.load(vector_at(q, q_strides, row, head, i, t), mask=in_k, other=0.0).to(dtype)
        v_t = tl.load(vector_at(v, v_strides, row, head, j, t), mask=in_v, other=0.0).to(dtype)
        decay = tl.exp(tl.load(scalar_at(gate, gate_strides, row, head, t)))
        if reset is not None:
            resets = tl.load(reset + row * reset_strides[0] + t * reset_strides[1]) != 0
            state = tl.where(resets, 0.0, state)
            decay = tl.where(resets, 0.0, decay)
        state = decay * state
        residual = v_t - tl.sum(state * k_t[:, None], 0)
        u_t = tl.load(scalar_at(beta, beta_strides, row, head, t)) * residual
        state += k_t[:, None] * u_t[None, :]
        y_t = SCALE * tl.sum(state * q_t[:, None], 0)
        tl.store(vector_at(out, out_strides, row, head, j, t), y_t.to(out.dtype.element_ty), mask=in_v)
        if residuals is not None:
            tl.store(residuals + ((row * heads + head) * time + t) * d_v + j, residual, mask=in_v)
    tl.store(last_state + head_program * d_k * d_v + flat, state, mask=in_state)


@triton.jit
def backward_kernel(
    q,  # (batch, heads, d_k, time)
    k,  # as q
    gate,  # (batch, heads, time)
    beta,  # as gate
    reset,  # (batch, time) bytes or None
    cu_seqlens,  # (sequences + 1,) or None
    chunk_states,  # (rows, heads, d_k, d_v)
    residuals,  # (batch, heads, time, d_v)
    grad_out,  # (batch, heads, d_v, time)
    grad_last_state,  # (sequences, heads, d_k, d_v) or None
    grad_q,  # (blocks, batch, heads, d_k, time), as all but grad_v partial
    grad_k,
    grad_v,
    grad_gate,  # (blocks, batch, heads, time)
    grad_beta,
    grad_initial_state,  # (sequences, heads, d_k, d_v) or None
    scratch,  # (programs, chunk, d_k, VALUES): the states before the steps of a chunk
    q_strides,
    k_strides,
    gate_strides,
    beta_strides,
    reset_strides,
    grad_out_strides,
    grad_last_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    grad_gate_strides,
    grad_beta_strides,
    q_block,  # strides from block to block
    gate_block,
    heads,
    d_k,
    d_v,
    time,
    chunk,
    blocks,
    SCALE: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    dtype: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head_program, block = program // blocks, (program % blocks).to(tl.int32)
    sequence, row, head, begin, end, chunk_row = sequence_of(cu_seqlens, head_program, heads, time, chunk)
    i, j = tl.arange(0, KEYS), block * VALUES + tl.arange(0, VALUES)
    in_k, in_v = i < d_k, j < d_v
    in_state = in_k[:, None] & in_v[None, :]
    flat = i[:, None] * d_v + j[None, :]
    own = scratch + program * chunk * d_k * VALUES + i[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    grad_q += block * q_block
    grad_k += block * q_block
    grad_gate += block * gate_block
    grad_beta += block * gate_block
    d_state = tl.zeros([KEYS, VALUES], dtype)
    if grad_last_state is not None:
        last = grad_last_state + sequence * grad_last_strides[0] + head * grad_last_strides[1]
        last += i[:, None] * grad_last_strides[2] + j[None, :] * grad_last_strides[3]
        d_state = tl.load(last, mask=in_state, other=0.0)
    chunks = tl.cdiv(end - begin, chunk)
    for done in range(0, chunks):
        index = chunks - 1 - done
        first = begin + index * chunk
        steps = tl.minimum(chunk, end - first)
        state = tl.load(
            chunk_states + ((chunk_row + index) * heads + head) * d_k * d_v + flat, mask=in_state, other=0.0
        )
        for step in range(0, steps):
            t = first + step
            k_t = tl.load(vector_at(k, k_strides, row, head, i, t), mask=in_k, other=0.0).to(dtype)
            residual = tl.load(residuals + ((row * heads + head) * time + t) * d_v + j, mask=in_v, other=0.0)
            u_t = tl.load(scalar_at(beta, beta_strides, row, head, t)) * residual
            decay = tl.exp(tl.load(scalar_at(gate, gate_strides, row, head, t)))
            if reset is not None:
                resets = tl.load(reset + row * reset_strides[0] + t * reset_strides[1]) != 0
                state = tl.where(resets, 0.0, state)
                decay = tl.where(resets, 0.0, decay)
            tl.store(own + step * d_k * VALUES, state, mask=in_state)
            state = decay * state + k_t[:, None] * u_t[None, :]
        tl.debug_barrier()
        for back in range(0, steps):
            step = steps - 1 - back
            t = first + step
            k_t = tl.load(vector_at(k, k_strides, row, head, i, t), mask=in_k, other=0.0).to(dtype)
            q_t = SCALE * tl.load(vector_at(q, q_strides, row, head, i, t), mask=in_k, other=0.0).to(dtype)
            dy_t = tl.load(vector_at(grad_out, grad_out_strides, row, head, j, t), mask=in_v, other=0.0).to(dtype)
            residual = tl.load(residuals + ((row * heads + head) * time + t) * d_v + j, mask=in_v, other=0.0)
            beta_t = tl.load(scalar_at(beta, beta_strides, row, head, t))
            decay = tl.exp(tl.load(scalar_at(gate, gate_strides, row, head, t)))
            resets = False
            if reset is not None:
                resets = tl.load(reset + row * reset_strides[0] + t * reset_strides[1]) != 0
                decay = tl.where(resets, 0.0, decay)
            decayed = decay * tl.load(own + step * d_k * VALUES, mask=in_state, other=0.0)
            u_t = beta_t * residual
            dq = SCALE * tl.sum((decayed + k_t[:, None] * u_t[None, :]) * dy_t[None, :], 1)
            d_state += q_t[:, None] * dy_t[None, :]
            du = tl.sum(d_state * k_t[:, None], 0)
            w = beta_t * du
            dk = tl.sum(d_state * u_t[None, :], 1) - tl.sum(decayed * w[None, :], 1)
            d_state -= k_t[:, None] * w[None, :]
            d_gate = tl.sum(tl.sum(decayed * d_state, 1), 0)
            d_state = decay * d_state
            if reset is not None:
                d_gate = tl.where(resets, 0.0, d_gate)
                d_state = tl.where(resets, 0.0, d_state)
            tl.store(vector_at(grad_q, grad_q_strides, row, head, i, t), dq.to(grad_q.dtype.element_ty), mask=in_k)
            tl.store(vector_at(grad_k, grad_k_strides, row, head, i, t), dk.to(grad_k.dtype.element_ty), mask=in_k)
            tl.store(vector_at(grad_v, grad_v_strides, row, head, j, t), w.to(grad_v.dtype.element_ty), mask=in_v)
            tl.store(scalar_at(grad_gate, grad_gate_strides, row, head, t), d_gate)
            tl.store(scalar_at(grad_beta, grad_beta_strides, row, head, t), tl.sum(du * residual, 0))
        tl.debug_barrier()
    if grad_initial_state is not None:
        tl.store(grad_initial_state + head_program * d_k * d_v + flat, d_state, mask=in_state)


def _tile(inputs: DeltaRuleInputs) -> tuple[int, int, int]:
    """(keys, values) of a program, and programs per head."""
    width = 8 if inputs.q.dtype == torch.float64 else 4
    keys, values = (runtime.next_power_of_2(x.shape[2]) for x in (inputs.q, inputs.v))
    values = max(1, min(values, STATE_BYTES // (width * keys)))
    return keys, values, runtime.ceil_div(inputs.v.shape[2], values)


def _launch(kernel, inputs: DeltaRuleInputs, chunk: int, *arguments) -> None:
    _, heads, d_k, time = inputs.q.shape
    keys, values, blocks = _tile(inputs)
    wide = inputs.q.dtype == torch.float64
    with runtime.on_device(inputs.q):
        runtime.launch(
            kernel,
            inputs.sequences * heads * blocks,
            *arguments,
            *(heads, d_k, inputs.v.shape[2], time, chunk, blocks),
            SCALE=inputs.scale,
            KEYS=keys,
            VALUES=values,
            dtype=tl.float64 if wide else tl.float32,
            num_warps=max(1, keys * values * (8 if wide else 4) // BYTES_PER_WARP),
        )


def forward(inputs: DeltaRuleInputs, chunk: int) -> tuple[Tensor, ...]:
    """As ``meta.forward_outputs``."""
    q, k, v, gate, beta, initial_state, reset, cu_seqlens = inputs[:8]
    out, last_state, chunk_states, residuals = outputs = forward_outputs(inputs, chunk)
    reset, cu_seqlens = runtime.as_bytes(reset), None if cu_seqlens is None else cu_seqlens.contiguous()
    kept = (chunk_states, residuals) if chunk else (None, None)
    tensors = (q, k, v, gate, beta, initial_state, reset, cu_seqlens, out, last_state, *kept)
    dimensions = zip((q, k, v, gate, beta, initial_state, reset, out), (4, 4, 4, 3, 3, 4, 2, 4), strict=True)
    strides = [runtime.strides(x, n) for x, n in dimensions]
    _launch(forward_kernel, inputs, chunk or CHUNK, *tensors, *strides)
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
    q, k, _, gate, beta, initial_state, reset, cu_seqlens = inputs[:8]
    _, values, blocks = _tile(inputs)
    gradients = backward_outputs(inputs)
    grad_q, grad_k, grad_v, grad_gate, grad_beta, grad_initial_state = gradients
    shared = grad_q, grad_k, grad_gate, grad_beta
    partial = [x[None] if blocks == 1 else gate.new_empty((blocks, *x.shape)) for x in shared]
    given_q, given_k, given_gate, given_beta = (x[0] for x in partial)
    reset, cu_seqlens = runtime.as_bytes(reset), None if cu_seqlens is None else cu_seqlens.contiguous()
    kept = (chunk_states.contiguous(), residuals.contiguous())
    scratch = gate.new_empty((inputs.sequences * q.shape[1] * blocks, chunk, q.shape[2], values))
    written = (given_q, given_k, grad_v, given_gate, given_beta)
    initial = None if initial_state is None else grad_initial_state
    tensors = (q, k, gate, beta, reset, cu_seqlens, *kept, grad_out, grad_last_state, *written, initial, scratch)
    strided = (q, k, gate, beta, reset, grad_out, grad_last_state, *written)
    dimensions = zip(strided, (4, 4, 3, 3, 2, 4, 4, 4, 4, 4, 3, 3), strict=True)
    strides = [runtime.strides(x, n) for x, n in dimensions]
    _launch(backward_kernel, inputs, chunk, *tensors, *strides, q.numel(), gate.numel())
    if blocks > 1:
        for gradient, parts in zip(shared, partial, strict=True):
            gradient.copy_(parts.sum(0))
    return gradients
