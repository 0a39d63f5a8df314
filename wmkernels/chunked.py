"""Chunked recurrences in plain PyTorch.

Doubling (Hillis & Steele 1986) scans a chunk in log2(steps) rounds. It never divides by a cumulative product, so zero
decays are exact. A chunk whose decay products may overflow runs step by step. Reading that takes one pass over the
decays, on a CPU; on a GPU, in torch.func and in a trace it is not read, and a state of zero times an overflowed product
is NaN until the next reset.

The scan holds about six tensors of at most CHUNK_BYTES; the backward pass of a checkpointed chunk holds about
3 log2(steps). Under torch.func, forward_ad, torch.compile and tracers, chunks are not checkpointed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wmkernels.modes import can_checkpoint, can_read_values

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
    if _products_may_overflow(decay):
        return _step_by_step(decay, inputs, state, reset)
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


def _products_may_overflow(decay: Tensor) -> bool:
    """Whether the product of the steps' finite magnitudes does; false where values cannot be read.

    Infinity and NaN do not change a chunk's rounding: nothing of them crosses a reset.
    """
    if decay.numel() == 0 or not can_read_values(decay):
        return False
    low, high = (x.item() for x in torch.aminmax(decay.detach()))
    largest, limit = max(-low, high), math.log(torch.finfo(decay.dtype).max)
    if math.isfinite(largest) and decay.shape[0] * math.log(max(largest, 1.0)) < limit:
        return False
    magnitudes = decay.detach().abs().clamp(min=1).nan_to_num(1.0, 1.0)
    return not magnitudes.log().sum(0).max().item() < limit


def _step_by_step(decay: Tensor, inputs: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    states = []
    for t, (decay_t, inputs_t) in enumerate(zip(decay, inputs, strict=True)):
        if reset is not None:
            decay_t, state = (x.masked_fill(reset[t], 0) for x in (decay_t, state))
        state = torch.addcmul(inputs_t, decay_t, state)
        states.append(state)
    return torch.stack(states)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``, checkpointed."""
    if not torch.is_grad_enabled() or not can_checkpoint():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
