"""What the extension asks of the memory that it is handed."""

import re
from pathlib import Path

import pytest
import torch

from wmkernels import dispatch, native_call

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="this system has no large pages")
@pytest.mark.skipif(dispatch.load_native() is None, reason="no extension was built")
def test_fresh_memory_of_a_large_output_asks_for_large_pages():
    out = torch.empty(64 << 20, dtype=torch.uint8)
    native_call.output(out)
    middle, inside, flags = out.data_ptr() + out.nbytes // 2, False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= middle < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags"):
            flags = line.split()
    assert "hg" in flags
