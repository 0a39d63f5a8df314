"""One writer per run: a lock on ``RUN/lock``, which the kernel releases however the process ends. So for worlds."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path

from worldmodel.runs.files import RunError, open_file

LOCK = "lock"
_MOST = 4096  # bytes that are read of it


def _refused(folder: Path, owner: str) -> str:
    return (
        f"{folder} is being written by {owner}, and a run has one writer: wait for it, end it (it saves first), or "
        "begin another run"
    )


class Lock:
    """Held from the constructor until ``release``, or until nothing refers to it.

    Args:
        folder: of the file.
        name: of the file.
        refused: message where it is held, of the folder and the owner.

    Attributes:
        path: of the file.

    Raises:
        RunError: another process, or another ``Lock`` in this one, holds it; says who and since when.
        OSError: the file cannot be written, or its file system has no locks.
    """

    def __init__(self, folder: Path, name: str = LOCK, refused: Callable[[Path, str], str] = _refused) -> None:
        self.path = path = folder / name
        handle = open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            _lock(handle, path, refused)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        _held.add(handle)
        self.release = weakref.finalize(self, _release, handle)


def _lock(handle: int, path: Path, refused: Callable[[Path, str], str]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            owner = _described(os.pread(handle, _MOST, 0))
            raise RunError(refused(path.parent, owner)) from error
        reason = f"{os.strerror(error.errno or 0)}; a run needs a file system with locks"
        raise OSError(error.errno, reason, str(path)) from error


def _described(content: bytes) -> str:
    """Who wrote the lock's content; anyone may have, so only what is expected is said."""
    try:
        owner = json.loads(content)
        since = datetime.datetime.fromisoformat(owner["since"]).isoformat(" ")
        host = "".join(letter for letter in str(owner["host"])[:64] if letter.isprintable())
        return f"process {int(owner['pid'])} on {host} since {since}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return "another process"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat()


_held: set[int] = set()


def _release(handle: int) -> None:
    if handle in _held:  # else a forked child has closed it
        _held.remove(handle)
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)


def _forget() -> None:
    """A forked child, such as an environment's, must not keep the lock when its parent is killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
