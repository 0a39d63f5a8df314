"""The public place memory."""

import torch
from torch import Tensor

from wmkernels.checks import Signature
from wmkernels.dispatch import choose
from wmkernels.modes import needs_autograd, requires_pytorch
from wmkernels.place_memory.autograd import OP, PlaceMemoryFunction
from wmkernels.place_memory.chunked import place_memory_chunked
from wmkernels.place_memory.reference import place_memory_reference
from wmkernels.place_memory.validation import canonical
from wmkernels.registration import differentiably


def place_memory(
    values: Tensor,
    phase: Tensor,
    keys: Tensor,
    inverse: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    initial_phase: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A map of places, written and read each step through keys that turn with the observer; differentiable.

    Step t writes ``values[:, t]`` at the phase of the step before, then reads at ``phase[:, t]``: ``reference.py`` has
    the equations, ``nn.PlaceMemory`` makes keys and phases from positions.

    Args:
        values: (batch, time, places, channels), any strides; float32, float64, bfloat16 or float16. The others may have
            any of these dtypes that float32 (float64 for float64) holds, in which all arithmetic is.
        phase: (batch, time, groups, 2 * frequencies), cosines before sines of the angle after the move of each step.
            Group g turns channels ``g * channels / groups`` to ``(g + 1) * channels / groups - 1``.
        keys: (places, 2 * frequencies), cosines before sines at angle zero.
        inverse: (places, places), of ``keys @ keys.T``: a delta write, which replaces what a place holds. None: an
            additive write.
        gate: (batch, time, places, groups), what part of a write is done. Under a gate of 0 everywhere, the state stays
            bit for bit; values must be finite there, too.
        initial_state: (batch, groups, 2 * frequencies, channels / groups), or (sequences, ...) with ``cu_seqlens``;
            zeros if None.
        initial_phase: (batch, groups, 2 * frequencies), or (sequences, ...): of the first write; angle zero if None.
        reset: bool (batch, time); true empties the map before that step, NaN included, whose write has angle zero.
        cu_seqlens: as for ``selective_scan``.
        return_last_state: also return the last state.
        backend: as for ``selective_scan``.

    Returns:
        What the map holds at the places after each move, as ``values``; with ``return_last_state`` also the last state,
        as ``initial_state``, float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device, backend or cu_seqlens.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> keys = torch.eye(2, 4)  # two places, two frequencies
        >>> phase = torch.tensor([1.0, 1, 0, 0]).expand(1, 3, 1, 4)  # stands still
        >>> wmkernels.place_memory(torch.ones(1, 3, 2, 1), phase, keys, torch.eye(2)).flatten()
        tensor([1., 1., 1., 1., 1., 1.])
        >>> wmkernels.place_memory(torch.ones(1, 3, 2, 1), phase, keys).flatten()
        tensor([1., 1., 2., 2., 3., 3.])
    """
    _SIGNATURE.require(
        values,
        phase,
        keys,
        inverse,
        gate,
        initial_state,
        initial_phase,
        reset,
        cu_seqlens,
        return_last_state,
        backend,
    )
    inputs = canonical(values, phase, keys, inverse, gate, initial_state, initial_phase, reset, cu_seqlens)
    chosen = choose(OP, values.device, backend, pytorch_for=requires_pytorch(inputs.differentiable))
    if chosen == "reference":
        out, last_state = place_memory_reference(inputs)
    elif chosen == "chunked":
        out, last_state = place_memory_chunked(inputs)
    elif needs_autograd(inputs.differentiable):
        out, last_state, _ = differentiably(PlaceMemoryFunction, *inputs, True, chosen)
    else:
        out, last_state, _ = torch.ops.wmkernels.place_memory_forward(*inputs, False, chosen)
    return (out, last_state) if return_last_state else out


_SIGNATURE = Signature(place_memory)
