"""Memory tokens that attend together with a block of inputs, and are replaced by what they read.

A block-recurrent transformer layer (Hutchins et al. 2022, arXiv 2203.07852) with one attention for both. Per block,
the memory's queries read the memory and the whole block, and a gate moves the memory towards the result; the block's
queries read the memory from before the block and, causally, the block.

The recurrence runs from block to block and handles the memory's queries alone; those of the inputs follow in one batch.
An unfinished block is part of the state, so that a sequence may be cut anywhere. A reset starts a block, so blocks of
different rows need not be aligned: steps are copied to the slots of their blocks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_flag, require_size, state_dtype
from wmkernels.modes import can_read_values
from wmkernels.nn.checks import State, checked, require_heads, require_inputs, require_reset, require_state
from wmkernels.nn.memory_module import MemoryModule
from wmkernels.nn.rotary import axial_angles, rotate


class MemoryAttention(MemoryModule):
    """Block-recurrent attention with memory tokens; norm and residual connection of the inputs are the caller's.

    Args:
        d_model: features of inputs and outputs.
        tokens: of the memory.
        block: steps between updates of the memory.
        heads: of equal, even width.

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.MemoryAttention(32, tokens=8, block=16)
        >>> outputs, state = memory(torch.randn(2, 100, 32))
        >>> output, state = memory.step(torch.randn(2, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'memory': (2, 8, 32), 'keys': (2, 15, 32), 'values': (2, 15, 32), 'filled': (2,)}
    """

    @checked
    def __init__(
        self,
        d_model: int,
        tokens: int = 16,
        block: int = 16,
        heads: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_heads("MemoryAttention", d_model, heads)
        self.d_model = d_model
        self.tokens = tokens
        self.block = block
        self.heads = heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.memory = nn.Parameter(torch.empty(tokens, d_model, **factory))
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False, **factory)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, **factory)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, 2 * d_model, **factory), nn.GELU(), nn.Linear(2 * d_model, d_model, **factory)
        )
        self.norm = nn.LayerNorm(d_model, **factory)
        self.memory_in_proj = nn.Linear(d_model, 3 * d_model, bias=False, **factory)
        self.memory_out_proj = nn.Linear(d_model, d_model, **factory)
        self.gate = nn.Linear(2 * d_model, d_model, **factory)
        self._reset_memory()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()
        self._reset_memory()

    def _reset_memory(self) -> None:
        """Distinct tokens, and gates that keep most of the memory."""
        nn.init.normal_(self.memory, std=0.5)
        nn.init.constant_(self.gate.bias, -2.0)

    def extra_repr(self) -> str:
        return f"{self.d_model}, tokens={self.tokens}, block={self.block}, heads={self.heads}"

    def init_state(self, batch_size: int) -> State:
        """Zeros, float32 (float64).

        ``"memory"`` (batch, tokens, d_model) is the memory less its learned initial value; ``"keys"`` and ``"values"``
        (batch, block - 1, d_model) hold the unfinished block, of ``"filled"`` (batch,) steps.
        """
        require_size("MemoryAttention", "batch_size", batch_size)
        dtype, device = state_dtype(self.memory.dtype), self.memory.device
        shapes = self._state_shapes(batch_size)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """Outputs (batch, time, d_model) and the differentiable last state; arguments and errors as for ``Mamba``."""
        one = require_flag("MemoryAttention", "single_step", single_step)
        labels = ("batch", "d_model") if one else ("batch", "time", "d_model")
        require_inputs("MemoryAttention", "input" if one else "inputs", inputs, labels, self.d_model)
        require_reset("MemoryAttention", reset, inputs)
        batch = inputs.shape[0]
        if state is None:
            dtype = state_dtype(inputs.dtype)
            state = {name: inputs.new_zeros(x, dtype=dtype) for name, x in self._state_shapes(batch).items()}
        require_state("MemoryAttention", state, self._state_shapes(batch), inputs)
        if one:
            outputs, after = self._run(inputs[:, None], state, None if reset is None else reset[:, None])
            return outputs.squeeze(1), after
        return self._run(inputs, state, reset)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: ``input`` (batch, d_model), ``reset`` bool (batch,)."""
        stepped: tuple[Tensor, State] = self(input, state, reset, single_step=True)
        return stepped

    def _run(self, inputs: Tensor, state: Mapping[str, Tensor], reset: Tensor | None) -> tuple[Tensor, State]:
        batch, time, width = inputs.shape
        if inputs.numel() == 0:
            return self.out_proj(inputs), {name: x.clone() for name, x in state.items()}
        size, past = self.block, self.block - 1
        steps = self.in_proj(inputs)
        carried = torch.cat([state["keys"], state["values"]], -1).to(steps.dtype)
        number, slot, filled = self._slots(state["filled"], time, reset)
        count = self._block_count(number, time, reset)

        # Row b * count * size + number * size + slot holds a step; the row behind them, what a reset drops.
        first = torch.arange(batch, device=inputs.device)[:, None] * count * size
        rows = first + number * size + slot  # (batch, time)
        place = torch.arange(past, device=inputs.device)
        held = place < (filled if reset is None else filled.masked_fill(reset[:, :1], 0))
        rows_held = torch.where(held, first + place, batch * count * size)
        every = torch.cat([rows_held, rows], 1).flatten()
        used = torch.zeros(batch * count * size + 1, dtype=torch.bool, device=inputs.device).index_fill(0, every, True)
        used = used[:-1].view(batch, count, size)
        blocks = steps.new_zeros(batch * count * size + 1, 3 * width).index_copy(
            0, every, torch.cat([F.pad(carried, (width, 0)), steps], 1).flatten(0, 1)
        )
        blocks = blocks[:-1].view(batch, count, size, 3 * width)
        block_reset = None
        if reset is not None:
            block_reset = torch.zeros(batch, count, dtype=torch.int64, device=inputs.device)
            block_reset = block_reset.scatter_add(1, number, reset.long()) > 0

        query, key, value = self._heads(blocks, rotary=True)  # (batch, count, heads, size, d_head)
        memory, memory_keys, memory_values = self._recur(state["memory"], key, value, used, block_reset)
        causal = torch.ones(size, size, dtype=torch.bool, device=inputs.device).tril()
        mask = F.pad(causal & used[:, :, None], (self.tokens, 0), value=True)[:, :, None]
        mixed = F.scaled_dot_product_attention(
            query, torch.cat([memory_keys, key], -2), torch.cat([memory_values, value], -2), attn_mask=mask
        )
        mixed = mixed.transpose(-3, -2).reshape(batch * count * size, width)
        outputs = self.out_proj(mixed.index_select(0, rows.flatten()).view(batch, time, width))

        last = (slot[:, -1] + 1) % size  # steps of the unfinished block
        index = number[:, -1, None, None, None].expand(-1, 1, past, 2 * width)
        window = blocks[:, :, :past, width:].gather(1, index).squeeze(1).to(state["keys"].dtype)
        keys, values = (x.masked_fill((place >= last[:, None])[..., None], 0) for x in window.chunk(2, -1))
        return outputs, {"memory": memory, "keys": keys, "values": values, "filled": last.to(state["filled"].dtype)}

    def _slots(self, filled: Tensor, time: int, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Number of each step's block in this call and its slot there, (batch, time); steps held, (batch, 1)."""
        place = torch.arange(self.block - 1, device=filled.device)
        held = (place + 0.5 < filled[:, None]).sum(1, keepdim=True)
        steps = torch.arange(time, device=filled.device)
        since = held + steps
        if reset is not None:
            start = torch.where(reset, steps, -1).cummax(1).values
            since = torch.where(start >= 0, steps - start, since)
        slot = since % self.block
        begins = slot == 0
        return begins.cumsum(1) - begins[:, :1].long(), slot, held

    def _block_count(self, number: Tensor, time: int, reset: Tensor | None) -> int:
        """A bound on the blocks of any row."""
        if reset is None:
            return (time + self.block - 2) // self.block + 1
        return int(number.max()) + 1 if can_read_values(number) else time

    def _recur(
        self, state: Tensor, key: Tensor, value: Tensor, used: Tensor, block_reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last memory less its initial value, and the keys and values of the memory before each block."""
        initial = self.memory.to(state.dtype)
        memory = initial + state  # (batch, tokens, d_model)
        masks = F.pad(used, (self.tokens, 0), value=True)[:, :, None, None]
        keys, values = [], []
        for index in range(used.shape[1]):
            if block_reset is not None:
                memory = torch.where(block_reset[:, index, None, None], initial, memory)
            x = memory.to(self.memory.dtype)
            x = self.norm(x + self.feed_forward(x))
            q, k, v = self._heads(self.memory_in_proj(x), rotary=False)  # (batch, heads, tokens, d_head)
            keys.append(k)
            values.append(v)
            k, v = torch.cat([k, key[:, index]], -2), torch.cat([v, value[:, index]], -2)
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[:, index])
            read = self.memory_out_proj(read.transpose(-3, -2).flatten(-2))
            gate = torch.sigmoid(self.gate(torch.cat([x, read], -1))).to(memory.dtype)
            updated = memory + gate * (torch.tanh(read).to(memory.dtype) - memory)
            memory = torch.where(used[:, index, -1, None, None], updated, memory)
        return memory - initial, torch.stack(keys, 1), torch.stack(values, 1)

    def _heads(self, projected: Tensor, rotary: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(..., n, 3 * d_model) -> queries, keys and values (..., heads, n, d_head); block slots are rotated."""
        query, key, value = projected.chunk(3, -1)
        if rotary:
            slots = torch.arange(projected.shape[-2], device=projected.device)
            angles = axial_angles([slots], [self.block], self.d_model // self.heads // 2)
            query, key = rotate(query, angles), rotate(key, angles)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in (query, key, value))
        return query, key, value

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        window = (rows, self.block - 1, self.d_model)
        return {"memory": (rows, self.tokens, self.d_model), "keys": window, "values": window, "filled": (rows,)}
