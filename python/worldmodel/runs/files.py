"""Files in a run's folder, which may come from anyone.

Links are neither read nor written through, and nothing is believed before its size is known. Writing makes a new file,
which then takes the name: whatever had the name stays as it was elsewhere.
"""

import contextlib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_JSON = 2**24  # bytes of config.json
MOST_DEPTH = 64  # of nested JSON

# Of names and text: control characters, which a terminal obeys, and surrogates, which it cannot print.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class RunError(ValueError):
    """There is no run, it cannot be read or written, or it cannot be resumed."""


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A file's handle. Raises OSError as ``os.open``; RunError for a link, what is no file, or to write a hard link."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise linked(path) from error
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise RunError(f"{path} is not a regular file")
    if found.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR):
        os.close(handle)
        raise RunError(f"{path} is a hard link, and writing it would change a file elsewhere: remove it")
    return handle


def linked(path: Path) -> RunError:
    """What to say about a link."""
    return RunError(f"{path} is a symbolic link, which is not followed out of a run: put what it names in its place")


def read(path: Path, most: int) -> bytes:
    """The content. Raises OSError; RunError as ``open_file``, or for more than ``most`` bytes."""
    with os.fdopen(open_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise RunError(f"{path} has {size:,} bytes, expected at most {most:,}")
        return file.read(most)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new empty file beside ``path``, with its suffix, that takes its place once the block has written it.

    Raises OSError if it cannot be made or renamed. After any error ``path`` is as it was.
    """
    if not path.parent.is_dir():
        number = errno.ENOTDIR if path.parent.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(path.parent))
    beside = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        beside.unlink(missing_ok=True)  # left over, or a link
        os.close(open_file(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces the content. Raises OSError."""
    with replacing(path) as beside:
        beside.write_text(text)


def append(path: Path, line: str) -> None:
    """Appends all of ``line`` or nothing. Raises OSError; RunError as ``open_file``."""
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            file.write(line.encode())
            file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                file.close()  # its buffer cannot be written either
            os.truncate(path, size)
            raise


def sync_folder(folder: Path) -> None:
    """A rename is durable only once its folder is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shown(text: Any, most: int = 100) -> str:
    """Somebody else's text for a message: short, in a line, and without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split())[:most])


def check_part_name(name: str) -> str:
    """``name``, of a checkpoint's part, as a file name. Raises RunError for another path or strange characters."""
    if not _PART.fullmatch(name):
        raise RunError(f"{shown(name)} cannot name a part of a checkpoint, expected letters, digits and _")
    return name


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """Raises OSError; RunError as ``read``, or for what ``parse_json`` refuses."""
    try:
        return parse_json(read(path, most))
    except RunError:
        raise
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def parse_json(content: bytes) -> Any:
    """JSON in which names occur once and numbers are finite.

    Raises:
        ValueError: anything else, nesting deeper than ``MOST_DEPTH``, or text that no terminal should be given.

    Example:
        >>> parse_json(b'{"steps": 1, "steps": 2}')
        Traceback (most recent call last):
            ...
        ValueError: the name 'steps' occurs twice
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _checked_members(outer)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def _checked_members(value: Any) -> list[Any]:
    if isinstance(value, str) and _UNPRINTABLE.search(value):
        raise ValueError(f"the text {shown(value)!r} has control characters")
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {shown(name)!r} occurs twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.80} is not finite")
    return number
