"""What the kernels are meant to reach: ratios of rows of one group, looked up and computed, never typed."""

from collections.abc import Callable
from typing import Any

from scans.targets import Result, Target, rows

# (hidden, size, at least, aim): forward on a CPU over the better loop; training four fifths of each.
CPU = ((16, 64, 2.5, 3.3), (16, 8, 5.0, 8.0), (32, 32, 1.6, 2.0), (64, 16, 1.25, 1.5))
# (sizes, measure, (at least, aim) over the loop in channels last, and over the compiled loop's CUDA graph)
GPU = (
    ({"batch": 1, "hidden": 64, "size": 16, "kernel": 3}, "forward", (12, 25), (2.5, 4)),
    ({"batch": 1, "hidden": 64, "size": 16, "kernel": 3}, "training", (8, 18), (2, 3)),
    ({"batch": 16, "hidden": 128, "size": 16, "kernel": 5}, "forward", (1.8, 2.5), (1.15, 1.3)),
    ({"batch": 16, "hidden": 64, "size": 128, "kernel": 3}, "forward", (2, 3), (1.1, 1.3)),
)
LOOPS = ("loop", "loop, channels last")
EAGER, GRAPH = ("loop, channels last",), ("CUDA graph of the compiled loop",)


def times_faster(fields: dict[str, Any], peers: tuple[str, ...]) -> Callable[[Result], float | None]:
    """How many times faster the best of ours is than the best of these peers, in the rows with these fields."""

    def ratio(result: Result) -> float | None:
        mine = [row["milliseconds"] for row in rows(result, ours=True, **fields)]
        theirs = [row["milliseconds"] for name in peers for row in rows(result, contender=name, **fields)]
        return min(theirs) / min(mine) if mine and theirs else None

    return ratio


def saved_share(result: Result) -> float | None:
    """The worst row with gates recomputed: what autograd keeps beyond x and h, as a share of h and the cell."""
    shares = []
    for row in rows(result, ours=True, measure="training"):
        if "recomputed" in row["contender"] and "saved_bytes" in row:
            cells = row["activation_bytes"]["h"] * (2 if row["dtype"] in ("bfloat16", "float16") else 1)
            shares.append(100 * row["saved_bytes"] / cells)
    return max(shares, default=None)


def targets_of(device: str) -> list[Target]:
    """Those of the device."""
    found = []
    if device == "cpu":
        for share, measure in ((1.0, "forward"), (0.8, "training")):
            for hidden, size, least, aim in CPU:
                fields = {"hidden": hidden, "size": size, "measure": measure}
                name = f"{measure}, {hidden} channels, {size}×{size}, over the better loop"
                found.append(Target(name, share * least, share * aim, "times", times_faster(fields, LOOPS)))
    else:
        for sizes, measure, eager, graph in GPU:
            name = f"{measure}, batch {sizes['batch']}, {sizes['hidden']} channels, {sizes['size']}×{sizes['size']}"
            for peers, words, (least, aim) in ((EAGER, "loop, channels last", eager), (GRAPH, "CUDA graph", graph)):
                measured = times_faster(sizes | {"measure": measure}, peers)
                found.append(Target(f"{name}, over the {words}", least, aim, "times", measured))
    name = "kept for the backward pass beyond x and h, gates recomputed, as a share of the cell"
    return [*found, Target(name, 100, 100, "percent", saved_share, most=True)]


def assess(result: Result) -> list[dict[str, Any]]:
    """Every target of the result's device."""
    return [target.assess(result) for target in targets_of(result["device"])]
