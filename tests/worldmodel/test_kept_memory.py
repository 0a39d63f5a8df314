"""Freed memory that the allocator keeps: without, every update of pictures gets its arrays page by page."""

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource
from worldmodel.runs.memory import KEPT_BLOCK, keep_freed_memory
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(KEPT_BLOCK - 2**20)))
        ctypes.memset(block, 1, KEPT_BLOCK - 2**20)
        library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(kept, faults())
"""
_PAGES = 127 * 2**20 // 4096
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def _run(**given: str) -> tuple[str, int]:
    said = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(said)} | given
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environ, capture_output=True, text=True, timeout=60)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@glibc
def test_blocks_are_kept_so_that_their_pages_are_there_when_they_come_again() -> None:
    kept, faults = _run()
    assert kept == "True"
    assert faults < _PAGES / 100


@glibc
@pytest.mark.parametrize("given", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_what_the_environment_says_of_malloc_stays(given: dict[str, str]) -> None:
    kept, faults = _run(**given)
    assert kept == "False"
    assert faults > 4 * _PAGES  # those of each block
