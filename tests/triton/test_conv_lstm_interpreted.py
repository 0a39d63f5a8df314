import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("conv_lstm_interpreted.py")
GROUPS = {"update": 23, "at once": 10, "poison": 4, "infinite": 2}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed (it exists for Linux)"
)


@pytest.mark.gated("Triton interpreted")
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.canary if group == "poison" else ()) for group in GROUPS]
)
def test_interpreted_kernels_match_the_float64_reference(group: str) -> None:
    root = str(PROGRAM.parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, PROGRAM, group], capture_output=True, text=True, env=environment, timeout=600)
    print(f"{group}: {run.stdout.splitlines()[-1] if run.stdout else 'nothing ran'}")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == f"{GROUPS[group]} cases"
