"""Arguments of the papers as gates and weights of one recurrence, differentiable.

The trapezoid's two terms per step are one: step j enters h_j with trapezoid_j step_j, and every later state with
(1 - trapezoid_{j+1}) step_{j+1} more, both times the decays in between. Likewise the initial state takes up the step
before it. What remains is a weight per step, and another for the step's own output.

A turned state is an unturned one of turned B and C: each head then has its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import state_dtype
from wmkernels.linear_scan.function import linear_scan
from wmkernels.modes import can_read_values
from wmkernels.ssd_scan.meta import SSDArguments, SSDInputs, SSDState
from wmkernels.ssd_scan.reference import within_a_turn


class _Sequences(NamedTuple):
    """Where sequences begin and end in time."""

    of_step: Tensor  # (time,): the sequence of a step
    is_first: Tensor  # (time,) bool
    first: Tensor  # (sequences,): its first step, and its last one, of a sequence with steps
    last: Tensor
    has_steps: Tensor  # (sequences,) bool


def canonical_form(arguments: SSDArguments, backend: str | None) -> tuple[SSDInputs, Tensor | None]:
    """(inputs, phases (batch, time, heads, pairs) in float64 or None); time is at least 1. ``backend`` sums angles."""
    x, dt, _, B, C, D, z, dt_bias, angle, trapezoid, state = arguments[:11]
    reset, cu_seqlens = arguments.reset, arguments.cu_seqlens
    for name, value in zip(arguments._fields[:16], arguments[:16], strict=True):
        if value is not None and can_read_values(value) and value.numel() and not value.untyped_storage().nbytes():
            # PyTorch's operators would read it
            raise ValueError(f"ssd_scan: the memory of {name} was freed: its storage has no bytes")
    step = dt if dt_bias is None else dt + dt_bias  # (batch, time, heads)
    if arguments.dt_softplus:
        step = F.softplus(step)
    step = step.clamp(*arguments.dt_limit)
    gate = _gate(arguments, step)
    if arguments.is_plain:
        return SSDInputs(x, gate, step, B, C, None, D, z, state, reset, cu_seqlens), None
    sequences = _sequences(arguments)
    weight, own_weight = step, None
    phases, first_B = None, arguments.previous_B
    if angle is not None:
        phases = _phases(arguments, step, sequences, backend)
        dtype = state_dtype(x.dtype)
        x, z, B, C = (None if v is None else v.to(dtype) for v in (x, z, B, C))  # type: ignore[assignment]
        B, C = turned(B, phases), turned(C, phases)
        if first_B is not None and arguments.phase is not None:
            first_B = turned(first_B, arguments.phase)
    if trapezoid is not None:
        own_weight = trapezoid * step
        earlier = (1 - trapezoid) * step
        later = F.pad(earlier[:, 1:], (0, 0, 0, 1))
        weight = own_weight + later.masked_fill(_next_begins(arguments, sequences)[..., None], 0)
        if arguments.previous_x is not None and first_B is not None:
            state = _with_previous(arguments, state, earlier, first_B, sequences)
    return SSDInputs(x, gate, weight, B, C, own_weight, D, z, state, reset, cu_seqlens), phases


def _gate(arguments: SSDArguments, step: Tensor) -> Tensor:
    """The decay's exponent, zero where a step decays nothing: products with an infinite A have no gradient there."""
    A, reset = arguments.A, arguments.reset
    dropped = None if reset is None else reset[..., None]
    starts = arguments.initial_state is None
    if starts and arguments.cu_seqlens is not None:
        first = _sequences(arguments).is_first[None, :, None]
        dropped = first if dropped is None else dropped | first
    elif starts:
        step, A = step[:, 1:], A if A.dim() == 1 else A[:, 1:]
        dropped = None if dropped is None else dropped[:, 1:]
    if dropped is not None:
        step, A = torch.where(dropped, 0, step), torch.where(dropped, 0, A)
    return F.pad(step * A, (0, 0, 1, 0)) if starts and arguments.cu_seqlens is None else step * A


