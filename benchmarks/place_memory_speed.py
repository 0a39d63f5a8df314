"""Speed of the place memory on a CPU, beside its loop in PyTorch and the limit of arithmetic.

    python benchmarks/place_memory_speed.py             # writes benchmarks/results/local/place_memory_speed_cpu.json
    python benchmarks/place_memory_speed.py --publish   # writes benchmarks/results/place_memory_speed_cpu.json
    python benchmarks/place_memory_speed.py --quick

113 frequencies (a map of 15 x 15), a view of 5 x 5 places, 16 channels, 128 steps. The module is timed, phases
included. The limit is that of multiply-adds in registers: a write and a read per step of the 13 cosines and 13 sines
that the symmetric view has, and the product by the inverse; twice as many in training.
"""

import argparse
import functools
from typing import Any

import torch
from torch import Tensor

from harness import cpu_limits, environment, result_file, tables, timer
from wmkernels.nn import PlaceMemory, lattice

PERIOD, SIDE, CHANNELS, STEPS = 15, 5, 16, 128
LOOP = "reference"
HEADER = ("threads", "batch", "measure", "backend", "ms", "× loop", "% of the limit")


def build(backend: str) -> PlaceMemory:
    around = range(-(SIDE // 2), SIDE // 2 + 1)
    return PlaceMemory(CHANNELS, [[i, j] for i in around for j in around], lattice(PERIOD), backend=backend)


def run(memory: PlaceMemory, values: Tensor, moved: Tensor, trains: bool) -> None:
    leaf = values.detach().requires_grad_(trains)
    out = memory(leaf, moved)[0]
    if trains:
        out.backward(values)


def multiply_adds(batch: int, trains: bool) -> int:
    places, frequencies = SIDE**2, len(lattice(PERIOD))
    shared = places // 2 + 1  # distinct cosines, and distinct sines up to a sign
    per_step = 2 * 2 * shared * frequencies + 2 * shared * places
    return (2 if trains else 1) * batch * STEPS * CHANNELS * per_step


def check() -> float:
    """The kernel's largest error against the float64 loop, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, STEPS, SIDE**2, CHANNELS, generator=generator)
    moved = torch.randint(-1, 2, (2, STEPS, 2), generator=generator).float()
    expected, _ = build(LOOP).double()(values.double(), moved)
    error = ((build("cpu")(values, moved)[0] - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-5:
        raise SystemExit(f"the kernel is off by {error:.1e}: nothing is timed")
    return error


def measure(batches: list[int], budget: float) -> list[dict[str, Any]]:
    rows = []
    before = torch.get_num_threads()
    for threads in sorted({1, min(2, torch.get_num_threads())}):
        torch.set_num_threads(threads)
        limit = cpu_limits.multiply_adds_per_second(threads)
        for batch in batches:
            values, moved = (
                torch.randn(batch, STEPS, SIDE**2, CHANNELS),
                torch.randint(-1, 2, (batch, STEPS, 2)).float(),
            )
            for trains in (False, True):
                calls = {
                    backend: functools.partial(run, build(backend), values, moved, trains)
                    for backend in (LOOP, "chunked", "cpu")
                }
                found = timer.medians(calls, budget, grad=trains)
                for backend, spent in found.items():
                    row = {"threads": threads, "batch": batch, "measure": "training" if trains else "forward"}
                    share = multiply_adds(batch, trains) / limit / spent
                    times = {"milliseconds": 1e3 * spent, "speedup": found[LOOP] / spent, "limit_fraction": share}
                    rows.append({**row, "backend": backend, **times})
    torch.set_num_threads(before)
    return rows


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    shown = []
    for row in rows:
        numbers = f"{row['milliseconds']:.2f}", f"{row['speedup']:.1f}", f"{100 * row['limit_fraction']:.0f}"
        shown.append([*(str(row[name]) for name in HEADER[:4]), *numbers])
    return shown


TARGETS = {"forward": (5, 10), "training": (4, 8)}  # times the loop: at least, aim
TARGET_HEADER = ("target", "at least", "aim", "measured", "")


def target_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The kernel's least speed-up over batches and threads."""
    shown = []
    for name, (least, aim) in TARGETS.items():
        value = min(row["speedup"] for row in rows if (row["measure"], row["backend"]) == (name, "cpu"))
        outcome = tables.outcome(value, least, aim)
        shown.append([f"{name}, over the loop", f"{least}×", f"{aim}×", f"{value:.1f}×", outcome])
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = result_file.parse(parser, arguments)
    error = check()
    rows = measure([2], 0.0) if chosen.quick else measure([1, 8, 32], 2.0)
    described = environment.describe(torch.device("cpu"))
    result = {
        "benchmark": "place_memory_speed",
        "device": "cpu",
        "environment": described,
        "error": error,
        "rows": rows,
    }
    print(environment.summary(described))
    tables.show("Place memory, 113 frequencies, 25 places, 16 channels, 128 steps", HEADER, cells(rows))
    tables.show("Targets, least over batches and threads", TARGET_HEADER, target_rows(rows))
    result_file.write(result, chosen, "cpu", lambda result, path: "this benchmark has a table only")


if __name__ == "__main__":
    main()
