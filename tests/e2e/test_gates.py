"""Only tests with unchanged, passed sources may be skipped."""

import sys
from pathlib import Path

import gates
import laws
import pytest
from source_digest import code

pytest_plugins = ["pytester"]
TESTS = """
import pytest
pytestmark = pytest.mark.gated("kernels")
@pytest.mark.canary
def test_one(): pass
def test_two(): pass
def test_three(): pass  # last
"""


def test_prose_and_layout_change_no_digest_and_code_does() -> None:
    plain = 'def f(a):\n    """What it does."""\n    return a + 1  # why\n'
    assert code(plain, python=True) == code("# new\n\ndef f( a ):\n    return a+1\n", python=True)
    assert code(plain, python=True) != code(plain.replace("1", "2"), python=True)
    assert code("if a:\n    b()\nc()\n", python=True) != code("if a:\n    b()\n    c()\n", python=True)
    assert code('s = "a # b"\n', python=True) != code('s = "a"\n', python=True)
    assert code("int a;  // why\n", python=False) == code("int  a;\n", python=False)
    assert code("int a;\n", python=False) != code("int b;\n", python=False)


def test_a_group_is_closed_by_its_own_digest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernel.cu").write_text("int a;")
    monkeypatch.setattr(gates, "ROOT", tmp_path)
    monkeypatch.setattr(gates, "RECORD", tmp_path / "digests.json")
    monkeypatch.setattr(gates, "GATES", {name: gates.Gate(("*.cu",), ("pytest",)) for name in ("one", "other")})
    assert not gates.state("one").unchanged
    gates.record(["one"])
    assert gates.state("one").unchanged and not gates.state("other").unchanged
    assert (gates.main(["one"]), gates.main(["other"])) == (0, 1)
    monkeypatch.setattr(gates, "version", lambda package: "0")
    assert not gates.state("one").unchanged
    assert gates.main(["one", "--record"]) == 0 and gates.state("one").unchanged


def test_every_group_is_made_of_files_that_exist_and_has_a_canary(request: pytest.FixtureRequest) -> None:
    for group in gates.GATES:
        gates.current(group)  # raises for a pattern that matches no file
    collected = request.config.stash[laws.EVERY_TEST]
    groups = {item.get_closest_marker("gated").args[0] for item in collected if item.get_closest_marker("gated")}
    canaries = [item for item in collected if item.get_closest_marker("canary")]
    assert groups == {item.get_closest_marker("gated").args[0] for item in canaries}
    assert groups <= gates.GATES.keys()


def test_an_ordinary_run_leaves_out_what_is_unchanged_but_canaries_and_says_so(pytester: pytest.Pytester) -> None:
    root = pytester.mkdir("checkout")
    tests = root / "tests"
    (tests / "emulator").mkdir(parents=True)
    (root / "scripts").mkdir()
    for name in ("conftest.py", "tests/gates.py", "tests/laws.py", "scripts/source_digest.py"):
        (root / name).write_text((gates.ROOT / name).read_text())
    text = (tests / "gates.py").read_text()
    start, end = text.index("GATES = {"), text.index("def version")
    (tests / "gates.py").write_text(f'{text[:start]}GATES = {{"kernels": Gate(("kernel.cu",))}}\n\n\n{text[end:]}')
    (root / "kernel.cu").write_text("int a;")
    (root / "pytest.ini").write_text("[pytest]\ntestpaths = tests\npythonpath = tests\n")
    (tests / "emulator" / "test_it.py").write_text(TESTS)

    def run(*arguments: str, ci: str = "0") -> pytest.RunResult:
        with pytest.MonkeyPatch.context() as context:
            context.setenv("CI", ci)
            context.chdir(root)
            return pytester.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)

    result = run("-n", "0")
    assert result.parseoutcomes() == {"passed": 3} and "nothing of kernels (3 tests)" in result.stdout.str()
    result = run("--all", "--record", "-n", "2")
    assert result.parseoutcomes() == {"passed": 3}
    assert "recorded in tests/digests.json: kernels" in result.stdout.str()
    for arguments, ci in ((("-n", "2"), "0"), (("-n", "0", "tests/emulator"), "0"), (("-n", "0"), "1")):
        result = run(*arguments, ci=ci)
        assert result.parseoutcomes()["passed"] == 1
        assert "2 of 3 tests of kernels: passed in full with these sources" in result.stdout.str()
    for arguments in (("tests/emulator/test_it.py",), ("-n", "0", "--all")):
        assert run(*arguments).parseoutcomes() == {"passed": 3}
    (root / "kernel.cu").write_text("int b;")
    (tests / "emulator" / "test_it.py").write_text(TESTS.replace("pass  # last", "assert False"))
    result = run("--all", "--record", "-n", "0")  # the group has a failure
    assert result.parseoutcomes() == {"passed": 2, "failed": 1}
    assert "not recorded, for not all of it passed: kernels" in result.stdout.str()
    result = run("--all", "--record", "-k", "one")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "--record goes with --all" in result.stderr.str()
