"""The SSD scan by chunks of steps, in plain PyTorch (Dao & Gu 2024, arXiv 2405.21060, section 6).

Within a chunk, outputs are products of matrices: with D_ij = exp(gate_{j+1} + ... + gate_i), d_i the decay since the
chunk's start and S the state there,

    Y = (tril(C B^T) D diag(weight)) X + diag(d) C S^T,   S <- d_last S + X^T diag(D_last weight) B

A loop over chunks passes the state. Each chunk is checkpointed: the backward pass computes it again.

Sums of gates begin anew at every j: a difference of two long sums would lose precision, and be NaN for gates of -inf.
Zeros above a diagonal are selected, never products: zero times infinity is NaN.

Chunks begin at resets where these can be read. Elsewhere, in torch.func and in a trace, the steps before a reset are
masked out of its chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels import chunked, time_chunks
from wmkernels.checks import no_autocast, state_dtype
from wmkernels.ssd_scan.meta import CHUNK, SSDInputs


def ssd_scan_chunked(inputs: SSDInputs, chunk: int | None) -> tuple[Tensor, Tensor]:
    """(out, last_state); time is at least 1. ``chunk`` None: chosen."""
    x, gate, weight, B, C, own_weight, D, z, state, reset, cu_seqlens = inputs
    dtype = state_dtype(x.dtype)
    steps = chunk or min(CHUNK, chunked.steps_per_chunk(1))
    scalars = [None if v is None else v[..., None] for v in (gate, weight, own_weight)]
    timed = (x, B, C, *scalars)
    # z as well: gradients of the output are not finite where it is not
    chunks = time_chunks.cut("ssd_scan", (*timed, z), min(steps, x.shape[1]), reset, cu_seqlens)
    cut = [None if v is None else chunks.gather(v.to(dtype)) for v in timed]
    outputs = []
    with no_autocast(x.device):
        for index in range(cut[0].shape[2]):  # type: ignore[union-attr]
            own = [None if v is None else v[:, :, index] for v in cut]
            flags = None if chunks.reset is None else chunks.reset[:, index]
            y, state = chunked.recomputed(_chunk, *own, flags, state)
            outputs.append(y)
        assert state is not None
        out = chunks.scatter(torch.stack(outputs, 2))
        if D is not None:
            out = out + D * x.to(dtype)
        if z is not None:
            out = out * F.silu(z.to(dtype))
    return out.to(x.dtype), state


def _chunk(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    gate: Tensor,
    weight: Tensor,
    own_weight: Tensor | None,
    reset: Tensor | None,
    state: Tensor | None,
) -> Any:
    """(outputs, state after them); inputs (sequences, heads or groups, steps, size), reset (sequences, steps).

    Where no state is before the steps, products of decays may overflow: they are multiplied with nothing.
    """
    steps, heads = x.shape[2], x.shape[1]
    ones = torch.ones(steps, steps, dtype=torch.bool, device=x.device)
    seen = ones.tril()  # [i, j]: j <= i
    since_step = torch.where(ones.tril(-1), gate, 0).cumsum(-2)
    since_start = gate.cumsum(-2)  # (sequences, heads, steps, 1)
    alive = None
    if reset is not None:
        episode = reset[:, None].long().cumsum(-1)  # (sequences, 1, steps)
        seen = seen & (episode[..., :, None] == episode[..., None, :])
        since_start = since_start.masked_fill(episode[..., None] > 0, -torch.inf)
        alive = episode == episode[..., -1:]  # (sequences, 1, steps): in the last state
    between = since_step.masked_fill(~seen, -torch.inf).exp()
    scores = (C @ B.mT).masked_fill(~seen, 0).repeat_interleave(heads // B.shape[1], 1)
    weights = weight.mT.expand(*weight.shape[:2], steps, steps)
    if own_weight is not None:
        weights = torch.where(torch.eye(steps, dtype=torch.bool, device=x.device), own_weight.mT, weights)
    lower = scores * between * weights.masked_fill(~seen, 0)
    B, C = (v.repeat_interleave(heads // v.shape[1], 1) for v in (B, C))
    y = time_chunks.causal_product(lower, x)
    entering = between[..., -1, :, None] * weight * x
    if alive is not None:
        entering, B = (v.masked_fill(~alive[..., None], 0) for v in (entering, B))
    if state is not None:
        kept = since_start[..., -1:, :].exp() * state
        if reset is not None:
            # C, too: its gradient must not be zero times what is not finite before the reset
            dropped = (episode > 0)[..., None]
            C = C.masked_fill(dropped, 0)
            kept = kept.masked_fill(dropped[..., -1:, :], 0)
        old = since_start.exp() * (C @ state.mT)
        y = y + (old if reset is None else old.masked_fill(dropped, 0))
    after = entering.mT @ B
    return y, after if state is None else kept + after
