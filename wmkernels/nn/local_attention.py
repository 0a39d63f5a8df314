"""Attention of a frame's tokens to those of the last frames.

Each chunk of frames attends to copies of itself and of the chunks before it, so no score outside the window's chunks is
computed. Many tokens per frame make chunks of one frame; a window over single vectors takes about 32 per chunk.
Positions are rotary angles (Su et al. 2021) over (frame, row, column): a learned bias per pair trains at half the
speed, since the fused CPU kernel has no gradient for a mask.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_flag, require_size, state_dtype
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
from wmkernels.nn.rotary import axial_angles, rotate

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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid = require_pair("LocalAttention", "grid", grid)
        require_heads("LocalAttention", d_model, heads)
        self.d_model = d_model
        self.frames = frames
        self.heads = heads
        self.tokens = math.prod(self.grid)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, frames={self.frames}, heads={self.heads}, grid={self.grid}"

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
        if state is None:
            dtype = state_dtype(inputs.dtype)
            state = {name: inputs.new_zeros(x, dtype=dtype) for name, x in self._state_shapes(batch).items()}
        projected = self.in_proj(inputs)
        queries, keys = self._rotate(projected[..., : 2 * self.d_model], 0).chunk(2, -1)
        new_keys, new_values = projected[..., self.d_model :].chunk(2, -1)
        old_keys, old_values = state["keys"].to(projected.dtype), state["values"].to(projected.dtype)
        age = torch.arange(past, 0, -1, device=inputs.device)
        seen = F.pad(age - 0.5 < state["seen"][:, None], (0, time), value=True)  # (batch, past + time)
        segments = None if reset is None else F.pad(reset.cumsum(1), (past, 0))
        outputs = self._attend(
            queries,
            torch.cat([self._rotate(old_keys, -past), keys], 1),
            torch.cat([old_values, new_values], 1),
            seen,
            segments,
        )
        kept = seen if segments is None else seen & (segments == segments[:, -1:])
        kept = kept[:, time:]
        after = {"seen": kept.sum(1).to(state["seen"].dtype)}
        for name, old, new in (("keys", old_keys, new_keys), ("values", old_values, new_values)):
            window = torch.cat([old[:, min(time, past) :], new[:, max(time - past, 0) :]], 1)
            after[name] = window.to(state[name].dtype).masked_fill(~kept[..., None, None], 0)
        return self.out_proj(outputs), {name: after[name] for name in state}

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, segments: Tensor | None) -> Tensor:
        """(batch, time, tokens, d_model); the other arguments are those of past + time frames."""
        batch, time = queries.shape[:2]
        past, tokens = self.frames - 1, self.tokens
        # Chunks of one frame where a reset may lie between two: a masked NaN is still a NaN, and is filled instead.
        size = max(1, min(_QUERIES // tokens, past, time)) if segments is None else 1
        count, before = -(-time // size), -(-past // size)
        left, right = before * size - past, count * size - time

        def windows(x: Tensor) -> Tensor:  # (batch, past + time, ...) -> (batch, chunks, frames of its window, ...)
            chunks = padded(x, left, right).unflatten(1, (before + count, size))
            return torch.cat([chunks[:, i : i + count] for i in range(before + 1)], 2)

        lag = torch.arange(size, device=queries.device)[:, None] + before * size
        lag = lag - torch.arange((before + 1) * size, device=queries.device)
        mask = ((lag >= 0) & (lag <= past)) & windows(seen)[:, :, None]  # (batch, chunks, size, window)
        keys, values = windows(keys), windows(values)
        if segments is not None:
            mask = mask & (segments[:, past:, None] == windows(segments))[:, :, None]
            keys, values = (x.masked_fill(~mask[:, :, 0, :, None, None], 0) for x in (keys, values))
        mask = mask.flatten(0, 1)[:, None].repeat_interleave(tokens, -1)
        if size > 1:
            mask = mask.repeat_interleave(tokens, -2)
        chunks = padded(queries, 0, right).unflatten(1, (count, size))
        q, k, v = (self._heads(x) for x in (chunks, keys, values))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(batch, count * size, tokens, self.d_model)
        return mixed[:, :time] if right else mixed

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, chunks, frames, tokens, d_model) -> (batch * chunks, heads, frames * tokens, d_model / heads)."""
        batch, chunks, frames = x.shape[:3]
        x = x.reshape(batch * chunks, frames * self.tokens, self.heads, self.d_model // self.heads)
        return x.transpose(1, 2)

    def _rotate(self, x: Tensor, first: int) -> Tensor:
        """Rotates the heads of frames (batch, frames, tokens, features), the first at ``first``."""
        rows, columns = self.grid
        times = torch.arange(first, first + x.shape[1], device=x.device).repeat_interleave(self.tokens)
        places = torch.arange(self.tokens, device=x.device).repeat(x.shape[1])
        pairs = self.d_model // self.heads // 2
        positions = (times, places // columns, places % columns)
        angles = axial_angles(positions, (self.frames, rows, columns), pairs)
        return rotate(x, angles.view(-1, self.tokens, pairs))

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        window = (rows, self.frames - 1, self.tokens, self.d_model)
        return {"keys": window, "values": window, "seen": (rows,)}


def padded(x: Tensor, left: int, right: int) -> Tensor:
    """Zeros before and after the second dimension; no copy without any."""
    return F.pad(x, [0, 0] * (x.dim() - 2) + [left, right]) if left or right else x
