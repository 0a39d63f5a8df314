"""Forks ``worldmodel`` commands, so that the slow import happens once.

Standard input: a JSON list of arguments starts a process and prints its id; an empty line waits for it and prints its
exit status. Until then the id stays valid.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "python"))  # first: tests/worldmodel is no package

import worldmodel_environments  # noqa: F401 - so that no process imports it again

import worldmodel.commands.train  # noqa: F401
from worldmodel.__main__ import main


def serve() -> None:
    """This process computes nothing, so it has no threads that a fork would lose."""
    child = 0
    for line in sys.stdin:
        if not line.strip():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            status = 1
            os.dup2(2, 1)  # reserved for ids and statuses
            try:
                status = main(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
