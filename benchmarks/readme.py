"""Writes the generated parts of README.md and docs/*.md, and the charts, from benchmarks/results/*.json.

    python benchmarks/readme.py            # update
    python benchmarks/readme.py --check    # list outdated files; exit status 1 if any

A generated part stands between <!-- generated:NAME --> and <!-- end:NAME -->.
"""

import argparse
import functools
import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imitation
import local_attention_speed
import models
import place_memory_speed
import planning
import radar
import turned_rooms
from conv_lstms import chart as conv_lstm_chart
from conv_lstms import report as conv_lstm_report
from conv_lstms import targets as conv_lstm_targets
from harness import environment
from harness.tables import figure, markdown, megabytes
from scans import chart, report, targets
from text import report as text_report
from wmkernels import dispatch
from wmkernels.checks import FLOATS, dtype_name
from wmkernels.registry import op_names
from world import chart as world_chart
from world import memory_chart, memory_report, update_report
from world import report as world_report
from worlds import chart as worlds_chart
from worlds import report as worlds_report
from worlds import targets as worlds_targets

ROOT = Path(__file__).resolve().parents[1]
Results = dict[Path, dict[str, Any]]
RESULTS = ROOT / "benchmarks" / "results"
CPU_RESULT = RESULTS / "scan_speed_cpu.json"
PART = re.compile(r"(<!-- generated:(?P<name>[\w-]+) -->\n).*?(<!-- end:(?P=name) -->)", re.DOTALL)
DOCS = (
    "architecture",
    "benchmarks",
    "imitation",
    "planning",
    "radar",
    "results",
    "transformers",
    "world_model",
    "worlds",
)
SPEED_GROUPS = ("forward, 2,048 steps", "training, 512 steps")
KERNEL_SOURCES = {
    "cpu": "csrc/cpu/{op}/*.cpp",
    "cuda": "csrc/cuda/{op}/*.cu",
    "triton": "wmkernels/{op}/triton_kernels.py",
}


CHARTS: dict[str, Callable[[dict[str, Any], Path], str]] = {
    "scan_speed": chart.draw,
    "conv_lstm_speed": conv_lstm_chart.draw,
    "world_model": world_chart.draw,
    "world_tasks": world_chart.draw,
    "world_memory": memory_chart.draw,
    "world_rooms": worlds_chart.draw,
    "byte_model": text_report.draw,
}


def load() -> Results:
    """A CPU before GPUs."""
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: (not path.stem.endswith("_cpu"), path.name))
    return {path: json.loads(path.read_text()) for path in paths}


def measured(result: dict[str, Any]) -> bool:
    """Not a log of tuning alone."""
    return bool(result.get("rows", result.get("runs")))


def of(benchmark: str, results: Results) -> Results:
    return {path: result for path, result in results.items() if result["benchmark"] == benchmark and measured(result)}


def title(result: dict[str, Any]) -> str:
    if result["device"] == "cpu":
        return environment.processor(result["environment"])
    return result["environment"]["gpu"]["name"]


def picture(path: Path, page: Path) -> str:
    """Relative to ``page``."""
    return Path(os.path.relpath(path.with_suffix(".png"), page.parent)).as_posix()


def conditions(result: dict[str, Any]) -> str:
    """Machine, versions, and whether it was quiet."""
    verdict = report.verdict_line(result)
    return f"{environment.summary(result['environment'])}. {verdict[0].upper()}{verdict[1:]}."


def _text(lines: list[str], if_none: str = "No result is committed.") -> str:
    return "\n".join(lines).rstrip() or if_none


def chart_part(results: Results, page: Path) -> str:
    if CPU_RESULT not in results:
        return "No result of a CPU is committed."
    alt = "Time against sequence length, and time of a training step, beside the baselines"
    return f"![{alt}]({picture(CPU_RESULT, page)})"


