"""The PTX of the Triton kernels, run on the CPU, agrees with the reference."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("triton_compiled.py")
PARTS = {
    "one linear scan": (54, ["linear"]),
    "steps and linear scans": (6, ["step", "linear"]),
    "selective scans": (6, ["scan: state sizes", "scan: time", "scan: resets", "scan: packed", "scan: options"]),
    "places": (5, ["place"]),
    "delta rule": (9, ["delta rule"]),
    "dtypes and poison": (9, ["scan: dtypes", "poison"]),
}

pytestmark = [
    pytest.mark.gated("Triton executed"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
        reason="the package triton is not installed (it exists for Linux)",
    ),
]


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.canary if part == "one linear scan" else ()) for part in PARTS]
)
def test_compiled_kernels_match_the_float64_reference(part: str) -> None:
    every, groups = PARTS[part]
    path = [str(PROGRAM.parent.parent), str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, str(PROGRAM), *groups, "--every", str(every)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    print(f"{part}: {run.stdout.splitlines()[-1] if run.stdout else 'nothing ran'}")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "cases" in run.stdout.splitlines()[-1]
