"""Writes the generated parts of README.md and docs/benchmarks.md from benchmarks/results/*.json.

    python benchmarks/readme.py            # rewrite what is out of date, charts included
    python benchmarks/readme.py --check    # say what is out of date, and exit with 1 if anything is

A generated part stands between <!-- generated:NAME --> and <!-- end:NAME -->. No figure is typed.
"""

import argparse
import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conv_lstms import chart as conv_lstm_chart
from conv_lstms import report as conv_lstm_report
from harness import environment
from harness.tables import figure, markdown
from scans import chart, report
from wmkernels import dispatch
from wmkernels.checks import FLOATS, short
from world import chart as world_chart
from world import memory_chart, memory_report
from world import report as world_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU_RESULT = RESULTS / "scan_speed_cpu.json"
PART = re.compile(r"(<!-- generated:(?P<name>[\w-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.DOTALL)
SPEED_HEADER = ("", "ms", "ns an element", "time over ours", "share of the limit", "peak MiB")
KERNEL_SOURCES = {
    "cpu": "csrc/cpu/{op}/*.cpp",
    "cuda": "csrc/cuda/{op}/*.cu",
    "triton": "wmkernels/{op}/triton_kernels.py",
}


def load() -> dict[Path, dict[str, Any]]:
    """The committed results, the scans' first and of those the CPU's."""
    paths = [*RESULTS.glob("scan_speed_*.json"), *RESULTS.glob("conv_lstm_speed_*.json")]
    paths.sort(key=lambda path: (not path.name.startswith("scan"), not path.stem.endswith("_cpu"), path.name))
    return {path: json.loads(path.read_text()) for path in paths}


def of(benchmark: str, results: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Those of one benchmark."""
    return {path: result for path, result in results.items() if result["benchmark"] == benchmark}


def load_world() -> dict[Path, dict[str, Any]]:
    """The committed results of the world model."""
    return {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("world_model_*.json"))}


def load_memory() -> dict[Path, dict[str, Any]]:
    """The committed results on what the world model does not see."""
    return {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("world_memory_*.json"))}


def title(result: dict[str, Any]) -> str:
    if result["device"] == "cpu":
        cpu = result["environment"]["cpu"]
        return f"{cpu['model']}, {cpu['cores']} cores"
    return result["environment"]["gpu"]["name"]


def chart_part(results: dict[Path, dict[str, Any]]) -> str:
    lines = []
    for path, result in list(of("scan_speed", results).items())[:1]:
        picture = path.with_suffix(".png").relative_to(ROOT).as_posix()
        lines += [
            f"![Time against length, and of a training step, beside the peers]({picture})",
            "",
        ]
        verdict = report.verdict_line(result)
        lines += [f"{environment.summary(result['environment'])}. {verdict[0].upper()}{verdict[1:]}."]
    return "\n".join(lines)


def speed_part(results: dict[Path, dict[str, Any]]) -> str:
    """The two comparisons that matter most on a CPU: a forward pass and a training step, ours beside the peers."""
    result = results.get(CPU_RESULT)
    if result is None:
        return "No result of a CPU is committed."
    groups, lines = report.group_rows(result), []
    for name in ("forward, 2,048 steps", "training, 512 steps"):
        rows = [_speed_cells(row) for row in groups.get(name, []) if "milliseconds" in row]
        if rows:
            first = groups[name][0]
            sizes = f"batch {first['batch']}, {first['channels']:,} channels, {first['state']} states, {first['dtype']}"
            lines += [f"{name.capitalize()}, {sizes}:", ""]
            lines += [markdown(SPEED_HEADER, rows), ""]
    return "\n".join(lines).rstrip()


def _speed_cells(row: dict[str, Any]) -> list[str]:
    name, milliseconds, nanoseconds, ratio, share, peak, *_ = report.cells(row)
    return [name, milliseconds, nanoseconds, f"{ratio}×", share, peak]


def targets_part(results: dict[Path, dict[str, Any]]) -> str:
    lines = []
    for result in of("scan_speed", results).values():
        lines += [f"{title(result)}:", "", markdown(*report.target_table(result["targets"])), ""]
    return "\n".join(lines).rstrip() or "No result is committed."


def backends_part(results: dict[Path, dict[str, Any]]) -> str:
    """Which backend has a kernel of which op, from the sources; every kernel takes every dtype."""
    dtypes = " ".join({"float": "fp", "bfloat": "bf"}[re.sub(r"\d", "", short(d))] + short(d)[-2:] for d in FLOATS)
    rows = []
    for op in dispatch.OPS:
        cells = [f"`{op}`"]
        for backend in reversed(dispatch.BACKENDS):
            there = backend == "reference" or _has_kernel(op, backend)
            cells.append(dtypes if there else "–")
        rows.append(cells)
    return markdown(("op", *(f"`{backend}`" for backend in reversed(dispatch.BACKENDS))), rows)


def _has_kernel(op: str, backend: str) -> bool:
    pattern = KERNEL_SOURCES[backend]
    return any(ROOT.glob(pattern.format(op=op)))


def world_part(results: dict[Path, dict[str, Any]]) -> str:
    """Returns, times and targets of the world model, and its learning curves."""
    lines = []
    for path, result in load_world().items():
        picture = Path("..", path.with_suffix(".png").relative_to(ROOT)).as_posix()
        lines += [f"{environment.summary(result['environment'])}.", "", f"![learning curves]({picture})", ""]
        for _, header, cells in world_report.return_tables(result):
            lines += [markdown(header, cells), ""]
            lines += [world_report.CONTROL_NOTE, ""] if header == world_report.CONTROL_HEADER else []
        lines += [markdown(world_report.TIME_HEADER, world_report.time_cells(result)), ""]
        lines += [*(f"- {line}" for line in world_report.target_lines(result)), ""]
    return "\n".join(lines).rstrip() or "No result is committed."


def memory_part(results: dict[Path, dict[str, Any]]) -> str:
    """What the world model knows of what it does not see."""
    lines = []
    for path, result in load_memory().items():
        picture = Path("..", path.with_suffix(".png").relative_to(ROOT)).as_posix()
        lines += [
            f"{environment.summary(result['environment'])}.",
            "",
            f"![the cue by gap, the ball by step]({picture})",
            "",
        ]
        for table in memory_report.tables(result):
            lines += [f"{table.title}:", "", markdown(table.header, table.rows), ""]
        lines += [*(f"- {line}" for line in memory_report.target_lines(result)), ""]
    return "\n".join(lines).rstrip() or "No result is committed."


def full_part(results: dict[Path, dict[str, Any]]) -> str:
    """Every row of every result of the scans."""
    lines = []
    for path, result in of("scan_speed", results).items():
        lines += [f"## {title(result)}", "", f"{environment.summary(result['environment'])}.", ""]
        lines += [f"![chart]({Path('..', path.with_suffix('.png').relative_to(ROOT)).as_posix()})", ""]
        notes = [*report.limit_lines(result), report.verdict_line(result), report.memory_line(result)]
        notes += [*report.very_long_lines(result), report.missing_line(result)]
        lines += [f"- {note}" for note in notes]
        lines += [f"- the run took {figure(result['seconds'])} s: `{result['environment']['command']}`", ""]
        if result["targets"]:
            lines += [markdown(*report.target_table(result["targets"])), ""]
        for name, rows in report.group_rows(result).items():
            lines += [f"### {name[0].upper()}{name[1:]}", "", markdown(report.HEADER, report.group_cells(rows)), ""]
            lines += [line for note in report.notes(rows) for line in (f"{note}.", "")]
    return "\n".join(lines).rstrip() or "No result is committed."


def conv_lstm_part(results: dict[Path, dict[str, Any]]) -> str:
    """The ConvLSTM's chart and targets."""
    lines = []
    for path, result in of("conv_lstm_speed", results).items():
        picture = path.with_suffix(".png").relative_to(ROOT).as_posix()
        lines += [f"{title(result)}. {report.verdict_line(result).capitalize()}.", ""]
        lines += [f"![Time over ours, problem by problem]({picture})", ""]
        lines += [markdown(*report.target_table(result["targets"])), ""]
    return "\n".join(lines).rstrip() or "No result is committed: `python benchmarks/conv_lstm_speed.py` makes one."


def conv_lstm_results_part(results: dict[Path, dict[str, Any]]) -> str:
    """Every row of the ConvLSTM's results."""
    lines = []
    for path, result in of("conv_lstm_speed", results).items():
        lines += [f"## ConvLSTM, {title(result)}", "", f"{environment.summary(result['environment'])}.", ""]
        lines += [f"![chart]({Path('..', path.with_suffix('.png').relative_to(ROOT)).as_posix()})", ""]
        lines += [f"- {conv_lstm_report.limit_line(result)}", f"- {report.verdict_line(result)}"]
        lines += [f"- the run took {figure(result['seconds'])} s: `{result['environment']['command']}`", ""]
        for name, rows in report.group_rows(result).items():
            table = markdown(conv_lstm_report.HEADER, [conv_lstm_report.cells(row) for row in rows])
            lines += [f"### {name[0].upper()}{name[1:]}", "", table, ""]
            lines += [line for note in conv_lstm_report.notes(rows) for line in (f"{note}.", "")]
    return "\n".join(lines).rstrip() or "No result is committed."


PARTS: dict[str, Callable[[dict[Path, dict[str, Any]]], str]] = {
    "chart": chart_part,
    "speed": speed_part,
    "targets": targets_part,
    "backends": backends_part,
    "results": full_part,
    "conv-lstm": conv_lstm_part,
    "conv-lstm-results": conv_lstm_results_part,
    "world-model": world_part,
    "world-memory": memory_part,
}
PAGES = tuple(ROOT / page for page in ("README.md", "docs/benchmarks.md", "docs/world_model.md"))


def rewritten(page: str, results: dict[Path, dict[str, Any]]) -> str:
    return PART.sub(lambda m: f"{m[1]}{PARTS[m['name']](results)}\n{m[3]}", page)


def stamp(path: Path) -> str | None:
    """The fingerprint of the result that a chart was drawn from, out of the PNG's text chunks."""
    if not path.exists():
        return None
    data, position = path.read_bytes(), 8
    while position < len(data):
        (size,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + size]
        keyword, _, text = body.partition(b"\0")
        if kind == b"tEXt" and keyword.decode() == chart.STAMP:
            return text.decode()
        position += size + 12
    return None


def stale(results: dict[Path, dict[str, Any]]) -> list[Path]:
    """Pages and charts that do not say what the results say."""
    pages = [page for page in PAGES if page.exists()]
    found = [page for page in pages if page.read_text() != rewritten(page.read_text(), results)]
    pictures = {
        path.with_suffix(".png"): result for path, result in {**results, **load_world(), **load_memory()}.items()
    }
    return found + [path for path, result in pictures.items() if stamp(path) != chart.fingerprint(result)]


def _draw(picture: Path, results: dict[Path, dict[str, Any]]) -> str:
    path = picture.with_suffix(".json")
    if path in load_memory():
        return memory_chart.draw(load_memory()[path], picture)
    if path not in results:
        return world_chart.draw(load_world()[path], picture)
    draw = chart.draw if results[path]["benchmark"] == "scan_speed" else conv_lstm_chart.draw
    return draw(results[path], picture)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if anything is out of date")
    check = parser.parse_args().check
    results = load()
    late = stale(results)
    for path in late:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if check:
            continue
        if path.suffix == ".md":
            path.write_text(rewritten(path.read_text(), results))
        elif reason := _draw(path, results):
            print(f"no chart: {reason}")
            return 1
    return 1 if check and late else 0


if __name__ == "__main__":
    sys.exit(main())