def speed_part(results: Results, page: Path) -> str:
    result = results.get(CPU_RESULT)
    if result is None:
        return "No result of a CPU is committed."
    groups = report.group_rows(result)
    header, cells, names = [""], {}, []
    for group in SPEED_GROUPS:
        timed = {row["implementation"]: row for row in groups[group] if "milliseconds" in row}
        header += [f"{group}: ms", "time over ours", "peak MiB"]
        names += [name for name in timed if name not in names]
        for name, row in timed.items():
            cells[name, group] = [figure(row["milliseconds"]), f"{figure(row['ratio'])}×", megabytes(row["peak_bytes"])]
    rows = [[name, *(cell for group in SPEED_GROUPS for cell in cells.get((name, group), [""] * 3))] for name in names]
    first = groups[SPEED_GROUPS[0]][0]
    sizes = (
        f"Batch {first['batch']}, {first['channels']:,} channels, {first['state']} states per channel, {first['dtype']}"
    )
    return "\n".join([markdown(header, rows), "", f"{sizes}. {conditions(result)}"])


def targets_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("scan_speed", results).values():
        lines += [f"{title(result)}:", "", markdown(*report.target_table(targets.assess(result))), ""]
    return _text(lines)


def replaced_part(results: Results, page: Path) -> str:
    """Targets that were beyond the roofline."""
    rows = []
    for result in of("scan_speed", results).values():
        for target in targets.assess(result):
            if target["name"] in targets.REPLACED:
                before = target | dict(zip(("at_least", "aim"), targets.REPLACED[target["name"]], strict=True))
                name, *now, _, limit, _ = report.target_cells(target)
                was = report.target_cells(before)[1:3]
                rows.append([f"{title(result)}: {name}", ", ".join(was), ", ".join(now), f"{limit} at the roofline"])
    for target in conv_lstm_targets.targets_of("cuda"):
        if target.name in conv_lstm_targets.REPLACED:
            before, reason = conv_lstm_targets.REPLACED[target.name]
            was, now = (", ".join(f"{figure(x)}×" for x in pair) for pair in (before, (target.at_least, target.aim)))
            rows.append([f"GPU: ConvLSTM {target.name}", was, now, reason])
    return markdown(("target", "at least, aim: before", "now", "reason"), rows)


def backends_part(results: Results, page: Path) -> str:
    dtypes = " ".join(
        {"float": "fp", "bfloat": "bf"}[re.sub(r"\d", "", dtype_name(d))] + dtype_name(d)[-2:] for d in FLOATS
    )
    rows = []
    for op in op_names():
        cells = [f"`{op}`"]
        for backend in reversed(dispatch.BACKENDS):
            if backend not in dispatch.PYTORCH_BACKENDS and not _has_kernel(op, backend):
                cells.append("–")
            else:
                cells.append(dtypes if dispatch.is_verified(op, backend) else f"{dtypes} (by name)")
        rows.append(cells)
    return markdown(("op", *(f"`{backend}`" for backend in reversed(dispatch.BACKENDS))), rows)


def _has_kernel(op: str, backend: str) -> bool:
    pattern = KERNEL_SOURCES[backend]
    return any(ROOT.glob(pattern.format(op=op)))


def world_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("world_model", results).items():
        lines += [
            f"{environment.summary(result['environment'])}.",
            "",
            f"![learning curves]({picture(path, page)})",
            "",
        ]
        for _, header, cells in world_report.return_tables(result):
            lines += [markdown(header, cells), ""]
            lines += [world_report.CONTROL_NOTE, ""] if header == world_report.CONTROL_HEADER else []
        lines += [markdown(world_report.TIME_HEADER, world_report.time_cells(result)), ""]
        lines += [*(f"- {line}" for line in world_report.target_lines(result)), ""]
    return _text(lines)


def tasks_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("world_tasks", results).items():
        lines += [f"{environment.summary(result['environment'])}; one thread.", ""]
        lines += [f"![learning curves]({picture(path, page)})", ""]
        for _, header, cells in world_report.return_tables(result):
            lines += [markdown(header, cells), "", world_report.SCORE_NOTE, ""]
        lines += [*(f"- {line}" for line in world_report.target_lines(result)), ""]
    return _text(lines)


def memory_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("world_memory", results).items():
        lines += [
            f"{environment.summary(result['environment'])}.",
            "",
            f"![the cue by gap, the ball by step]({picture(path, page)})",
            "",
        ]
        for table in memory_report.tables(result):
            lines += [f"{table.title}:", "", markdown(table.header, table.rows), ""]
        lines += [*(f"- {line}" for line in memory_report.target_lines(result)), ""]
    return _text(lines)


