"""The command line: ``python -m worldmodel COMMAND``."""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from worldmodel.runs.memory import keep_freed_memory
from worldmodel.runs.optional_dependencies import MissingPackage

USAGE = """usage: python -m worldmodel COMMAND [options]

  train       train a world model on an environment
  train-world train a world that stays: what is seen where, to be saved, edited and entered again
  imitate     learn a policy from recorded demonstrations
  evaluate    run whole episodes with what was trained
  plan        run whole episodes by planning in what was trained, towards goals
  plot        draw returns, losses or other metrics of runs as curves, a PNG
  imagine     draw what was observed, reconstructed and imagined open-loop, as a PNG and a GIF
  record      record episodes of an environment in a file, to train from
  play        walk through a world in a browser or a terminal, edit, fork and save it
  demo        show what it does: `demo memory`, `worlds`, `radar` or `plan`, minutes on two cores

python -m worldmodel COMMAND --help explains the options.
"""


COMMANDS = ("train", "train-world", "imitate", "evaluate", "plan", "plot", "imagine", "record", "play", "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; user errors print one line to stderr, as does Ctrl-C, with exit status 130."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] not in COMMANDS:
        print(f"there is no command {given[0]!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    let_waiting_threads_sleep()
    keep_freed_memory()
    with _Signals() as signals:
        try:
            status = int(
                importlib.import_module(f"worldmodel.commands.{given[0].replace('-', '_')}").command(given[1:])
            )
            sys.stdout.flush()  # a closed pipe is reported here, not at exit
            return status
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or signals.interrupted:  # an import turns it into other errors
                _say(str(error) if isinstance(error, KeyboardInterrupt) and str(error) else "interrupted")
                return 128 + signal.SIGINT
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it at exit
                return 128 + 13  # as SIGPIPE
            if isinstance(error, MissingPackage):
                _say(str(error))
            elif isinstance(error, OSError) or type(error).__module__.startswith("worldmodel"):
                _say(f"error: {error}")
            else:
                raise
            return 1


def let_waiting_threads_sleep() -> None:
    """Makes OpenMP's threads sleep while they wait, unless the environment says how they wait.

    Waiting threads spin by default. On a busy machine they keep the core that the thread they wait for needs. This
    counts only before torch is imported.
    """
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = "1000"  # microseconds: the next loop often follows at once


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        print(" ".join(text.splitlines()), file=sys.stderr)


class _Signals:
    """Remembers Ctrl-C; SIGTERM and SIGHUP end the command as an exception does, so that it cleans up."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: dict[int, Any] = {}
        self._thread_hook = threading.excepthook

    def __enter__(self) -> "_Signals":
        threading.excepthook = self._thread_failed
        if threading.current_thread() is threading.main_thread():
            for name, default in (
                ("SIGINT", signal.default_int_handler),
                ("SIGTERM", signal.SIG_DFL),
                ("SIGHUP", signal.SIG_DFL),
            ):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        threading.excepthook = self._thread_hook
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            raise SystemExit(128 + number)
        self.interrupted = True
        raise KeyboardInterrupt

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread raises its error in the main thread as well."""
        if failed.exc_type is None or not issubclass(failed.exc_type, OSError):
            self._thread_hook(failed)


def working_directory_last(imported: Sequence[str] = ()) -> None:
    """A file there, perhaps of somebody's run, must not be taken for an installed module.

    Packages that look for others and for plugins are ``imported`` without it.
    """
    here = os.path.realpath(os.getcwd())
    sys.path.sort(key=lambda entry: os.path.realpath(entry) == here)  # the others keep their order
    ordered = list(sys.path)
    sys.path[:] = [entry for entry in ordered if os.path.realpath(entry) != here]
    for name in imported:
        with contextlib.suppress(ImportError):  # reported when it is needed
            importlib.import_module(name)
    sys.path[:] = ordered


if __name__ == "__main__":
    let_waiting_threads_sleep()
    working_directory_last(("torch", "gymnasium", "tyro") if sys.argv[1:2] and sys.argv[1] in COMMANDS else ())
    sys.exit(main())
