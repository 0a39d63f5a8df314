"""The build compiles only what changed, and reports the reasons of its choices."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from build_tools import cuda, native, ninja_file, toolchain
from build_tools.report import Report
from wmkernels import dispatch, info
from wmkernels.registry import op_names

ROOT = Path(__file__).resolve().parents[2]
BUILT = info.build_info()
KERNEL = """
#include "cpu/shared.h"
#define PASTE(a, b) a##b
#define NAME(level) PASTE(kernel_, level)
extern "C" int NAME(WMK_ISA)() { return ANSWER; }
"""
BINDINGS = """
#include <Python.h>
extern "C" int helper();
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native"};
PyMODINIT_FUNC PyInit__native() {
  PyObject* made = PyModule_Create(&module);
  PyModule_AddIntConstant(made, "answer", helper());
  return made;
}
"""

FAKE_NVCC = """
case "$1" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.1";;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n';;
  *) {rest};;
esac
"""

needs_compiler = pytest.mark.skipif(toolchain.find_compiler(os.environ)[0] is None, reason="there is no C++ compiler")


def write_program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(autouse=True)
def nothing_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of builds, whatever those who run the tests ask of theirs."""
    monkeypatch.delenv("WMKERNELS_REQUIRE_NATIVE", raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for folder in ("python", "cpu/dispatch", "cpu/op"):
        (root / "csrc" / folder).mkdir(parents=True)
    (root / "csrc/python/bindings.cpp").write_text(BINDINGS)
    (root / "csrc/cpu/shared.h").write_text("#define ANSWER 42\n")
    (root / "csrc/cpu/dispatch/helper.cpp").write_text(
        '#include "cpu/shared.h"\nextern "C" int helper() { return ANSWER; }\n'
    )
    (root / "csrc/cpu/op/kernel.cpp").write_text(KERNEL)
    (root / "csrc/cpu/op/api.cpp").write_text('extern "C" int api() { return 1; }\n')
    return root


def build(root: Path, **environ: str) -> Report:
    return native.build(root, root / "wmkernels", "0.0.1", {**os.environ, "WMKERNELS_CUDA": "0", **environ})


def compiled_since(root: Path, before: dict[Path, int]) -> set[str]:
    """Objects newer than ``before``."""
    return {path.name for path, time in object_times(root).items() if before.get(path) != time}


def object_times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "build").rglob("*.o")}


def change(source: Path) -> None:
    source.write_text(source.read_text() + "\n// changed\n")


@needs_compiler
def test_second_build_compiles_nothing_and_a_third_only_what_changed(project: Path) -> None:
    report = build(project)
    answer = [sys.executable, "-c", "import _native; print(_native.answer)"]
    assert subprocess.check_output(answer, cwd=project / "wmkernels", text=True).strip() == "42"
    assert report.cpu_levels and (project / "wmkernels" / report.extension).exists()
    kernels = {f"kernel.{level}.o" for level in report.cpu_levels}

    before = object_times(project)
    assert {path.name for path in before} == kernels | {"api.o", "helper.o", "bindings.o"}
    build(project)
    assert compiled_since(project, before) == set()

    change(project / "csrc/cpu/dispatch/helper.cpp")
    build(project)
    assert compiled_since(project, before) == {"helper.o"}

    before = object_times(project)
    (project / "csrc/cpu/shared.h").write_text("#define ANSWER 43\n")
    build(project)
    assert compiled_since(project, before) == kernels | {"helper.o"}
    assert subprocess.check_output(answer, cwd=project / "wmkernels", text=True).strip() == "43"


