"""ConvLSTM targets: speedups between rows of a group."""

from collections.abc import Callable
from typing import Any

from scans.targets import Result, Target, rows

# (hidden, size, at least, aim): CPU, forward, over the faster loop; training: four fifths.
CPU = ((16, 64, 2.5, 3.3), (16, 8, 5.0, 8.0), (32, 32, 1.6, 2.0), (64, 16, 1.25, 1.5))
# (sizes, measure, (at least, aim) over the loop, channels last, and over the compiled loop's CUDA graph)
GPU = (
    ({"batch": 1, "hidden": 64, "size": 16, "kernel": 3}, "forward", (12, 25), (2.5, 4)),
    ({"batch": 1, "hidden": 64, "size": 16, "kernel": 3}, "training", (8, 18), (2, 3)),
    ({"batch": 16, "hidden": 128, "size": 16, "kernel": 5}, "forward", (1.8, 2.5), (1.15, 1.3)),
    ({"batch": 16, "hidden": 64, "size": 128, "kernel": 3}, "forward", (1.3, 1.6), (1.1, 1.3)),
)
REPLACED = {
    "forward, batch 16, 64 channels, 128×128, over the loop, channels last": (
        (2, 3),
        "predicted: the convolution alone takes 258 of the loop's 466 µs, so the ratio stays below 1.8×",
    ),
}
"""Previous ``(at_least, aim)`` of targets that no cell update can reach, and why."""
LOOPS = ("loop", "loop, channels last")
EAGER, GRAPH = ("loop, channels last",), ("CUDA graph of the compiled loop",)


def times_faster(fields: dict[str, Any], baselines: tuple[str, ...]) -> Callable[[Result], float | None]:
    """Speedup of the fastest backend over the fastest baseline."""

    def ratio(result: Result) -> float | None:
        mine = [row["milliseconds"] for row in rows(result, ours=True, **fields)]
        theirs = [row["milliseconds"] for name in baselines for row in rows(result, implementation=name, **fields)]
        return min(theirs) / min(mine) if mine and theirs else None

    return ratio


def saved_percent(result: Result) -> float | None:
    """Worst row with recomputed gates: saved bytes beyond x and h, in % of the cell state."""
    percents = []
    for row in rows(result, ours=True, measure="training"):
        if "recomputed" in row["implementation"] and "saved_bytes" in row:
            cells = row["activation_bytes"]["h"] * (2 if row["dtype"] in ("bfloat16", "float16") else 1)
            percents.append(100 * row["saved_bytes"] / cells)
    return max(percents, default=None)


def targets_of(device: str) -> list[Target]:
    found = []
    if device == "cpu":
        for factor, measure in ((1.0, "forward"), (0.8, "training")):
            for hidden, size, least, aim in CPU:
                fields = {"hidden": hidden, "size": size, "measure": measure}
                name = f"{measure}, {hidden} channels, {size}×{size}, over the faster loop"
                found.append(Target(name, factor * least, factor * aim, "times", times_faster(fields, LOOPS)))
    else:
        for sizes, measure, eager, graph in GPU:
            name = f"{measure}, batch {sizes['batch']}, {sizes['hidden']} channels, {sizes['size']}×{sizes['size']}"
            for baselines, words, (least, aim) in ((EAGER, "loop, channels last", eager), (GRAPH, "CUDA graph", graph)):
                measured = times_faster(sizes | {"measure": measure}, baselines)
                found.append(Target(f"{name}, over the {words}", least, aim, "times", measured))
    name = "saved for the backward pass beyond x and h, gates recomputed, % of the cell state"
    return [*found, Target(name, 100, 100, "percent", saved_percent, most=True)]


def assess(result: Result) -> list[dict[str, Any]]:
    if result["quick"]:
        return []
    return [target.assess(result) for target in targets_of(result["device"])]
