"""No CUDA kernel spills registers."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("cuda_resources", ROOT / "scripts" / "cuda_resources.py")
cuda_resources = importlib.util.module_from_spec(specification)
specification.loader.exec_module(cuda_resources)


@pytest.fixture(scope="module")
def table():
    return json.loads(cuda_resources.TABLE.read_text())


def test_the_table_is_of_these_sources(table):
    assert table["sources"] == cuda_resources.digest(), "out of date: run scripts/cuda_resources.py"
    assert table["files"].keys() == {path.name for path in cuda_resources.sources()}
    assert cuda_resources.TABLE.with_suffix(".md").read_text() == cuda_resources.page(table)


def test_every_kernel_compiles_for_every_architecture_and_none_spills(table):
    for name, architectures in table["files"].items():
        assert architectures.keys() == set(cuda_resources.DEFAULT_ARCHITECTURES), name
        kernels = {architecture: set(found) for architecture, found in architectures.items()}
        assert all(found == kernels["90"] for found in kernels.values()), name
    assert not cuda_resources.failures(table["files"])


def test_the_gate_sees_a_spill(table):
    nothing = {"spill_stores": 0, "spill_loads": 0, "stack": 0, "registers": 255}
    for key in ("spill_stores", "spill_loads", "stack"):
        files = {"some.cu": {"90": {"good_kernel<double>": nothing, "some_kernel<float>": {**nothing, key: 4}}}}
        (failure,) = cuda_resources.failures(files)
        assert "some_kernel<float>" in failure


def test_the_table_is_what_the_compiler_says(table):
    """One file and architecture; ``scripts/cuda_resources.py --check`` checks all."""
    nvcc, reason = cuda_resources.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip(reason)
    if cuda_resources.nvcc_release(nvcc) != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}")
    name = "selective_step.cu"
    assert (
        cuda_resources.compile_one(nvcc, cuda_resources.CUDA / "selective_step" / name, "90")
        == table["files"][name]["90"]
    )
