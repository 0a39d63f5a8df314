"""A memory block of the user's own class."""

import contextlib
import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from worldmodel.model.block import Block, mixes_tokens
from worldmodel.runs.fields import ConfigurationError, Text


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

    def build(self, width: int, tokens: int = 1) -> nn.Module:
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
