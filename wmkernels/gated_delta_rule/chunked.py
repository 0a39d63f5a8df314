"""The gated delta rule by chunks of steps, in plain PyTorch: the WY form (Yang et al. 2024, arXiv 2406.06484).

With the keys of a chunk as rows of K, D_ij = exp(gate_{j+1} + ... + gate_i) and d_i the decay since the chunk's start,
the corrections solve a triangular system, of which all chunks' inverses are computed at once:

    (I + L) U = diag(beta) (V - diag(d) K S),   L_ij = beta_i D_ij k_i · k_j  (j < i)

Then a loop over chunks passes the state S: U = U_0 - W S, Y = A U + diag(d) Q S, S = d_C S + K^T diag(D_C) U.

Sums of gates begin anew at every j: a difference of two long sums would lose precision, and be NaN for gates of -inf.

Chunks begin at resets where these can be read. Elsewhere, in torch.func and in a trace, the steps before a reset are
masked out of its chunk: NaN among them would cross it.

Zeros above a diagonal are selected, never products: keys of one step may overflow where the recurrence does not, and
zero times infinity is NaN. On a CPU, steps that are not finite are in chunks of their own. Elsewhere NaN may reach
earlier steps of its chunk, at least the gradients of q and k.
"""

import torch
from torch import Tensor

from wmkernels import chunked, time_chunks
from wmkernels.checks import no_autocast, state_dtype
from wmkernels.gated_delta_rule.meta import DeltaRuleInputs

MAX_CHUNK = 64


def gated_delta_rule_chunked(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor]:
    """(out, last_state)."""
    q, k, v, gate, beta, initial_state, reset, cu_seqlens, scale, _ = inputs
    dtype, time = state_dtype(v.dtype), v.shape[3]
    state = v.new_zeros(inputs.state_shape, dtype=dtype) if initial_state is None else initial_state
    if time == 0:
        return v.clone(), state.clone()
    steps = min(MAX_CHUNK, chunked.steps_per_chunk(1))
    timed = [x.movedim(-1, 1) for x in (q, k, v, gate[:, :, None], beta[:, :, None])]  # (batch, time, heads, size)
    chunks = time_chunks.cut("gated_delta_rule", timed, steps, reset, cu_seqlens)
    q, k, v, gate, beta = (chunks.gather(x.to(dtype)) for x in timed)
    with no_autocast(q.device):
        out, state = _scan(q, k, v, gate, beta, chunks.reset, scale, state)
    return chunks.scatter(out).permute(0, 2, 3, 1).to(inputs.v.dtype), state


def _scan(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, reset: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, last state); inputs (sequences, heads, chunks, steps, size)."""
    steps = q.shape[3]
    later = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril(-1)  # j < i
    # [i, j]: the sum of the gates after step j up to i
    since_step = torch.where(later, gate, 0).cumsum(-2).masked_fill(later.mT, -torch.inf)
    since_start = gate.cumsum(-2)
    if reset is not None:
        episode = reset[:, None].long().cumsum(-1)  # (sequences, 1, chunks, steps)
        since_step = since_step.masked_fill(episode[..., :, None] != episode[..., None, :], -torch.inf)
        since_start = since_start.masked_fill(episode[..., None] > 0, -torch.inf)
    between, decay = since_step.exp(), since_start.exp()
    kept = decay[..., -1:, :]  # (sequences, heads, chunks, 1, 1): of the state over the whole chunk
    lower = beta * between * (k @ k.mT).tril(-1)
    right = torch.cat([beta * v, beta * decay * k], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    corrections, erased = solved.split([v.shape[-1], k.shape[-1]], -1)
    attention = scale * between * (q @ k.mT).tril()
    queries = scale * decay * q
    keys = (between[..., -1, :, None] * k).mT
    outputs = []
    for chunk in range(q.shape[2]):
        if reset is not None:
            state = state.masked_fill(reset[:, chunk, :1, None, None], 0)
        u = corrections[:, :, chunk] - erased[:, :, chunk] @ state
        outputs.append(time_chunks.causal_product(attention[:, :, chunk], u) + queries[:, :, chunk] @ state)
        state = kept[:, :, chunk] * state + keys[:, :, chunk] @ u
    return torch.stack(outputs, 2), state
