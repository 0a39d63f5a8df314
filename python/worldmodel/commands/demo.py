"""``demo``: demonstrations."""

from collections.abc import Sequence

from worldmodel.commands.command_line import parse
from worldmodel.demo.command import main


def command(arguments: Sequence[str]) -> int:
    """Runs a demonstration."""
    return main(arguments, parse)
