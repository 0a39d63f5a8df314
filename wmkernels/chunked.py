"""Chunked recurrences in plain PyTorch.

Doubling (Hillis & Steele 1986) scans a chunk in log2(steps) rounds. It never divides by a cumulative product, so zero
decays are exact. Overflowing decay products give infinity or NaN; resets stop both.

The scan holds about six tensors of at most CHUNK_BYTES; the backward pass of a checkpointed chunk holds about
3 log2(steps). Under torch.func and torch.compile, chunks are not checkpointed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 << 20
MAX_STEPS = 256


def steps_per_chunk(step_bytes: int) -> int:
    """A power of two; ``step_bytes`` is the largest tensor's size per step."""
    return 1 << (max(1, min(MAX_STEPS, CHUNK_BYTES // max(1, step_bytes))).bit_length() - 1)


def affine_scan(decay: Tensor, inputs: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """h_t = decay_t h_{t-1} + inputs_t for every step.

    ``decay`` and ``inputs`` are (steps, ...), ``state`` (...). ``reset`` (bool, broadcast) cuts h_{t-1}.
    """
    steps = inputs.shape[0]
    if reset is not None:
        decay, state = decay.masked_fill(reset, 0), state.masked_fill(reset[0], 0)
    states = torch.cat([torch.addcmul(inputs[:1], decay[:1], state[None]), inputs[1:]])
    distance = 1
    while distance < steps:
        # Each step holds the product and state of its last ``distance`` steps.
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
    """``function(*arguments)``, checkpointed."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*arguments)
    if torch._C._functorch.maybe_current_level() is not None:
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