@needs_compiler
def test_headers_of_pybind11_that_moved_but_did_not_change_compile_nothing(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pybind11

    original = Path(pybind11.get_include())
    target = project / native.mirror_pybind11(project)
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*.h")}
    moved = shutil.copytree(original, tmp_path / "elsewhere", copy_function=shutil.copy)
    monkeypatch.setattr(pybind11, "get_include", lambda: str(moved))
    assert project / native.mirror_pybind11(project) == target
    assert times and times == {path: path.stat().st_mtime_ns for path in target.rglob("*.h")}


@needs_compiler
@pytest.mark.parametrize("cxx", ["", "c++"], ids=["found", "named"])
def test_a_kernel_that_does_not_compile_leaves_the_reference(
    cxx: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert build(project, CXX=cxx).extension
    (project / "csrc/cpu/op/kernel.cpp").write_text("this is not C++\n")
    report = build(project, CXX=cxx)
    message = r"the kernels do not compile: csrc/cpu/op/kernel\.cpp:1:1: error: .*this"
    assert not report.extension and re.match(message, report.extension_reason)
    assert not (project / "wmkernels" / native.extension_name()).exists(), "the earlier build's kernels are gone"
    assert f"not built: {report.extension_reason}" in report.block()
    recorded = json.loads((project / "wmkernels/_build_info.json").read_text())
    assert recorded["extension_reason"] == report.extension_reason
    assert f"extension     not built: {report.extension_reason}" in info._build_lines(recorded)
    assert "this is not C++" in capfd.readouterr().out, "the compiler's own words stay visible"


@needs_compiler
def test_a_kernel_that_does_not_compile_stops_a_build_that_asks_for_it(project: Path) -> None:
    (project / "csrc/cpu/op/kernel.cpp").write_text("this is not C++\n")
    with pytest.raises(toolchain.BuildError, match=r"WMKERNELS_REQUIRE_NATIVE=1, but .*kernel\.cpp:1:1: error"):
        build(project, CXX="", WMKERNELS_REQUIRE_NATIVE="1")
    empty = project / "empty"
    empty.mkdir()
    with pytest.raises(toolchain.BuildError, match=r"WMKERNELS_REQUIRE_NATIVE=1, but .*not found"):
        build(project, PATH=str(empty), CXX="", WMKERNELS_REQUIRE_NATIVE="1")


@needs_compiler
def test_a_cuda_kernel_that_does_not_compile_leaves_the_cpu_kernels(project: Path, tmp_path: Path) -> None:
    (project / "csrc/cuda/op").mkdir(parents=True)
    (project / "csrc/cuda/op/kernel.cu").write_text("")
    script = FAKE_NVCC.format(
        rest='case "$*" in *kernel.cu*) echo "kernel.cu(1): error: planted"; exit 1;; esac; exit 0'
    )
    nvcc = write_program(tmp_path / "bin/nvcc", script)
    environ = {"CXX": "", "WMKERNELS_CUDA": "", "PATH": f"{nvcc.parent}:{os.environ['PATH']}", "CUDA_HOME": ""}
    report = build(project, **environ)
    assert report.extension and not report.cuda and report.cuda_reason.endswith("kernel.cu(1): error: planted")
    assert f"CUDA kernels  not built: {report.cuda_reason}" in report.block()
    for asked in ("WMKERNELS_CUDA", "WMKERNELS_REQUIRE_NATIVE"):
        with pytest.raises(toolchain.BuildError, match=f"{asked}=1, but .*error: planted"):
            build(project, **environ | {asked: "1"})


def test_without_a_compiler_the_build_succeeds_and_says_why(project: Path) -> None:
    empty = project / "empty"
    empty.mkdir()
    stale = project / "wmkernels" / native.extension_name()
    stale.parent.mkdir()
    stale.touch()
    report = build(project, PATH=str(empty), CXX="")
    assert not report.extension and "not found" in report.extension_reason
    assert (
        json.loads((project / "wmkernels/_build_info.json").read_text())["extension_reason"] == report.extension_reason
    )
    assert not stale.exists(), "an extension of an earlier build would run kernels that the report denies"
    assert "extension     not built" in report.block()
    with pytest.raises(toolchain.BuildError, match="WMKERNELS_CUDA=1"):
        build(project, PATH=str(empty), CXX="", WMKERNELS_CUDA="1")


@needs_compiler
def test_pip_takes_the_wheel_with_kernels_where_it_has_both(project: Path, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "build_tools", project / "build_tools")
    (project / "wmkernels").mkdir()
    (project / "wmkernels/__init__.py").touch()
    (project / "python/worldmodel").mkdir(parents=True)
    wheels = tmp_path / "wheels"
    environ = {**os.environ, "WMKERNELS_CUDA": "0", "CXX": "", "WMKERNELS_REQUIRE_NATIVE": "", "PYTHONPATH": ""}
    for path, tag in ((str(tmp_path / "nowhere"), "py3-none-any"), (os.environ["PATH"], "cp*")):
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(wheels)]
        subprocess.run(command, cwd=project, env={**environ, "PATH": path}, check=True, capture_output=True)
        assert len(list(wheels.glob(f"wmkernels-*-{tag}.whl"))) == 1, sorted(wheels.iterdir())
    command = [sys.executable, "-m", "pip", "-q", "install", "--no-index", "--no-deps", "--find-links", str(wheels)]
    subprocess.run([*command, "--target", str(tmp_path / "installed"), "wmkernels"], check=True, env=environ)
    assert (tmp_path / "installed/wmkernels" / native.extension_name()).exists()


@needs_compiler
def test_what_the_compiler_cannot_do_is_left_out_and_reported(project: Path, tmp_path: Path) -> None:
    compiler, _ = toolchain.find_compiler(os.environ)
    assert compiler is not None
    limited = write_program(
        tmp_path / "limited-c++",
        'for word in "$@"; do case "$word" in -fopenmp|-march=x86-64-v4) echo "error: no $word"; exit 1;; esac; done\n'
        f'exec {compiler.command[-1]} "$@"\n',
    )
    report = build(project, CXX=str(limited))
    assert report.extension and not report.openmp and report.openmp_reason == "error: no -fopenmp"
    if toolchain.machine_name() == "x86_64":
        assert report.cpu_levels == ["v3", "portable"]
        assert report.cpu_levels_missing == {"v4": "error: no -march=x86-64-v4"}
        assert "not v4: error: no -march=x86-64-v4" in report.block()


@pytest.fixture
def fake_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """CUDA detection with a working or failing nvcc."""
    monkeypatch.setattr(cuda, "USUAL_PLACE", str(tmp_path / "nowhere"))
    works = write_program(tmp_path / "works/bin/nvcc", FAKE_NVCC.format(rest="exit 0"))
    write_program(tmp_path / "broken/bin/nvcc", FAKE_NVCC.format(rest='echo "error: unsupported host"; exit 1'))
    compiler = toolchain.Compiler((str(works),), "fake", (), ())

    def decide(has_sources: bool = True, **environ: str):
        environ = {name: value.replace("TMP", str(tmp_path)) for name, value in environ.items()}
        environ.setdefault("PATH", str(tmp_path / "empty"))
        return cuda.find_cuda(environ, compiler, toolchain.Prober(), has_sources)

    return decide


@pytest.mark.parametrize(
    "environ",
    [
        {"WMKERNELS_NVCC": "TMP/works/bin/nvcc", "CUDA_HOME": "TMP/broken"},
        {"CUDA_HOME": "TMP/works", "PATH": "TMP/broken/bin"},
        {"CUDA_HOME": "TMP/empty", "PATH": "TMP/works/bin"},
        {"PATH": "TMP/works/bin", "WMKERNELS_CUDA": "1"},
    ],
)
def test_nvcc_is_looked_for_in_order(fake_cuda, environ: dict[str, str]) -> None:
    found, reason = fake_cuda(**environ)
    assert reason == "" and "/works/bin/nvcc" in found.nvcc
    assert (found.version, found.architectures) == ("12.4", ("80", "90"))
    assert found.code_flags == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PATH": "TMP/works/bin", "WMKERNELS_CUDA": "0"}, "WMKERNELS_CUDA=0"),
        ({}, "nvcc not found"),
        ({"PATH": "TMP/broken/bin"}, "does not work: error: unsupported host"),
        ({"PATH": "TMP/works/bin", "WMKERNELS_NVCC": "TMP/missing"}, "is not a program"),
    ],
)
def test_cuda_is_left_out_with_a_reason_unless_asked_for(fake_cuda, environ: dict[str, str], expected: str) -> None:
    found, reason = fake_cuda(**environ)
    assert found is None and expected in reason
    if "WMKERNELS_CUDA" not in environ:
        with pytest.raises(toolchain.BuildError, match=r"WMKERNELS_CUDA=1.*" + re.escape(expected)):
            fake_cuda(**environ, WMKERNELS_CUDA="1")


