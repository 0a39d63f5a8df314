"""Executes missing runs and merges each into one JSON file when it ends."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from harness import environment


class Plan(Protocol):
    @property
    def key(self) -> str:
        """Key in the JSON file."""


AnyPlan = TypeVar("AnyPlan", bound=Plan)


def add_arguments(parser: argparse.ArgumentParser, train: bool = True) -> None:
    """Options of all world benchmarks; ``train`` adds that of those that run the command line."""
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--again", action="store_true", help="repeat finished runs")
    parser.add_argument("--list", action="store_true", help="list finished and missing runs, and stop")
    parser.add_argument("--report", action="store_true", help="no run: tables and chart of finished runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"), help="folder of the run folders")
    parser.add_argument("--plot", type=Path, help="chart (PNG); default: beside the JSON")
    if train:
        parser.add_argument(
            "--train", default="", help="further options of `python -m worldmodel train`, in one string"
        )


def execute_all(
    chosen: argparse.Namespace,
    plans: Sequence[AnyPlan],
    execute: Callable[[AnyPlan, Path], dict[str, Any]],
    describe: Callable[[AnyPlan], str],
    benchmark: str,
    device: str = "cpu",
    section: str = "runs",
) -> list[str]:
    """Executes or lists the plans; returns failed keys."""
    failed = []
    for plan in [] if chosen.report else plans:
        there = plan.key in load(chosen.json, benchmark).get(section, {})
        if chosen.list:
            print(f"{'there' if there else 'missing':8} {describe(plan)}")
            continue
        if there and not chosen.again:
            continue
        print(describe(plan), file=sys.stderr, flush=True)
        folder = chosen.runs / f"{plan.key.replace('/', '-').replace(' ', '_')}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            entry = execute(plan, folder)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed.append(plan.key)
            continue
        merge(chosen.json, plan.key, entry, benchmark, device, section)
    return failed


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    lock = path.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(path: Path, benchmark: str) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {"benchmark": benchmark, "runs": {}}


def merge(
    path: Path, key: str, entry: dict[str, Any], benchmark: str, device: str = "cpu", section: str = "runs"
) -> None:
    """Adds an entry, with the commit and the processor it is of, to ``section``; safe with concurrent processes."""
    with locked(path):
        result = load(path, benchmark)
        result["environment"] = here = environment.describe(torch.device(device))
        entry = {**entry, "commit": here["wmkernels"]["commit"], "cpu": here["cpu"]["model"]}
        result[section] = dict(sorted({**result.get(section, {}), key: entry}.items()))
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(path)
