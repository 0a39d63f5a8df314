"""Recurrences in plain PyTorch, in chunks of time: what runs where no kernel may be chosen.

Within a chunk, h_t = decay_t h_{t-1} + input_t is solved by doubling (Hillis & Steele 1986): log2(steps) rounds of
operations on whole tensors. A loop over chunks carries the state. Nothing is divided by a cumulative product, so
exp(0) = 1 keeps a state bit for bit. A reset selects: decays and states before it are replaced by zeros before they are
multiplied, so NaN and infinity cross it neither forward nor backward. Decays above 1 whose product overflows within a
chunk give infinity or NaN.

Memory: a chunk materialises decays, inputs and states, each (steps, *state), and the number of steps is chosen so that
one of them takes at most CHUNK_BYTES; the scan holds about six at a time. For gradients a chunk is recomputed in the
backward pass, which then holds about 3 log2(steps) of them for one chunk; over the whole sequence one state per chunk
is kept. Checkpointing works neither under torch.func's transforms nor is it needed under torch.compile, so there every
chunk keeps its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 32 << 20
MAX_STEPS = 256


def steps_per_chunk(step_bytes: int) -> int:
    """Steps of a chunk whose largest tensors have ``step_bytes`` per step: a power of two from 1 to MAX_STEPS."""
    return 1 << (max(1, min(MAX_STEPS, CHUNK_BYTES // max(1, step_bytes))).bit_length() - 1)


def affine_scan(decay: Tensor, inputs: Tensor, state: Tensor, reset: Tensor | None) -> Tensor:
    """Every h_t = decay_t h_{t-1} + inputs_t, with time in dimension 0.

    Args:
        decay: (steps, ...), as ``inputs``; at least one step.
        inputs: what is added.
        state: (...), before the first step.
        reset: bool, broadcastable to (steps, ...) and with as many dimensions; h_{t-1} does not reach h_t.
    """
    steps = inputs.shape[0]
    if reset is not None:
        decay, state = decay.masked_fill(reset, 0), state.masked_fill(reset[0], 0)
    states = torch.cat([torch.addcmul(inputs[:1], decay[:1], state[None]), inputs[1:]])
    distance = 1
    while distance < steps:
        # decay_t and states_t stand for the ``distance`` steps up to t; a decay of a range with a reset is zero.
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
    """``function(*arguments)``, computed again in the backward pass instead of keeping its intermediate results."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*arguments)
    if torch._C._functorch.maybe_current_level() is not None:
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
