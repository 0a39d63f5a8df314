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


@pytest.mark.skipif(dispatch.load_native() is None, reason="no extension was built")
def test_a_member_that_the_structure_does_not_have_is_an_error():
    with pytest.raises(TypeError, match="linear_scan: there is no member 'initial'"):
        native_call.pack_args("linear_scan_forward", {"time": 1, "initial": 2}, torch.device("cpu"))


@pytest.mark.skipif(dispatch.load_native() is None, reason="no extension was built")
def test_a_kernel_of_another_build_is_prepared_and_does_not_run():
    native = native_call.native
    with pytest.raises(ValueError, match="there is no kernel 'cpu_linear_scan'"):
        native.prepare("cpu_linear_scan", {}, torch.device("cpu"))
    name = "cuda_selective_step"
    if name in native.kernels:
        return
    call = native.prepare(name, {"batch": 3}, torch.device("cpu"))
    assert call.layout[0] == ("batch", 1)
    assert call.words[0] == 3
    assert len(call.words) == sum(size for _, size in call.layout)
    with pytest.raises(RuntimeError, match=f"{name}: this build does not have it"):
        call.run()


@pytest.mark.skipif(dispatch.load_native() is None, reason="no extension was built")
@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ({"time": 2**64}, OverflowError, "too large|too big"),
        ({"time": 1.5}, TypeError, "integer"),
        ({"gates": 7}, TypeError, "gates must be a tuple of a tensor, a shape and a dtype"),
    ],
)
def test_what_no_member_holds_is_refused(members, error, message):
    with pytest.raises(error, match=message):
        native_call.pack_args("linear_scan_forward", members, torch.device("cpu"))
