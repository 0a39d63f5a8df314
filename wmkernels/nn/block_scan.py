"""A memory along each block of a token grid (Po et al. 2025, arXiv 2505.20171).

A block's tokens in raster order, then those of its next frame, are one sequence: small blocks reach far back in time,
large ones mix space.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import require_flag, shown
from wmkernels.nn.checks import State, checked, require_elapsed, require_pair, require_reset, require_tokens
from wmkernels.nn.memory_module import MemoryModule, takes_elapsed


class BlockScan(MemoryModule):
    """Runs ``memory`` along each block of a grid of tokens; blocks share its weights and have a state each.

    Grids that blocks do not divide are padded with zeros at the bottom and the right.

    Args:
        memory: a module with ``init_state``, ``forward`` and ``step`` over (batch, time, features), such as ``Mamba``.
        block: rows and columns of a block; one number for a square.
        grid: rows and columns of a frame's tokens, in raster order.

    Example:
        >>> import torch, wmkernels
        >>> scan = wmkernels.nn.BlockScan(wmkernels.nn.Mamba(32), block=2, grid=(5, 5))
        >>> outputs, state = scan(torch.randn(2, 10, 25, 32))
        >>> output, state = scan.step(torch.randn(2, 25, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 10, 25, 32]), torch.Size([2, 25, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'window': (2, 9, 3, 64), 'scan': (2, 9, 64, 16)}
    """

    mixes_tokens = True

    @checked
    def __init__(self, memory: nn.Module, block: int | tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        for method in ("init_state", "step"):
            if not callable(getattr(memory, method, None)):
                raise TypeError(f"BlockScan: memory is a {type(memory).__name__} without {method}, expected a memory")
        if getattr(memory, "mixes_tokens", False):
            name = type(memory).__name__
            raise TypeError(f"BlockScan: memory is a {name}, which takes token grids; expected one over single vectors")
        self.memory: Any = memory
        self.block = require_pair("BlockScan", "block", (block, block) if isinstance(block, int) else block)
        self.grid = require_pair("BlockScan", "grid", grid)
        self.tokens = self.grid[0] * self.grid[1]
        self.blocks = -(-self.grid[0] // self.block[0]), -(-self.grid[1] // self.block[1])

    def extra_repr(self) -> str:
        return f"block={self.block}, grid={self.grid}"

    def init_state(self, batch_size: int) -> State:
        """The memory's, each tensor (batch, blocks, ...)."""
        return self._unfolded(self.memory.init_state(batch_size * self.blocks[0] * self.blocks[1]))

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """Outputs (batch, time, tokens, features) and the last state.

        Args:
            inputs: (batch, time, tokens, features).
            state: the initial one if None.
            reset: bool (batch, time), true at a sequence's first frame.
            elapsed: (batch, time), time since the frame before, for memories that take it; None for 1. It passes
                before a frame's first token.
            single_step: as ``step``, which calls the module with it.

        Raises:
            ValueError: invalid shape or device.
            TypeError: invalid dtype or state.
        """
        one = require_flag("BlockScan", "single_step", single_step)
        labels = ("batch", "tokens", "features") if one else ("batch", "time", "tokens", "features")
        require_tokens("BlockScan", "input" if one else "inputs", inputs, labels, self.tokens)
        require_reset("BlockScan", reset, inputs.select(-2, 0))
        require_elapsed("BlockScan", elapsed, inputs.select(-2, 0))
        frames = inputs[:, None] if one else inputs
        folded = None if state is None else self._folded(state, inputs.shape[0])
        rows = [None if x is None else x.view(frames.shape[:2]) for x in (reset, elapsed)]
        outputs, after = self._run(frames, folded, *rows)
        return outputs.squeeze(1) if one else outputs, self._unfolded(after)

    def step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """One frame: ``input`` (batch, tokens, features), ``reset`` bool and ``elapsed`` (batch,)."""
        stepped: tuple[Tensor, State] = self(input, state, reset, elapsed=elapsed, single_step=True)
        return stepped

    def _run(
        self, frames: Tensor, state: State | None, reset: Tensor | None, elapsed: Tensor | None
    ) -> tuple[Tensor, State]:
        batch, time, _, features = frames.shape
        (rows, columns), (height, width), (down, across) = self.grid, self.block, self.blocks
        x = frames.unflatten(2, (rows, columns))
        x = F.pad(x, (0, 0, 0, across * width - columns, 0, down * height - rows))
        x = x.view(batch, time, down, height, across, width, features).permute(0, 2, 4, 1, 3, 5, 6)
        x = x.reshape(batch * down * across, time * height * width, features)
        options = {}
        if elapsed is not None and takes_elapsed(self.memory):
            options["elapsed"] = self._first_tokens(elapsed, 1)
        outputs, state = self.memory(x, state, None if reset is None else self._first_tokens(reset, False), **options)
        y = outputs.view(batch, down, across, time, height, width, features).permute(0, 3, 1, 4, 2, 5, 6)
        y = y.reshape(batch, time, down * height, across * width, features)
        return y[:, :, :rows, :columns].flatten(2, 3), state

    def _first_tokens(self, x: Tensor, other: float) -> Tensor:
        """(batch, time) -> (batch * blocks, time * block), ``other`` for all but a frame's first token."""
        size = self.block[0] * self.block[1]
        x = F.pad(x[..., None], (0, size - 1), value=other).flatten(1)
        return x.repeat_interleave(self.blocks[0] * self.blocks[1], 0)

    def _folded(self, state: Mapping[str, Tensor], batch: int) -> State:
        rows = (batch, self.blocks[0] * self.blocks[1])
        if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
            raise TypeError(f"BlockScan: state is {shown(state)}, expected tensors ({rows[0]}, {rows[1]}, ...)")
        for name, x in state.items():
            if x.shape[:2] != rows:
                raise ValueError(
                    f"BlockScan: state[{name!r}] has shape {tuple(x.shape)}, expected (batch={rows[0]}, "
                    f"blocks={rows[1]}, ...)"
                )
        return {name: value.flatten(0, 1) for name, value in state.items()}

    def _unfolded(self, state: State) -> State:
        return {name: value.unflatten(0, (-1, self.blocks[0] * self.blocks[1])) for name, value in state.items()}
