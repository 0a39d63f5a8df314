"""How much memory there is, so that what a run asks for can be refused before it is allocated."""

import contextlib
import os
from pathlib import Path


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
