"""Attention of a frame's tokens to those of the last frames.

Each chunk of frames attends to a copy of itself and of the frames before it. Long chunks compute more scores outside
the window, short ones copy more; a chunk is a quarter of the window, or 32 tokens if that is more. A window over the
whole sequence needs no copy. A reset starts a chunk: a masked NaN is still a NaN, so keys and values of another segment
are filled, which takes queries of one segment per chunk.

Positions are rotary angles (Su et al. 2021) over (frame, row, column): a learned bias per pair trains at half the
speed, since the fused CPU kernel has no gradient for a mask.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_flag, require_size, state_dtype
from wmkernels.modes import can_read_values
from wmkernels.nn.checks import (
    State,
    checked,
    require_heads,
    require_pair,
    require_reset,
    require_state,
    require_tokens,
)
from wmkernels.nn.memory_module import MemoryModule
from wmkernels.nn.rotary import axial_angles, phases, rotate_by
from wmkernels.nn.windows import padded, sliding_windows

_QUERIES = 32  # tokens per chunk that keep the kernel busy


class LocalAttention(MemoryModule):
    """Multi-head attention of the tokens of frame t to those of frames t - frames + 1 to t.

    On a grid of one token, attention with a sliding window over time. Norm and residual connection are the caller's.

    Args:
        d_model: features of inputs and outputs.
        frames: that a token sees, its own among them.
        heads: of equal, even width.
        grid: rows and columns of a frame's tokens, in raster order.
        bias: of the projections.
        time_positions: whether scores depend on how many frames ago a token was; without, on its content and its place
            in the grid alone.

    Example:
        >>> import torch, wmkernels
        >>> attention = wmkernels.nn.LocalAttention(32, frames=2, heads=4, grid=(5, 5))
        >>> outputs, state = attention(torch.randn(2, 10, 25, 32))
        >>> output, state = attention.step(torch.randn(2, 25, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 10, 25, 32]), torch.Size([2, 25, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'keys': (2, 1, 25, 32), 'values': (2, 1, 25, 32), 'seen': (2,)}
    """

    mixes_tokens = True

    @checked
    def __init__(
        self,
        d_model: int,
        frames: int = 2,
        heads: int = 4,
        grid: tuple[int, int] = (1, 1),
        bias: bool = False,
        time_positions: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.time_positions = require_flag("LocalAttention", "time_positions", time_positions)
        self.grid = require_pair("LocalAttention", "grid", grid)
        require_heads("LocalAttention", d_model, heads)
        self.d_model = d_model
        self.frames = frames
        self.heads = heads
        self.tokens = math.prod(self.grid)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        given = f"{self.d_model}, frames={self.frames}, heads={self.heads}, grid={self.grid}"
        return given if self.time_positions else f"{given}, time_positions=False"

    def init_state(self, batch_size: int) -> State:
        """Zeros, float32 (float64): ``"keys"``, ``"values"`` (batch, frames - 1, tokens, d_model), ``"seen"`` (batch,).

        ``"seen"`` counts the frames held since the start, up to frames - 1; the last ones are valid.
        """
        require_size("LocalAttention", "batch_size", batch_size)
        weight = self.in_proj.weight
        dtype = state_dtype(weight.dtype)
        return {
            name: torch.zeros(shape, device=weight.device, dtype=dtype)
            for name, shape in self._state_shapes(batch_size).items()
        }

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """Outputs (batch, time, tokens, d_model) and the differentiable last state.

        Args:
            inputs: (batch, time, tokens, d_model).
            state: empty if None.
            reset: bool (batch, time), true at a sequence's first frame.
            single_step: as ``step``, which calls the module with it.

        Raises:
            ValueError: invalid shape or device.
            TypeError: invalid dtype or state.
        """
        one = require_flag("LocalAttention", "single_step", single_step)
        labels = ("batch", "tokens", "d_model") if one else ("batch", "time", "tokens", "d_model")
        require_tokens("LocalAttention", "input" if one else "inputs", inputs, labels, self.tokens, self.d_model)
        require_reset("LocalAttention", reset, inputs.select(-2, 0))
        if state is not None:
            require_state("LocalAttention", state, self._state_shapes(inputs.shape[0]), inputs)
        if not one:
            return self._run(inputs, state, reset)
        outputs, after = self._run(inputs[:, None], state, None if reset is None else reset[:, None])
        return outputs.squeeze(1), after

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One frame: ``input`` (batch, tokens, d_model), ``reset`` bool (batch,)."""
        stepped: tuple[Tensor, State] = self(input, state, reset, single_step=True)
        return stepped

    def _run(self, inputs: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None) -> tuple[Tensor, State]:
        batch, time = inputs.shape[:2]
        past = self.frames - 1
        held = 0 if state is None else past  # frames before the first
        if state is None:
            dtype = state_dtype(inputs.dtype)
            state = {name: inputs.new_zeros(x, dtype=dtype) for name, x in self._state_shapes(batch).items()}
        if inputs.numel() == 0:
            return self.out_proj(inputs), {name: x.clone() for name, x in state.items()}
        queries, new_keys, new_values = self.in_proj(inputs).split(self.d_model, -1)
        old_keys, old_values = (state[name].to(queries.dtype) for name in ("keys", "values"))
        age = torch.arange(past, 0, -1, device=inputs.device)
        seen = age - 0.5 < state["seen"][:, None]  # (batch, past)
        segments = None
        if reset is not None and past:
            seen = seen & ~reset[:, :1]
            old_keys, old_values = (x.masked_fill(reset[:, :1, None, None], 0) for x in (old_keys, old_values))
            if not can_read_values(reset) or reset[:, 1:].any():
                segments = F.pad(reset[:, 1:].cumsum(1), (1, 0))  # (batch, time), from 0

        turns = phases(self._angles(-held, time))
        queries, keys = rotate_by(queries, turns[held:]), rotate_by(new_keys, turns[held:])
        if held:
            keys = torch.cat([rotate_by(old_keys, turns[:held]), keys], 1)
            values = torch.cat([old_values, new_values], 1)
        else:
            values = new_values
        outputs = self.out_proj(self._attend(queries, keys, values, seen[:, past - held :], segments))

        if segments is None:
            kept = F.pad(seen, (0, time), value=True)
        else:
            kept = torch.cat([seen & (segments[:, -1:] == 0), segments == segments[:, -1:]], 1)
        kept = kept[:, time:]
        after = {"seen": kept.sum(1).to(state["seen"].dtype)}
        for name, old, new in (("keys", old_keys, new_keys), ("values", old_values, new_values)):
            window = torch.cat([old[:, min(time, past) :], new[:, max(time - past, 0) :]], 1).to(state[name].dtype)
            all_kept = time >= past and segments is None
            after[name] = window if all_kept else window.masked_fill(~kept[..., None, None], 0)
        return outputs, {name: after[name] for name in state}

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, segments: Tensor | None) -> Tensor:
        """(batch, time, tokens, d_model).

        Keys and values are those of held + time frames; ``seen`` (batch, held) says which of the held ones count, and
        ``segments`` (batch, time) which frames see each other.
        """
        batch, time = queries.shape[:2]
        held, tokens = keys.shape[1] - time, self.tokens
        past = min(self.frames - 1, held + time - 1)
        if not past:
            return self._mix(queries[:, :, None], keys[:, :, None], values[:, :, None], None).squeeze(2)
        size = min(max(_QUERIES // tokens, past // 4, 1), past + 1)
        slots = None
        if segments is None:
            if held + time <= past + size:
                return self._attend_at_once(queries, keys, values, seen)
            count = -(-time // size)
            size = -(-time // count)
        else:
            count, size, slots, segments = _slots(segments, size)
            if slots is not None:
                queries = _to_slots(queries, slots, count * size)
                keys, values = (
                    torch.cat([x[:, :held], _to_slots(x[:, held:], slots, count * size)], 1) for x in (keys, values)
                )
        left, right = past - held, count * size - queries.shape[1]
        valid = F.pad(F.pad(seen, (left, 0)), (0, count * size), value=True)
        mask = sliding_windows(valid, past + size, size)[:, :, None]  # (batch, chunks, 1, window)
        keys, values = (sliding_windows(x, past + size, size, left, count) for x in (keys, values))
        if segments is not None:
            own = F.pad(segments.repeat_interleave(size, 1), (past, 0))
            mask = mask & (sliding_windows(own, past + size, size) == segments[..., None])[:, :, None]
            keys, values = (torch.where(mask[:, :, 0, :, None, None], x, 0) for x in (keys, values))
        if size > 1:
            mask = mask & self._sees(size, past + size, mask.device)
        queries = padded(queries, 0, right).unflatten(1, (count, size))
        mixed = self._mix(queries, keys, values, mask).flatten(1, 2)
        if slots is not None:
            place = slots + torch.arange(batch, device=slots.device)[:, None] * count * size
            return mixed.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, (batch, time))
        return mixed[:, :time] if right else mixed

    def _attend_at_once(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        time, window = queries.shape[1], keys.shape[1]
        causal = window == time and time <= self.frames and self.tokens == 1
        mask = None
        if not causal:
            mask = self._sees(time, window, queries.device)[None, None]
            if window > time:
                mask = mask & F.pad(seen, (0, time), value=True)[:, None, None]
        return self._mix(queries[:, None], keys[:, None], values[:, None], mask, causal).squeeze(1)

    def _sees(self, size: int, window: int, device: torch.device) -> Tensor:
        """Bool (size, window): whether the last ``size`` frames of a window see each of it."""
        lag = torch.arange(window - size, window, device=device)[:, None] - torch.arange(window, device=device)
        return (lag >= 0) & (lag < self.frames)

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Attention of (batch, chunks, size, tokens, d_model) to (batch, chunks, window, tokens, d_model).

        ``mask`` is (batch or 1, chunks, size or 1, window).
        """
        if mask is not None:
            mask = mask.flatten(0, 1)[:, None].repeat_interleave(self.tokens, -1)
            if mask.shape[-2] > 1:
                mask = mask.repeat_interleave(self.tokens, -2)
        q, k, v = (self._heads(x) for x in (queries, keys, values))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return mixed.transpose(1, 2).reshape(queries.shape)

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, chunks, frames, tokens, d_model) -> (batch * chunks, heads, frames * tokens, d_model / heads)."""
        batch, chunks, frames = x.shape[:3]
        x = x.reshape(batch * chunks, frames * self.tokens, self.heads, self.d_model // self.heads)
        return x.transpose(1, 2)

    def _angles(self, first: int, end: int) -> Tensor:
        """Of the rotary positions of frames ``first`` to ``end`` - 1, (frames, tokens, pairs)."""
        rows, columns = self.grid
        device = self.in_proj.weight.device
        times = torch.arange(first, end, device=device).repeat_interleave(self.tokens)
        if not self.time_positions:
            times = torch.zeros_like(times)
        places = torch.arange(self.tokens, device=device).repeat(end - first)
        pairs = self.d_model // self.heads // 2
        positions = (times, places // columns, places % columns)
        return axial_angles(positions, (self.frames, rows, columns), pairs).view(-1, self.tokens, pairs)

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        window = (rows, self.frames - 1, self.tokens, self.d_model)
        return {"keys": window, "values": window, "seen": (rows,)}


def _slots(segments: Tensor, size: int) -> tuple[int, int, Tensor | None, Tensor]:
    """Where frames go so that a segment starts a chunk: no chunk then holds frames of two.

    Returns the number and the size of the chunks, smaller where segments are short; the slots (batch, time) of the
    frames, None for one frame per chunk; and the segments (batch, chunks) of the chunks.
    """
    time = segments.shape[1]
    most = int(segments[:, -1].max()) + 1 if can_read_values(segments) else time  # segments of a row
    size = min(size, time // most)
    if size == 1:
        return time, 1, None, segments
    steps = torch.arange(time, device=segments.device)
    starts = F.pad(segments.diff(dim=1) > 0, (1, 0), value=True)
    since = steps - torch.where(starts, steps, 0).cummax(1).values
    begins = since % size == 0
    number = begins.cumsum(1) - 1
    count = int(number.max()) + 1
    of_chunks = segments.new_full((len(segments), count), -1).scatter(1, number, segments)
    return count, size, number * size + since % size, of_chunks


def _to_slots(x: Tensor, slots: Tensor, count: int) -> Tensor:
    """Frames x (batch, time, ...) in their ``slots``, of ``count``; zeros in the others."""
    place = slots + torch.arange(len(x), device=x.device)[:, None] * count
    rows = x.new_zeros(len(x) * count, *x.shape[2:]).index_copy(0, place.flatten(), x.flatten(0, 1))
    return rows.unflatten(0, (len(x), count))
