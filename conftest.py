"""Parallel workers, folder markers, digest gates (tests/gates.py) and time limits.

pytest                     all cores; a single process for one file, one test or --pdb
pytest -m core             one folder: core, emulator, triton, worldmodel, e2e
pytest --all               nothing left out
pytest --all --record      also writes tests/digests.json
"""

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gates
import laws
import pytest

ROOT = Path(__file__).resolve().parent
# Its import tells what to install.
collect_ignore = [] if importlib.util.find_spec("starlette") else ["python/worldmodel/play/server.py"]
MARKERS = {
    "core": "ops, modules and dispatch on the backends that run here",
    "emulator": "the CUDA kernels, run in the emulator",
    "triton": "the Triton kernels, interpreted, compiled, and executed from PTX",
    "worldmodel": "the world model",
    "e2e": "builds, benchmarks, examples and whole runs in processes of their own",
}
# Longest tests first.
ORDER = ("emulator", "triton", "e2e", "worldmodel", "core")
CORE_SECONDS = 5.0  # CPU time
LOOP_SECONDS = 0.25  # CPU time of ten million Python additions when CORE_SECONDS was set
IN_CI = os.environ.get("CI", "0").lower() not in ("", "0", "false")
STATES = pytest.StashKey[dict[str, gates.State]]()
COLLECTED, LEFT_OUT = pytest.StashKey[dict[str, int]](), pytest.StashKey[dict[str, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("wmkernels")
    group.addoption("--all", action="store_true", help="run what digests of the sources would leave out, too")
    group.addoption("--record", action="store_true", help="write tests/digests.json for the groups that passed whole")


def named(config: pytest.Config) -> list[Path]:
    if config.args_source != pytest.Config.ArgsSource.ARGS:
        return []
    paths = [config.invocation_params.dir / argument.split("::")[0] for argument in config.args]
    return [path.resolve() for path in paths if path.is_file()]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One worker per core if pytest-xdist is installed; none for one file or --pdb."""
    option = config.option
    chosen = getattr(option, "numprocesses", 0) is not None or hasattr(config, "workerinput")
    if chosen or option.usepdb or option.collectonly:
        return
    files = named(config)
    if len(set(files)) == 1 and len(files) == len(config.args):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    option.numprocesses = int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or cores)
    # Idle workers take half of another's remaining tests.
    option.dist = "worksteal" if option.dist == "no" else option.dist


def pytest_configure(config: pytest.Config) -> None:
    # Inherited by workers and subprocesses, which import PyTorch later.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning} (set by folder)")
    config.addinivalue_line("markers", "gated(group): left out while the digest of tests/gates.py is the recorded one")
    config.addinivalue_line("markers", "canary: of a gated group, never left out")
    narrowed = named(config) or any(
        getattr(config.option, name, None)
        for name in ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")
    )
    if config.option.record and (narrowed or not config.option.all):
        raise pytest.UsageError("--record goes with --all and whole folders: a group passes whole or not")
    config.stash[COLLECTED], config.stash[LEFT_OUT] = {}, {}
    received = getattr(config, "workerinput", None)
    states = received["states"] if received else {name: gates.state(name) for name in gates.GATES}
    config.stash[STATES] = {name: gates.State(*state) for name, state in states.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["states"] = {name: tuple(state) for name, state in node.config.stash[STATES].items()}


def folder_of(item: pytest.Item) -> str:
    path = item.path.relative_to(ROOT)
    if path.parts[0] == "tests":
        return path.parts[1]
    return "worldmodel" if "worldmodel" in path.parts else "core"


def group_of(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("gated")
    return mark.args[0] if mark else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(folder_of(item)))
    config.stash[laws.EVERY_TEST] = list(items)
    states, files = config.stash[STATES], named(config)
    left: dict[pytest.Item, None] = {}
    for item in items:
        item.add_marker(folder_of(item))
        if group := group_of(item):
            item.user_properties.append(("group", group))
            canary = item.get_closest_marker("canary") or item.path in files
            if states[group].unchanged and not (config.option.all or canary):
                left[item] = None
    config.stash[COLLECTED] = dict(Counter(filter(None, map(group_of, items))))
    config.stash[LEFT_OUT] = dict(Counter(filter(None, map(group_of, left))))
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def slowness() -> float:
    """Slowdown relative to LOOP_SECONDS, at least 1."""
    start = time.process_time()
    sum(range(10_000_000))
    return max(1.0, (time.process_time() - start) / LOOP_SECONDS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """In CI, slow tests of core fail; they belong in e2e."""
    before = os.times()
    yield
    seconds = sum(os.times()[:4]) - sum(before[:4])
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    on_gpu = any(getattr(value, "device", "cpu") != "cpu" for value in parameters)  # includes kernel compilation
    limited = IN_CI and folder_of(item) == "core" and not on_gpu
    if limited and seconds > CORE_SECONDS and seconds > CORE_SECONDS * slowness():
        pytest.fail(f"{seconds:.1f} s of CPU time; a test of core takes {CORE_SECONDS:.0f} at most", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["collected"], output["left_out"] = session.config.stash[COLLECTED], session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    if "collected" in output:
        node.config.stash[COLLECTED], node.config.stash[LEFT_OUT] = output["collected"], output["left_out"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    collected, left, states = (config.stash[key] for key in (COLLECTED, LEFT_OUT, STATES))
    stats, write = terminalreporter.stats, terminalreporter.write_line
    passed = Counter(value for report in stats.get("passed", []) for key, value in report.user_properties)
    whole = [group for group, count in collected.items() if passed[group] == count]
    if config.option.record:
        gates.record(whole)
        write(f"recorded in {gates.RECORD.relative_to(ROOT)}: {', '.join(whole) or 'nothing'}")
        write(f"not recorded, for not all of it passed: {', '.join(collected.keys() - set(whole)) or 'nothing'}")
    terminalreporter.section("left out, and why")
    if not (left or stats.get("skipped") or stats.get("deselected")):
        write("nothing")
    for group, count in left.items():
        write(f"{count} of {collected[group]} tests of {group}: {states[group].why}")
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
    for reason, count in skipped.items():
        write(f"{count} skipped: {reason}")
    others = len(stats.get("deselected", [])) - sum(left.values())
    if others > 0:
        write(f"{others} by the options of the command line")
    for group in sorted(collected.keys() - left.keys()):
        if not states[group].unchanged and not (config.option.record and group in whole):
            write(f"nothing of {group} ({collected[group]} tests): {states[group].why}; --all --record records it")
    if left:
        write("with pytest --all, or by naming a file, nothing is left out for being unchanged")
