"""Recurrences in plain PyTorch, by chunks of time.

Doubling (Hillis & Steele 1986) solves h_t = decay_t h_{t-1} + input_t within a chunk in log2(steps) rounds. Without
division by a cumulative product, exp(0) = 1 preserves a state exactly. Resets select, so NaN and infinity do not
cross. A decay product that overflows within a chunk gives infinity or NaN.

A chunk's tensors (steps, *state) take at most CHUNK_BYTES each; the scan holds about six. Backward recomputes one
chunk at a time, holding about 3 log2(steps), plus one saved state per chunk. torch.func does not support
checkpointing and torch.compile does not need it: there every chunk keeps its tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 << 20
MAX_STEPS = 256


def steps_per_chunk(step_bytes: int) -> int:
    """Steps per chunk, a power of two up to MAX_STEPS; ``step_bytes`` is the largest tensors' size per step."""
    return 1 << (max(1, min(MAX_STEPS, CHUNK_BYTES // max(1, step_bytes))).bit_length() - 1)


def affine_scan(decay: Tensor, inputs: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """Every h_t = decay_t h_{t-1} + inputs_t, time first.

    Args:
        decay: (steps, ...), at least one step.
        inputs: shaped as ``decay``.
        state: initial state, (...).
        reset: bool, broadcastable to (steps, ...), equal dimensions; cuts h_{t-1} from h_t.
    """
    steps = inputs.shape[0]
    if reset is not None:
        decay, state = decay.masked_fill(reset, 0), state.masked_fill(reset[0], 0)
    states = torch.cat([torch.addcmul(inputs[:1], decay[:1], state[None]), inputs[1:]])
    distance = 1
    while distance < steps:
        # Products and states of the ``distance`` steps up to t; a reset zeroes the product.
        later, earlier = decay[distance:], states[:-distance]
        if reset is not None:
            earlier = earlier.masked_fill(reset[distance:], 0)
        states = torch.cat([states[:distance], torch.addcmul(states[distance:], later, earlier)])
        if 2 * distance < steps:
            decay = torch.cat([decay[:distance], later * decay[:-distance]])
            if reset is not None:
                reset = torch.cat([reset[:distance], reset[distance:] | reset[:-distance]])
                decay = decay.masked_fill(reset, 0)
        distance *= 2
    return states


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, recomputed in backward."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*arguments)
    if torch._C._functorch.maybe_current_level() is not None:
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
