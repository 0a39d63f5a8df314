"""Memory blocks: one dataclass per kind, which builds the module.

A block maps (batch, time, width) to the same shape; its state is a flat dict of tensors, batch first.
"""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.nn import CausalConv1d, ConvLSTM, Mamba, RotaryMamba
from worldmodel.data.batch import State
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Size, Text


class GatedConv(nn.Module):
    """A Mamba block without its scan."""

    def __init__(self, width: int, d_conv: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner, d_conv)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        return self.conv1d.init_state(batch_size)

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, z = self.in_proj(inputs).chunk(2, -1)
        x, carried = self.conv1d(x, state, reset)
        return self.out_proj(F.silu(x) * F.silu(z)), carried

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        x, z = self.in_proj(input).chunk(2, -1)
        x, carried = self.conv1d(x, state, reset, single_step=True)
        return self.out_proj(F.silu(x) * F.silu(z)), carried


class MapLSTM(nn.Module):
    """A ConvLSTM on flattened (channels, height, width) maps."""

    def __init__(self, width: int, map_size: tuple[int, int], kernel: int) -> None:
        super().__init__()
        self.shape = (width // math.prod(map_size), *map_size)
        self.cell = ConvLSTM(self.shape[0], self.shape[0], kernel, batch_first=True)

    def init_state(self, batch_size: int) -> State:
        hidden, cell = self.cell.init_state(batch_size, self.shape[1:])
        return {"hidden": hidden[0], "cell": cell[0]}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._run(self.cell, inputs, state, reset)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self._run(self.cell.step, input, state, reset)

    def _run(
        self, run: Callable[..., Any], inputs: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        given = None if state is None else (state["hidden"][None], state["cell"][None])
        outputs, (hidden, cell) = run(inputs.unflatten(-1, self.shape), given, reset)
        return outputs.flatten(-3), {"hidden": hidden[0], "cell": cell[0]}


class GRU(nn.Module):
    """A GRU (Cho et al. 2014) with resets: a loop over time, as a baseline."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.GRUCell(width, width)

    def init_state(self, batch_size: int) -> State:
        weight = self.cell.weight_hh
        return {"hidden": torch.zeros(batch_size, self.width, device=weight.device, dtype=weight.dtype)}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        carried: Mapping[str, Tensor] = self.init_state(inputs.shape[0]) if state is None else state
        outputs = []
        for t in range(inputs.shape[1]):
            output, carried = self.step(inputs[:, t], carried, None if reset is None else reset[:, t])
            outputs.append(output)
        return torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs), dict(carried)

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        hidden = (self.init_state(input.shape[0]) if state is None else state)["hidden"]
        if reset is not None:
            hidden = hidden.masked_fill(reset[:, None], 0)
        hidden = self.cell(input, hidden)
        return hidden, {"hidden": hidden}


class TokenAttention(nn.Module):
    """Attention among the tokens of one step (Vaswani et al. 2017); without state."""

    mixes_tokens = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        return {}

    def forward(
        self, inputs: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``inputs`` (..., tokens, width)."""
        heads = self.in_proj(inputs).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(*heads)  # (..., heads, tokens, width / heads)
        return self.out_proj(mixed.transpose(-3, -2).flatten(-2)), {}

    def step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self(input, state, reset)


Taps = Annotated[int, Bounds(1, 4096)]
Expansion = Annotated[float, Bounds(0, 64, above=True)]


@dataclasses.dataclass(frozen=True)
class Block(Checked):
    """A kind of block.

    Attributes:
        kind: its name in configurations and ``--memory``.
    """

    kind: ClassVar[str]

    def check(self, width: int) -> None:
        """Raises ConfigurationError if ``width`` does not fit."""

    def build(self, width: int) -> nn.Module:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RotaryScanBlock(Block):
    """A Mamba block with rotating states, which distinguish lags.

    Attributes:
        d_state: real states per inner channel, even.
        groups: sets of B, C and angles.
        d_conv: convolution taps; 1 disables it.
        expand: inner channels per feature.
        selective_angle: whether the angle depends on the input.
        decay: initial -A.
    """

    kind: ClassVar[str] = "rotary_scan"
    d_state: Size = 16
    groups: Size = 4
    d_conv: Taps = 4
    expand: Expansion = 2
    selective_angle: bool = False
    decay: Annotated[float, Bounds(0, 1000, above=True)] = 0.5

    def check(self, width: int) -> None:
        if self.d_state % 2:
            raise ConfigurationError(f"RotaryScanBlock: d_state is {self.d_state}, expected an even number")
        _check_inner(self, width, self.expand, self.groups)

    def build(self, width: int) -> nn.Module:
        return RotaryMamba(
            width,
            self.d_state,
            d_conv=self.d_conv,
            expand=self.expand,
            groups=self.groups,
            selective_angle=self.selective_angle,
            decay=self.decay,
        )


@dataclasses.dataclass(frozen=True)
class ScanBlock(Block):
    """A Mamba block.

    Attributes:
        d_state: states per inner channel.
        groups: sets of B and C.
        d_conv: convolution taps; 1 disables it.
        expand: inner channels per feature.
    """

    kind: ClassVar[str] = "scan"
    d_state: Size = 16
    groups: Size = 4
    d_conv: Taps = 4
    expand: Expansion = 2

    def check(self, width: int) -> None:
        _check_inner(self, width, self.expand, self.groups)

    def build(self, width: int) -> nn.Module:
        return Mamba(width, self.d_state, self.d_conv, self.expand, groups=self.groups)


@dataclasses.dataclass(frozen=True)
class GatedConvBlock(Block):
    """A Mamba block without its scan; ``d_conv=1`` has no memory.

    Attributes:
        d_conv: convolution taps.
        expand: inner channels per feature.
    """

    kind: ClassVar[str] = "gated_conv"
    d_conv: Taps = 4
    expand: Expansion = 2

    def check(self, width: int) -> None:
        _check_inner(self, width, self.expand)

    def build(self, width: int) -> nn.Module:
        return GatedConv(width, self.d_conv, self.expand)


@dataclasses.dataclass(frozen=True)
class ConvLSTMBlock(Block):
    """A ConvLSTM layer; width = channels * height * width.

    Attributes:
        map_size: (height, width).
        kernel: side, odd.
    """

    kind: ClassVar[str] = "conv_lstm"
    map_size: tuple[Size, Size] = (4, 4)
    kernel: Annotated[int, Bounds(1, 255)] = 3

    def check(self, width: int) -> None:
        if self.kernel % 2 == 0:
            raise ConfigurationError(f"ConvLSTMBlock: kernel is {self.kernel}, expected an odd number")
        if width % math.prod(self.map_size):
            raise ConfigurationError(
                f"ConvLSTMBlock: map_size is {self.map_size} and width {width}, expected width to be channels * height "
                "* width"
            )

    def build(self, width: int) -> nn.Module:
        return MapLSTM(width, self.map_size, self.kernel)


@dataclasses.dataclass(frozen=True)
class GRUBlock(Block):
    """A GRU layer."""

    kind: ClassVar[str] = "gru"

    def build(self, width: int) -> nn.Module:
        return GRU(width)


@dataclasses.dataclass(frozen=True)
class TokenAttentionBlock(Block):
    """Attention among the tokens of a step.

    Attributes:
        heads: a divisor of the width.
    """

    kind: ClassVar[str] = "token_attention"
    heads: Size = 4

    def check(self, width: int) -> None:
        if width % self.heads:
            raise ConfigurationError(
                f"TokenAttentionBlock: heads is {self.heads} and width {width}, expected a divisor"
            )

    def build(self, width: int) -> nn.Module:
        return TokenAttention(width, self.heads)


@dataclasses.dataclass(frozen=True)
class CustomBlock(Block):
    """A user's ``nn.Module`` with the methods of ``GRU``. Reading a run imports its module if it is installed.

    With several tokens it runs on each alone, unless ``Class.mixes_tokens`` is true; then its inputs have a dimension
    of tokens before the last.

    Attributes:
        block: ``module:Class``, called with the width and ``options``.
        options: keyword arguments, plain values.

    Example:
        >>> CustomBlock("worldmodel.model.blocks:GRU").build(8)
        GRU(
          (cell): GRUCell(8, 8)
        )
    """

    kind: ClassVar[str] = "custom"
    block: Text
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, width: int) -> nn.Module:
        """Raises ConfigurationError for a class that cannot be built or is no block."""
        module_name, _, name = self.block.partition(":")
        expected = f"CustomBlock: block is {self.block!r}, expected module:Class"
        if not all(map(str.isidentifier, [*module_name.split("."), name])):
            raise ConfigurationError(expected)
        try:
            kind = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"{expected} that can be imported: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):  # the run's settings may name anything
            raise ConfigurationError(f"{expected} of a torch.nn.Module")
        if torch.get_default_device().type == "meta":  # to be counted
            with contextlib.suppress(Exception):  # a user's block may need values; then it counts nothing
                return kind(width, **self.options)
            return nn.Identity()
        try:
            block = kind(width, **self.options)
        except Exception as error:  # user code may raise anything
            raise ConfigurationError(
                f"CustomBlock: {self.block} cannot be called with ({width}, **{self.options}): "
                f"{type(error).__name__}: {error}"
            ) from error
        _check_interface(block, self.block, width)
        return block


BlockConfig = (
    RotaryScanBlock | ScanBlock | GatedConvBlock | ConvLSTMBlock | GRUBlock | TokenAttentionBlock | CustomBlock
)


def _check_inner(block: Block, width: int, expand: float, groups: int = 1) -> None:
    inner = int(expand * width)
    if inner < 1 or inner % groups:
        divisor = f" and groups {groups}, expected groups to divide" if inner else ", expected at least one of"
        raise ConfigurationError(
            f"{type(block).__name__}: expand is {expand}{divisor} the {inner} inner channels, expand * width = "
            f"{expand} * {width}"
        )


def mixes_tokens(block: nn.Module) -> bool:
    """Whether the block takes all tokens of a step, in a dimension before the last."""
    return bool(getattr(block, "mixes_tokens", False))


def _check_interface(block: Any, name: str, width: int) -> None:
    methods = {method: getattr(block, method, None) for method in ("init_state", "forward", "step")}
    if type(block).forward is nn.Module.forward:
        methods["forward"] = None
    missing = [method for method, function in methods.items() if not callable(function)]
    if missing:
        raise ConfigurationError(
            f"CustomBlock: {name} has no {', '.join(missing)}, expected init_state, forward and step"
        )
    like = next(block.parameters(), torch.zeros(()))
    tokens = (1,) if mixes_tokens(block) else ()
    inputs, reset = like.new_zeros(1, 2, *tokens, width), torch.zeros(1, 2, dtype=torch.bool, device=like.device)
    memory: Any = block
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            state = memory.init_state(1)
            outputs, after = memory(inputs, state, reset)
            output, stepped = memory.step(inputs[:, 0], state, reset[:, 0])
            shapes = {"forward": tuple(outputs.shape), "step": tuple(output.shape)}
        except Exception as error:  # user code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ConfigurationError(f"CustomBlock: {name} fails on two steps of zeros, {reason}") from error
    for method, expected in (("forward", (1, 2, *tokens, width)), ("step", (1, *tokens, width))):
        if shapes[method] != expected:
            raise ConfigurationError(f"CustomBlock: {name}.{method} returned {shapes[method]}, expected {expected}")
    described = _described(state)
    for method, found in (("forward", _described(after)), ("step", _described(stepped))):
        if found != described:
            raise ConfigurationError(
                f"CustomBlock: the state that {name}.{method} returned is {found}, expected that of init_state, "
                f"{described}"
            )


def _described(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return type(state).__name__
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for name, value in state.items()
    }
