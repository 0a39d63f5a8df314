"""The Triton kernels compile for every architecture without spills, as the checked-in table says."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gated("Triton compiled"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
        reason="the package triton is not installed (it exists for Linux)",
    ),
]


@pytest.mark.parametrize(
    ("architecture", "only"),
    [pytest.param(90, "linear_scan bf16", marks=pytest.mark.canary), *((a, "") for a in (80, 90, 100, 120))],
)
def test_kernels_compile_within_their_resources(architecture: int, only: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "scripts" / "triton_resources.py", "--check", "--arch", str(architecture)]
    command += ["--only", only]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    print(f"sm_{architecture}: {run.stdout.splitlines()[-1] if run.stdout else 'nothing compiled'}")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