def last_state(arguments: SSDArguments, state: Tensor, phases: Tensor | None) -> SSDState:
    """State after the last step; ``phases`` as of ``canonical_form``, None where there is no step."""
    if arguments.is_plain:
        return SSDState(state)
    x, B, trapezoid = arguments.x, arguments.B, arguments.trapezoid
    dtype, time = state_dtype(x.dtype), x.shape[1]
    sequences = _sequences(arguments)

    def last(values: Tensor | None, given: Tensor | None, shape: tuple[int, ...], held: torch.dtype) -> Tensor:
        if given is None:
            given = torch.zeros((arguments.sequences, *shape), dtype=held, device=x.device)
        if values is None or time == 0:
            return given.clone()
        if arguments.cu_seqlens is None:
            return values[:, -1].to(held, copy=True)
        own = values[0].index_select(0, sequences.last).to(held)
        return torch.where(sequences.has_steps.view(-1, *[1] * (own.dim() - 1)), own, given)

    phase = None
    if arguments.angle is not None:
        phase = last(phases, arguments.phase, (x.shape[2], arguments.angle.shape[3]), torch.float64)
        phase = within_a_turn(phase)
    if trapezoid is None:
        return SSDState(state, phase)
    previous_B = last(B, arguments.previous_B, tuple(B.shape[2:]), dtype)
    previous_x = last(x, arguments.previous_x, tuple(x.shape[2:]), dtype)
    return SSDState(state, phase, previous_B, previous_x)


def turned(vectors: Tensor, phase: Tensor) -> Tensor:
    """(..., groups, n) -> (..., heads, n), the first pairs turned by ``phase`` (..., heads, pairs)."""
    pairs, repeats = phase.shape[-1], phase.shape[-2] // vectors.shape[-2]
    vectors = vectors.repeat_interleave(repeats, -2)
    cos, sin = phase.cos().to(vectors.dtype), phase.sin().to(vectors.dtype)
    even, odd = vectors[..., : 2 * pairs : 2], vectors[..., 1 : 2 * pairs : 2]
    front = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([front, vectors[..., 2 * pairs :]], -1)


def _sequences(arguments: SSDArguments) -> _Sequences:
    time, cu_seqlens = arguments.x.shape[1], arguments.cu_seqlens
    steps = torch.arange(time, device=arguments.x.device)
    if cu_seqlens is None:
        nothing = steps[:0]
        return _Sequences(torch.zeros_like(steps), steps == 0, nothing, nothing, nothing.bool())
    of_step = torch.searchsorted(cu_seqlens, steps, right=True) - 1
    is_first = steps == cu_seqlens.index_select(0, of_step)
    begin, end = cu_seqlens[:-1], cu_seqlens[1:]
    return _Sequences(of_step, is_first, begin.clamp(max=max(time - 1, 0)), (end - 1).clamp(min=0), begin < end)


def _next_begins(arguments: SSDArguments, sequences: _Sequences) -> Tensor:
    """(batch or 1, time): whether nothing of a step is in the state after the next."""
    begins = sequences.is_first[None]
    if arguments.reset is not None:
        begins = begins | arguments.reset
    return F.pad(begins[:, 1:], (0, 1), value=True)


def _phases(arguments: SSDArguments, step: Tensor, sequences: _Sequences, backend: str | None) -> Tensor:
    assert arguments.angle is not None
    turns = step.double()[..., None] * arguments.angle.double()  # (batch, time, heads, pairs)
    phase, reset = arguments.phase, arguments.reset
    if arguments.cu_seqlens is not None:
        first = sequences.is_first[None]
        if phase is not None:
            taken = first if reset is None else first & ~reset
            turns = turns + phase.index_select(0, sequences.of_step)[None].masked_fill(~taken[..., None, None], 0)
        reset, phase = first if reset is None else first | reset, None
    ones = turns.new_ones(()).expand(turns.shape)
    phases = linear_scan(ones, turns, phase, reset=reset, channel_last=True, backend=backend)
    assert isinstance(phases, Tensor)
    return phases


def _with_previous(
    arguments: SSDArguments, state: Tensor | None, earlier: Tensor, previous_B: Tensor, sequences: _Sequences
) -> Tensor:
    """The initial state with what the first step adds of the step before it."""
    x, reset = arguments.previous_x, arguments.reset
    assert x is not None
    if arguments.cu_seqlens is None:
        weight, dropped = earlier[:, 0], None if reset is None else reset[:, 0]
    else:
        weight, dropped = earlier[0].index_select(0, sequences.first), ~sequences.has_steps
        if reset is not None:
            dropped = dropped | reset[0].index_select(0, sequences.first)
    if dropped is not None:
        weight = weight.masked_fill(dropped[:, None], 0)
        x = x.masked_fill(dropped[:, None, None], 0)
        previous_B = previous_B.masked_fill(dropped[:, None, None], 0)
    B = previous_B.repeat_interleave(x.shape[1] // previous_B.shape[1], 1)
    before = (weight[..., None] * x)[..., None] * B[:, :, None]
    return before if state is None else state + before
