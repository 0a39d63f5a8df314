"""The command line: ``python -m worldmodel train | evaluate | imagine | demo``."""

import importlib
import sys
from collections.abc import Sequence

from worldmodel.runs.optional_dependencies import MissingPackage

USAGE = """usage: python -m worldmodel COMMAND [options]

  train       train a world model on an environment
  evaluate    run whole episodes with what was trained
  imagine     draw what was observed, reconstructed and imagined open-loop, as a PNG and a GIF
  demo        show what the memory does: `demo memory`, under three minutes on two cores

python -m worldmodel COMMAND --help explains the options.
"""


COMMANDS = ("train", "evaluate", "imagine", "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; user errors print one line to stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] not in COMMANDS:
        print(f"there is no command {given[0]!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"worldmodel.commands.{given[0]}").command(given[1:]))
    except MissingPackage as error:
        print(error, file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("worldmodel"):
            raise
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