def test_architectures_can_be_chosen_among_those_that_nvcc_has(fake_cuda) -> None:
    environ = {"PATH": "TMP/works/bin"}
    assert fake_cuda(**environ, WMKERNELS_CUDA_ARCHS="9.0;80")[0].architectures == ("80", "90")
    assert fake_cuda(**environ, WMKERNELS_CUDA_ARCHS="90a")[0].architectures == ("90a",)
    with pytest.raises(toolchain.BuildError, match=r"names '120'; this nvcc compiles for 80, 90"):
        fake_cuda(**environ, WMKERNELS_CUDA_ARCHS="80,120")
    with pytest.raises(toolchain.BuildError, match="expected 0"):
        fake_cuda(**environ, WMKERNELS_CUDA="yes")


@needs_compiler
@pytest.mark.skipif(cuda.find_nvcc(os.environ)[0] is None, reason="there is no nvcc")
def test_the_probe_kernel_compiles_with_nvcc_and_is_not_compiled_twice(project: Path) -> None:
    shutil.copytree(
        ROOT / "csrc/cuda/common",
        project / "csrc/cuda/common",
        ignore=lambda _, names: {*names} - {"device_check.cu", "device_check.h"},
    )
    for folder in ("include", "common"):
        shutil.copytree(ROOT / "csrc" / folder, project / "csrc" / folder)
    options = {"WMKERNELS_CUDA": "1", "WMKERNELS_CUDA_ARCHS": "90"}
    report = build(project, **options)
    assert report.cuda and report.cuda_architectures == ["90"]
    before = object_times(project)
    build(project, **options)
    assert compiled_since(project, before) == set()
    build(project)
    assert {name for name in compiled_since(project, before)} == {"bindings.o"}, "kernels are shared by configurations"


