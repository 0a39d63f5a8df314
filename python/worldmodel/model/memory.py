"""Memory, s_t, m_t = D(x_t, m_{t-1}): a stack of recurrent blocks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from wmkernels.nn.memory_module import forward_in_parts, forward_with_states, takes_elapsed
from worldmodel.data.batch import State
from worldmodel.model.block import mixes_tokens
from worldmodel.model.blocks import BlockConfig, RotaryScanBlock
from worldmodel.runs.fields import Bounds, Checked, Size
from worldmodel.runs.migration import MOST_BLOCKS


@dataclasses.dataclass(frozen=True)
class MemoryConfig(Checked):
    """Memory.

    Attributes:
        width: features between blocks.
        blocks: in order.
        tokens: vectors that s_t has; the heads get their mean.

    Example:
        >>> from worldmodel.model.blocks import ConvLSTMBlock
        >>> hybrid = MemoryConfig(width=64, blocks=(RotaryScanBlock(d_state=32), ConvLSTMBlock((4, 4))))
        >>> sorted(build_memory(hybrid).init_state(1))
        ['0.angle', '0.scan', '0.window', '1.cell', '1.hidden']
    """

    width: Size = 64
    blocks: Annotated[tuple[BlockConfig, ...], Bounds(1, MOST_BLOCKS)] = (RotaryScanBlock(),)
    tokens: Annotated[int, Bounds(1, 4096)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for block in self.blocks:
            block.check(self.width, self.tokens)


class MemoryStack(nn.Module):
    """Pre-norm residual blocks and a final norm; block i's state is under "i.name".

    With several tokens, a block runs on each alone, with a state (batch, tokens, ...), unless it ``mixes_tokens``.
    """

    def __init__(self, blocks: list[nn.Module], width: int, tokens: int = 1) -> None:
        super().__init__()
        self.tokens = tokens
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in blocks)
        self.norm = nn.LayerNorm(width)
        self._has_token_dim = tokens > 1 or any(mixes_tokens(block) for block in blocks)

    def init_state(self, batch_size: int) -> State:
        parts = []
        for block, _ in self._layers():
            folds = self.tokens > 1 and not mixes_tokens(block)
            part = block.init_state(batch_size * self.tokens if folds else batch_size)
            parts.append(_unfolded(part, self.tokens) if folds else part)
        return _joined(parts)

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """``inputs`` (batch, time, tokens * width), ``reset`` bool (batch, time), ``elapsed`` (batch, time), 1 if None.

        Blocks whose ``forward`` has an argument ``elapsed`` get it.

        Returns:
            s_t, (batch, time, width) or (batch, time, tokens, width) for several tokens, and the state.
        """
        return self._run(lambda block: block, inputs, state, reset, elapsed)

    def forward_with_states(
        self,
        inputs: Tensor,
        states_after: Sequence[int],
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """``forward``, with the states after each of ``states_after`` steps, which rise from 1 to time."""
        if self._has_token_dim:
            return forward_in_parts(self, inputs, states_after, state, reset, elapsed=elapsed)
        x, by_block = inputs, []
        for index, (block, norm) in enumerate(self._layers()):
            part = None if state is None else _part(state, index)
            times = elapsed if takes_elapsed(block) else None
            outputs, states = forward_with_states(block, norm(x), states_after, part, reset, elapsed=times)
            x = x + outputs
            by_block.append(states)
        return self.norm(x), [_joined(list(parts)) for parts in zip(*by_block, strict=True)]

    def step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """``forward`` without the time dimension."""
        return self._run(lambda block: block.step, input, state, reset, elapsed)

    def pool(self, s: Tensor) -> Tensor:
        """s_t to features, (..., width)."""
        return s if self.tokens == 1 else s.mean(-2)

    def _run(
        self,
        method: Callable[[Any], Any],
        x: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        elapsed: Tensor | None,
    ) -> tuple[Tensor, State]:
        if self._has_token_dim:
            x = x.unflatten(-1, (self.tokens, -1))
        parts = []
        for index, (block, norm) in enumerate(self._layers()):
            part = None if state is None else _part(state, index)
            run = method(block)
            if self._has_token_dim and not mixes_tokens(block):
                run = functools.partial(self._run_per_token, run)
            times = {} if elapsed is None or not takes_elapsed(block) else {"elapsed": elapsed}
            outputs, part = run(norm(x), part, reset, **times)
            x = x + outputs
            parts.append(part)
        s = self.norm(x)
        return s.squeeze(-2) if self._has_token_dim and self.tokens == 1 else s, _joined(parts)

    def _run_per_token(
        self, block: Callable[..., Any], x: Tensor, state: State | None, reset: Tensor | None, **times: Tensor
    ) -> tuple[Tensor, State]:
        """Tokens become rows of the batch."""
        if self.tokens == 1:
            outputs, state = block(x.squeeze(-2), state, reset, **times)
            return outputs.unsqueeze(-2), state
        rows = (x.shape[0], self.tokens)
        state = None if state is None else {name: value.flatten(0, 1) for name, value in state.items()}
        reset = None if reset is None else reset.repeat_interleave(self.tokens, 0)
        times = {name: value.repeat_interleave(self.tokens, 0) for name, value in times.items()}
        outputs, state = block(x.movedim(-2, 1).flatten(0, 1), state, reset, **times)
        return outputs.unflatten(0, rows).movedim(1, -2), _unfolded(state, self.tokens)

    def _layers(self) -> Iterator[tuple[Any, nn.Module]]:
        return zip(self.blocks, self.norms, strict=True)


def build_memory(config: MemoryConfig) -> MemoryStack:
    """Builds the stack. Raises ConfigurationError if a ``CustomBlock`` cannot be built, ValueError for other blocks."""
    return MemoryStack(
        [block.build(config.width, config.tokens) for block in config.blocks], config.width, config.tokens
    )


def _unfolded(state: Mapping[str, Tensor], tokens: int) -> State:
    return {name: value.unflatten(0, (-1, tokens)) for name, value in state.items()}


def _joined(parts: list[State]) -> State:
    return {f"{index}.{name}": value for index, part in enumerate(parts) for name, value in part.items()}


def _part(state: Mapping[str, Tensor], index: int) -> State:
    prefix = f"{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
