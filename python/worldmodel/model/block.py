"""What every kind of memory block is: a dataclass that builds a module."""

import dataclasses
from typing import ClassVar

from torch import nn

from worldmodel.runs.fields import Checked, ConfigurationError


@dataclasses.dataclass(frozen=True)
class Block(Checked):
    """A kind of block.

    Attributes:
        kind: its name in configurations and ``--memory``.
    """

    kind: ClassVar[str]

    def check(self, width: int, tokens: int = 1) -> None:
        """Raises ConfigurationError if ``width`` or the number of ``tokens`` does not fit."""

    def build(self, width: int, tokens: int = 1) -> nn.Module:
        raise NotImplementedError


def check_inner(block: Block, width: int, expand: float, groups: int = 1) -> None:
    """Raises ConfigurationError unless ``groups`` divides the inner channels, expand * width."""
    inner = int(expand * width)
    if inner < 1 or inner % groups:
        divisor = f" and groups {groups}, expected groups to divide" if inner else ", expected at least one of"
        raise ConfigurationError(
            f"{type(block).__name__}: expand is {expand}{divisor} the {inner} inner channels, expand * width = "
            f"{expand} * {width}"
        )


def check_heads(block: Block, width: int, expand: float, headdim: int, groups: int) -> None:
    """Raises ConfigurationError unless heads of ``headdim`` fill the inner channels and ``groups`` divides them."""
    check_inner(block, width, expand)
    name, inner = type(block).__name__, int(expand * width)
    if inner % headdim:
        raise ConfigurationError(
            f"{name}: headdim is {headdim}, expected a divisor of the {inner} inner channels, expand * width = "
            f"{expand} * {width}"
        )
    if inner // headdim % groups:
        raise ConfigurationError(f"{name}: groups is {groups}, expected a divisor of the {inner // headdim} heads")


def mixes_tokens(block: nn.Module) -> bool:
    """Whether the block takes all tokens of a step, in a dimension before the last."""
    return bool(getattr(block, "mixes_tokens", False))