@needs_compiler
def test_the_bindings_compile_without_a_warning() -> None:
    compiler, _ = toolchain.find_compiler(os.environ)
    assert compiler is not None
    headers = {native.mirror_pybind11(ROOT), sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-Icsrc"]
    system = [f"-isystem{folder}" for folder in headers]
    subprocess.run([*compiler.command, *flags, *system, "csrc/python/bindings.cpp"], check=True, cwd=ROOT)


def escaping_symbols(listing: str, level: str) -> list[str]:
    """Weak symbols without the level in their name, which another level's object may replace."""
    weak = [line.split(maxsplit=2) for line in listing.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)]
    # compiler-generated, the same for every level
    return [name for _, _, name in weak if f"wmk::{level}::" not in name and not name.startswith("DW.ref.")]


@pytest.mark.skipif(not BUILT.get("objects"), reason="the package was installed without its build folder")
def test_no_standard_library_template_escapes_its_instruction_set() -> None:
    objects = sorted((ROOT / BUILT["objects"] / "cpu").glob("*/*.o"))
    kernels = (ROOT / "csrc/cpu").glob("*/*.cpp")
    sources = {path.stem for path in kernels if not ninja_file.is_compiled_once(path)}
    checked = 0
    for path in objects:
        source, level = path.name.split(".")[:2]
        if source in sources and level in BUILT["cpu_levels"]:
            listing = subprocess.check_output(["nm", "-C", str(path)], text=True)
            assert escaping_symbols(listing, level) == [], path.name
            checked += 1
    assert checked == len(sources) * len(BUILT["cpu_levels"])


@needs_compiler
def test_an_escaping_template_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(
        "#include <vector>\nnamespace wmk::v4 { struct Own {}; template <class T> int size() { return sizeof(T); }\n"
        "int use(std::vector<double>& x) { x.push_back(1); return size<Own>(); } }\n"
    )
    compiler, _ = toolchain.find_compiler(os.environ)
    assert compiler is not None
    subprocess.run([*compiler.command, "-c", "-std=c++17", str(source), "-o", str(tmp_path / "kernel.o")], check=True)
    listing = subprocess.check_output(["nm", "-C", str(tmp_path / "kernel.o")], text=True)
    escaping = escaping_symbols(listing, "v4")
    assert any("vector<double" in name for name in escaping)
    assert not any("size<wmk::v4::Own>" in name for name in escaping)