def update_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("update_memory", results).values():
        lines += [markdown(update_report.HEADER, update_report.cells(result)), ""]
        lines += [f"{environment.summary(result['environment'])}; one thread.", ""]
    return _text(lines)


def worlds_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("world_rooms", results).items():
        lines += [f"{environment.summary(result['environment'])}.", ""]
        lines += [f"![what memories know of a cell that comes back]({picture(path, page)})", ""]
        lines += [f"{worlds_targets.TITLE}:", "", markdown(*worlds_targets.table(result)), ""]
        for table in worlds_report.tables(result):
            lines += [f"{table.title}:", "", markdown(table.header, table.rows), ""]
    return _text(lines)


def imitation_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("imitation", results).values():
        about = f"{environment.summary(result['environment'])}; one thread."
        lines += [imitation.report(result["rows"]), "", about, ""]
    return _text(lines)


def planning_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("planning", results).values():
        lines += [planning.report(result["rows"]), "", f"{environment.summary(result['environment'])}; one thread.", ""]
    return _text(lines)


def turned_rooms_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("turned rooms", results).values():
        about = f"{environment.summary(result['environment'])}; one thread."
        lines += [turned_rooms.report(result["rows"]), "", about, ""]
    return _text(lines)


def radar_part(results: Results, page: Path, sections: tuple[str, ...] = ("targets", "agents")) -> str:
    lines = []
    for result in of("radar", results).values():
        report = radar.report(result["rows"])
        lines += [line for section in sections for line in (report[section], "")]
        lines += [f"{environment.summary(result['environment'])}; one thread.", ""]
    return _text(lines)


def text_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("byte_model", results).items():
        lines += [f"{environment.summary(result['environment'])}.", ""]
        lines += [f"![bits per byte by context, and recall]({picture(path, page)})", ""]
        for name, header, rows in text_report.tables(result):
            lines += [f"{name}:", "", markdown(header, rows), ""]
        lines += [*(f"- {line}" for line in text_report.target_lines(result)), ""]
    return _text(lines)


def place_memory_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("place_memory_speed", results).values():
        lines += [f"{environment.summary(result['environment'])}.", ""]
        speed = place_memory_speed
        lines += [markdown(speed.TARGET_HEADER, speed.target_rows(result["rows"])), ""]
        lines += [markdown(speed.HEADER, speed.cells(result["rows"])), ""]
    return _text(lines)


def local_attention_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("local_attention_speed", results).values():
        lines += [f"{environment.summary(result['environment'])}.", ""]
        lines += [markdown(local_attention_speed.HEADER, local_attention_speed.cells(result["rows"])), ""]
    return _text(lines)


def models_short_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("models", results).values():
        lines += [markdown(models.SHORT_HEADER, models.short_cells(result["rows"])), ""]
        lines += [f"2 layers × 768, 512 steps, batch 1, float32. {environment.summary(result['environment'])}."]
    return _text(lines, "No result is committed: `python benchmarks/models.py --publish` makes one.")


def models_part(results: Results, page: Path) -> str:
    lines = []
    for result in of("models", results).values():
        described = result["environment"]
        lines += [markdown(models.HEADER, models.cells(result["rows"])), ""]
        versions = f"transformers {described['packages']['transformers']}, {described['threads']} threads"
        lines += [f"{environment.summary(described)}; {versions}.", ""]
    return _text(lines, "No result is committed: `python benchmarks/models.py --publish` makes one.")


def full_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("scan_speed", results).items():
        lines += [f"## Scans, {title(result)}", "", f"{environment.summary(result['environment'])}.", ""]
        lines += [f"![chart]({picture(path, page)})", ""]
        notes = [*report.limit_lines(result), report.verdict_line(result), report.memory_line(result)]
        notes += [*report.very_long_lines(result), report.missing_line(result)]
        lines += [f"- {note}" for note in notes]
        lines += [f"- the run took {figure(result['seconds'])} s: `{result['environment']['command']}`", ""]
        for name, rows in report.group_rows(result).items():
            lines += [f"### {name[0].upper()}{name[1:]}", "", markdown(report.HEADER, report.group_cells(rows)), ""]
            lines += [line for note in report.notes(rows) for line in (f"{note}.", "")]
    return _text(lines)


