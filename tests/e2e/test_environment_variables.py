import os
import subprocess
import sys

import pytest
from backends import instruction_sets


@pytest.mark.parametrize("requested", ["reference", "chunked", "cpu", "triton"])
def test_the_environment_asks_for_a_backend(requested):
    code = (
        "import torch, wmkernels\n"
        "from wmkernels import dispatch\n"
        "assert dispatch.REQUESTED == " + repr(requested) + "\n"
        "x = torch.rand(1, 2, 3)\n"
        "wmkernels.linear_scan(x, x)\n"
    )
    environment = os.environ | {"WMKERNELS_BACKEND": requested}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if requested == "triton":
        assert "linear_scan: backend 'triton' cannot run this call (tensors on cpu" in done.stderr
        assert done.returncode == 1
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("level", [*instruction_sets()[-1:], "v9"])
def test_the_environment_asks_for_an_instruction_set(level):
    code = "from wmkernels.dispatch import load_native\nprint(load_native().cpu_isa())\n"
    environment = os.environ | {"WMKERNELS_CPU_ISA": level}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if level == "v9":
        assert done.returncode == 1
        assert "WMKERNELS_CPU_ISA=v9: there is no instruction-set level 'v9' here" in done.stderr
    else:
        assert done.stdout.strip() == level, done.stderr