def described_kernels() -> dict[str, list[tuple[str, int]]]:
    """Members and sizes in words of each kernel's structure in csrc/include."""
    words = {"INT": 1, "POINTER": 1, "VIEW": 5}
    structures: dict[str, list[tuple[str, int]]] = {}
    kernels = {}
    for path in sorted((ROOT / "csrc/include").glob("*.inc")):
        text = re.sub(r"//.*", "", path.read_text())
        for name, members in re.findall(r"WMK_STRUCT\((\w+)\)(.*?)WMK_STRUCT_END", text, re.DOTALL):
            structures[name] = [(member, words[kind]) for kind, member in re.findall(r"WMK_(\w+)\((\w+)\)", members)]
        for device, structure, name in re.findall(r"WMK_(CPU|CUDA)_KERNEL\w*\((\w+), (\w+)\)", text):
            kernels[f"{device.lower()}_{name}"] = structures[structure]
    return kernels


@pytest.mark.skipif(dispatch.load_native() is None, reason="the extension was not built")
def test_the_extension_has_the_kernels_that_the_headers_describe() -> None:
    extension, kernels = dispatch.load_native(), described_kernels()
    assert {name for name in kernels if name.startswith("cpu_")} == {
        k for k in extension.kernels if k.startswith("cpu_")
    }
    for name, members in kernels.items():
        assert extension.prepare(name, {}, None).layout == members, name


def test_the_build_and_the_list_of_ops_find_the_same_ops() -> None:
    listed = set(re.findall(r'include "include/(\w+)\.inc"', (ROOT / "csrc/common/ops.h").read_text()))
    assert listed == {path.stem for path in (ROOT / "csrc/include").glob("*.inc")}
    assert listed == {path.parent.name for path in (ROOT / "csrc/cpu").glob("*/api.cpp")}
    assert listed == set(op_names())


def test_info_says_what_there_is_as_text_and_as_json() -> None:
    command = [sys.executable, "-m", "wmkernels.info"]
    found = json.loads(subprocess.check_output([*command, "--json"], text=True, cwd=ROOT))
    assert set(found["backends"]) == set(found["gpu_verification"]) == set(op_names())
    for backends in found["backends"].values():
        assert set(backends) == set(dispatch.BACKENDS)
        assert backends["reference"] == backends["chunked"] == []
        assert (backends["cpu"] == []) == bool(found["build"]["extension"])
    assert set(found["environment"]) == set(info.ENVIRONMENT)
    shown = info.text(found)
    assert "not held against the reference on any GPU: runs only when asked for by name" in shown
    assert "held against the reference on sm_90; not tried on sm_80, sm_100, sm_120" in info.text(
        {**found, "gpu_verification": info.gpu_verification({"cuda_architectures": [80, 90, 100, 120]})}
    )
    assert found["versions"]["torch"] in shown
    for level in found["instruction_sets"]["available"]:
        assert level in shown


@pytest.mark.skipif(not BUILT.get("openmp"), reason="the extension was built without OpenMP")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which libraries are loaded")
def test_the_extension_runs_on_the_openmp_of_torch() -> None:
    program = (
        "import json, torch\n"
        "before = open('/proc/self/maps').read()\n"
        "import wmkernels.info as info\n"
        "print(json.dumps([before, info.collect()['openmp']]))"
    )
    before, openmp = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT))
    assert openmp["in_use"] in openmp["loaded"]
    assert openmp["in_use"] in before, "torch's threads and the kernels' would compete for the processors"


def test_compile_commands_hold_no_path_of_a_temporary_folder() -> None:
    compiler = toolchain.Compiler(("/usr/bin/c++",), "1", (), ())
    plan = ninja_file.Plan(ROOT, Path("build/x"), compiler, True, {"v3": ("-march=x86-64-v3",)}, None, Path("build/p"))
    assert "-Ibuild/p" in ninja_file.ninja_text(plan)
    assert str(ROOT) not in ninja_file.ninja_text(plan)
