"""How much memory there is, so that what a run asks for can be refused beforehand; and freed memory, kept."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

KEPT_BLOCK = 128 * 2**20  # bytes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine, or of this process's control groups where they allow less; ``root`` is for tests."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "sys" / "fs" / "cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc" / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
            inner = top / path.strip("/")
            for folder in [inner, *inner.parents]:
                with contextlib.suppress(OSError, ValueError):  # "max"
                    found.append(int((folder / name).read_text()))
    return min(found)


def keep_freed_memory() -> bool:
    """Makes glibc's allocator keep freed blocks of up to ``KEPT_BLOCK`` for this process; returns whether it does.

    By default it gives blocks of 32 MiB and more back at once, and the end of the heap when 64 MiB of it are free. The
    arrays of an update on pictures are as large, so every update gets them page by page anew. What the environment says
    of ``malloc``, by ``MALLOC_...``, ``GLIBC_TUNABLES`` or a preloaded library, stays.
    """
    said = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if said or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
    if mallopt is None or not mallopt(_MMAP_THRESHOLD, KEPT_BLOCK):  # older versions refuse it
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1))
