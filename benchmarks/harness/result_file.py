"""Where a benchmark writes its result and its chart."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parses with the options ``--quick``, ``--json``, ``--publish`` and ``--plot``."""
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds: a smoke test")
    file = parser.add_mutually_exclusive_group()
    file.add_argument("--json", type=Path, help="result file; default: in benchmarks/results/local/, none with --quick")
    file.add_argument("--publish", action="store_true", help="to benchmarks/results/, whose tables are committed")
    parser.add_argument("--plot", type=Path, help="chart (PNG); default: beside the JSON")
    chosen = parser.parse_args(arguments)
    if chosen.quick and chosen.publish:
        parser.error("--publish: a smoke test with --quick has no result to publish")
    return chosen


def target(chosen: argparse.Namespace, benchmark: str, machine: str) -> Path | None:
    """The result file; None for a smoke test that names none."""
    if chosen.json is not None or chosen.quick:
        return chosen.json
    return RESULTS / ("" if chosen.publish else "local") / f"{benchmark}_{machine}.json"


def write(
    result: dict[str, Any], chosen: argparse.Namespace, machine: str, draw: Callable[[dict[str, Any], Path], str]
) -> None:
    """Writes the JSON and the chart; ``draw`` returns the reason for no chart, or ""."""
    path = target(chosen, result["benchmark"], machine)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwrote {path}")
    plot = chosen.plot or (path.with_suffix(".png") if path is not None else None)
    if plot is not None:
        reason = draw(result, plot)
        print(f"no chart: {reason}" if reason else f"wrote {plot}")
