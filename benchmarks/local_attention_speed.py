"""Speed of ``nn.LocalAttention`` on a CPU, beside its plain form and PyTorch's attention alone.

    python benchmarks/local_attention_speed.py             # into benchmarks/results/local/
    python benchmarks/local_attention_speed.py --publish   # into benchmarks/results/
    python benchmarks/local_attention_speed.py --quick

64 features, 4 heads, one thread. The plain form attends to every token of the sequence under a mask. The limit is
``F.scaled_dot_product_attention`` on tensors of its own layout, with exactly the scores of the windows, or the causal
ones where a window holds the whole sequence. All three leave out the projections, which are timed apart.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import environment, result_file, tables, timer
from wmkernels.nn import LocalAttention

WIDTH, HEADS, QUERIES = 64, 4, 32
PLAIN, ALONE, MODULE, PROJECTIONS = "plain", "attention alone", "module", "projections"
CASES = (  # batch, time, grid, frames
    (8, 128, (5, 5), 2),
    (8, 128, (5, 5), 16),
    (32, 128, (1, 1), 16),
    (32, 128, (1, 1), 128),
    (16, 256, (1, 1), 64),
    (1, 4096, (1, 1), 128),
)
HEADER = (
    "shape",
    "measure",
    "plain, ms",
    "module, ms",
    "attention alone, ms",
    "projections, ms",
    "× plain",
    "% of the limit",
)


class Plain(LocalAttention):
    """Scores of all tokens, and a mask."""

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, segments: Tensor | None) -> Tensor:
        return self._attend_at_once(queries, keys, values, seen)


def alone(batch: int, steps: int, tokens: int, frames: int) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """Queries, keys and values of the limit, and whether it is causal."""
    whole = frames >= steps and tokens == 1
    size = steps if whole else max(1, min(QUERIES // tokens, steps))
    window = steps if whole else min(frames, steps)
    rows = batch * steps // size

    def heads(frames: int) -> Tensor:
        return torch.randn(rows, frames * tokens, HEADS, WIDTH // HEADS).transpose(1, 2)

    return (heads(size), heads(window), heads(window)), whole


def calls(batch: int, steps: int, grid: tuple[int, int], frames: int, trains: bool) -> dict[str, Callable[[], None]]:
    tokens = grid[0] * grid[1]
    module = LocalAttention(WIDTH, frames, HEADS, grid)
    plain = Plain(WIDTH, frames, HEADS, grid)
    plain.load_state_dict(module.state_dict())
    inputs, given = (torch.randn(batch, steps, tokens, WIDTH) for _ in range(2))
    (q, k, v), causal = alone(batch, steps, tokens, frames)
    given_projected = torch.randn(batch, steps, tokens, 3 * WIDTH)
    error = (plain(inputs[:1])[0] - module(inputs[:1])[0]).abs().max().item()
    if error > 1e-4:
        raise SystemExit(f"the module is off by {error:.1e}: nothing is timed")

    def run(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], gradient: Tensor | None) -> None:
        if not trains:
            function(*arguments)
            return
        leaves = [x.detach().requires_grad_() for x in arguments]
        outputs = function(*leaves)
        outputs.backward(outputs.detach() if gradient is None else gradient)

    def project() -> None:
        run(module.in_proj, (inputs,), given_projected)
        run(module.out_proj, (inputs,), given)

    return {
        PLAIN: lambda: run(lambda x: plain(x)[0], (inputs,), given),
        MODULE: lambda: run(lambda x: module(x)[0], (inputs,), given),
        ALONE: lambda: run(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal), (q, k, v), None),
        PROJECTIONS: project,
    }


def measure(cases: tuple[tuple[int, int, tuple[int, int], int], ...], budget: float) -> list[dict[str, Any]]:
    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for batch, steps, grid, frames in cases:
        for trains in (False, True):
            found = timer.medians(calls(batch, steps, grid, frames, trains), budget, grad=trains)
            apart = found.pop(PROJECTIONS)
            milliseconds = {name: 1e3 * (x if name == ALONE else x - apart) for name, x in found.items()}
            rows.append(
                {
                    "batch": batch,
                    "steps": steps,
                    "grid": list(grid),
                    "frames": frames,
                    "measure": "training" if trains else "forward",
                    "milliseconds": milliseconds | {PROJECTIONS: 1e3 * apart},
                    "speedup": milliseconds[PLAIN] / milliseconds[MODULE],
                    "limit_fraction": milliseconds[ALONE] / milliseconds[MODULE],
                }
            )
    torch.set_num_threads(before)
    return rows


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    shown = []
    for row in rows:
        rows_of, columns = row["grid"]
        shape = f"B{row['batch']} T{row['steps']} {rows_of}x{columns}, {row['frames']} frames"
        times = [f"{row['milliseconds'][name]:.1f}" for name in (PLAIN, MODULE, ALONE, PROJECTIONS)]
        shown.append([shape, row["measure"], *times, f"{row['speedup']:.1f}", f"{100 * row['limit_fraction']:.0f}"])
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = result_file.parse(parser, arguments)
    rows = measure(((1, 16, (2, 2), 3),), 0.0) if chosen.quick else measure(CASES, 2.0)
    described = environment.describe(torch.device("cpu"))
    result = {"benchmark": "local_attention_speed", "device": "cpu", "environment": described, "rows": rows}
    print(environment.summary(described))
    tables.show("Local attention, 64 features, 4 heads, one thread", HEADER, cells(rows))
    result_file.write(result, chosen, "cpu", lambda result, path: "this benchmark has a table only")


if __name__ == "__main__":
    main()