def conv_lstm_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("conv_lstm_speed", results).items():
        lines += [f"{conditions(result)}", ""]
        lines += [f"![Time over ours, by problem]({picture(path, page)})", ""]
        lines += [markdown(*report.target_table(conv_lstm_targets.assess(result))), ""]
    return _text(lines, "No result is committed: `python benchmarks/conv_lstm_speed.py --publish` makes one.")


def conv_lstm_results_part(results: Results, page: Path) -> str:
    lines = []
    for path, result in of("conv_lstm_speed", results).items():
        lines += [f"## ConvLSTM, {title(result)}", "", f"{environment.summary(result['environment'])}.", ""]
        lines += [f"![chart]({picture(path, page)})", ""]
        lines += [f"- {conv_lstm_report.limit_line(result)}", f"- {report.verdict_line(result)}"]
        lines += [f"- the run took {figure(result['seconds'])} s: `{result['environment']['command']}`", ""]
        for name, rows in report.group_rows(result).items():
            table = markdown(conv_lstm_report.HEADER, [conv_lstm_report.cells(row) for row in rows])
            lines += [f"### {name[0].upper()}{name[1:]}", "", table, ""]
            lines += [line for note in conv_lstm_report.notes(rows) for line in (f"{note}.", "")]
    return _text(lines)


PARTS: dict[str, Callable[[Results, Path], str]] = {
    "chart": chart_part,
    "speed": speed_part,
    "targets": targets_part,
    "replaced": replaced_part,
    "backends": backends_part,
    "results": full_part,
    "conv-lstm": conv_lstm_part,
    "conv-lstm-results": conv_lstm_results_part,
    "imitation": imitation_part,
    "planning": planning_part,
    "turned-rooms": turned_rooms_part,
    "radar": radar_part,
    "radar-league": functools.partial(radar_part, sections=("league",)),
    "radar-detection": functools.partial(radar_part, sections=("detection",)),
    "radar-memory": functools.partial(radar_part, sections=("memory",)),
    "radar-pulses": functools.partial(radar_part, sections=("pulses",)),
    "radar-recovery": functools.partial(radar_part, sections=("recovery",)),
    "radar-world-model": functools.partial(radar_part, sections=("world model",)),
    "radar-time": functools.partial(radar_part, sections=("time",)),
    "world-model": world_part,
    "world-tasks": tasks_part,
    "world-memory": memory_part,
    "update-memory": update_part,
    "worlds": worlds_part,
    "byte-model": text_part,
    "place-memory": place_memory_part,
    "local-attention": local_attention_part,
    "models": models_part,
    "models-short": models_short_part,
}
PAGES = tuple(ROOT / page for page in ("README.md", *(f"docs/{name}.md" for name in DOCS)))


def rewritten(page: Path, results: Results) -> str:
    return PART.sub(lambda m: f"{m[1]}{PARTS[m['name']](results, page)}\n{m[3]}", page.read_text())


def stamp(path: Path) -> str | None:
    """The fingerprint in a chart's PNG text chunks."""
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


def stale(results: Results) -> list[Path]:
    found = [page for page in PAGES if page.read_text() != rewritten(page, results)]
    pictures = {path: result for path, result in results.items() if result["benchmark"] in CHARTS and measured(result)}
    charts = {path.with_suffix(".png"): result for path, result in pictures.items()}
    return found + [path for path, result in charts.items() if stamp(path) != chart.fingerprint(result)]


def _draw(picture: Path, results: Results) -> str:
    result = results[picture.with_suffix(".json")]
    return CHARTS[result["benchmark"]](result, picture)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if anything is out of date")
    check = parser.parse_args().check
    results = load()
    late = stale(results)
    for path in late:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if check:
            continue
        if path.suffix == ".md":
            path.write_text(rewritten(path, results))
        elif reason := _draw(path, results):
            print(f"no chart: {reason}")
            return 1
    return 1 if check and late else 0


if __name__ == "__main__":
    sys.exit(main())
