"""Targets of the kernels; tables in the documents are generated from these."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A bound to reach, and an aim beyond it.

    Attributes:
        unit: times, percent or microseconds.
        measured: value in a result; None if not measured.
        most: the bound is an upper one.
        at_limit: value at the roofline; None if undefined.
    """

    name: str
    at_least: float
    aim: float
    unit: str
    measured: Callable[[Result], float | None]
    most: bool = False
    at_limit: Callable[[Result], float | None] = lambda result: None

    def assess(self, result: Result) -> dict[str, Any]:
        value = self.measured(result)

        def reached(bound: float) -> bool:
            assert value is not None
            return value <= bound if self.most else value >= bound

        if value is None:
            outcome = "not measured"
        elif not result["quiet"]["quiet"]:
            outcome = "no verdict"
        else:
            outcome = "aim" if reached(self.aim) else "pass" if reached(self.at_least) else "missed"
        return {
            "name": self.name,
            "at_least": self.at_least,
            "aim": self.aim,
            "unit": self.unit,
            "most": self.most,
            "measured": value,
            "at_limit": self.at_limit(result),
            "outcome": outcome,
        }


def rows(result: Result, **fields: Any) -> list[dict[str, Any]]:
    """``ours=True``: any of our backends."""
    wanted = fields.pop("ours", None)
    return [
        candidate
        for candidate in result["rows"]
        if "milliseconds" in candidate
        and (wanted is None or (candidate["backend"] is not None) == wanted)
        and all(candidate.get(name) == value for name, value in fields.items())
    ]


def row(result: Result, **fields: Any) -> dict[str, Any] | None:
    return next(iter(rows(result, **fields)), None)


def over(slow: dict[str, Any], **fast: Any) -> Callable[[Result], float | None]:
    """Speedup of ``fast`` over ``slow`` per element, within a group if possible."""

    def ratio(result: Result) -> float | None:
        pairs = [(a, b) for a in rows(result, **slow) for b in rows(result, **fast)]
        if not pairs:
            return None
        a, b = next((pair for pair in pairs if pair[0]["group"] == pair[1]["group"]), pairs[0])
        return a["ns_per_element"] / b["ns_per_element"]

    return ratio


def over_fastest(baselines: str, fast: dict[str, Any]) -> Callable[[Result], float | None]:
    """Speedup of ours over the fastest baseline whose name begins with ``baselines``."""

    def ratio(result: Result) -> float | None:
        found = [x["ns_per_element"] for x in rows(result, **fast) if x["implementation"].startswith(baselines)]
        own = row(result, **fast, ours=True)
        return None if own is None or not found else min(found) / own["ns_per_element"]

    return ratio


def roofline_percent(**fields: Any) -> Callable[[Result], float | None]:
    def percent(result: Result) -> float | None:
        found = row(result, **fields)
        return None if found is None or "roofline_fraction" not in found else 100 * found["roofline_fraction"]

    return percent


def memory_percent(name: str) -> Callable[[Result], float | None]:
    def percent(result: Result) -> float | None:
        memory = result.get(name)
        return None if memory is None or memory.get("fraction") is None else 100 * memory["fraction"]

    return percent


CPU_SIZES = {"op": "selective_scan", "batch": 1, "channels": 1536, "dtype": "float32", "gated": False}
PLAIN = CPU_SIZES | {"channel_last": False}
FORWARD = PLAIN | {"measure": "forward", "time": 2048}
TRAINING = PLAIN | {"measure": "training", "time": 512}
LONG = {"op": "selective_scan", "channels": 96, "measure": "forward", "dtype": "float32", "ours": True}
STEP = {"op": "selective_step", "batch": 1, "channels": 1536, "dtype": "float32"}
LINEAR = {"op": "linear_scan", "channels": 1536, "dtype": "float32", "measure": "forward", "channel_last": False}
LAST = CPU_SIZES | {"measure": "forward", "time": 2048, "channel_last": True, "ours": True}
HALF = FORWARD | {"dtype": "bfloat16", "ours": True}


DELTA = {"op": "gated_delta_rule", "channels": 512, "state": 64, "dtype": "float32", "time": 2048}
DELTA_TRAINING = DELTA | {"measure": "training", "channel_last": False}


SSD = {"op": "ssd_scan", "channels": 1536, "state": 128, "dtype": "float32", "time": 2048}
SSD_FORWARD = SSD | {"measure": "forward"}
CONVOLUTION = {"op": "causal_conv1d", "channels": 1536, "time": 2048, "dtype": "float32", "channel_last": False}
CONVOLUTION_STEP = {"op": "causal_conv1d_step", "batch": 1, "channels": 1536, "dtype": "float32"}


def _over_baseline(name: str, least: float, aim: float, fields: dict[str, Any], baseline: str) -> Target:
    measured = over(fields | {"implementation": baseline}, **fields, ours=True)
    percent = roofline_percent(**fields, ours=True)

    def at_limit(result: Result) -> float | None:
        times, reached = measured(result), percent(result)
        return None if times is None or reached is None else times / (reached / 100)

    return Target(f"{name} over {baseline}", least, aim, "times", measured, at_limit=at_limit)


CPU_TARGETS = (
    _over_baseline("forward, 2,048 steps,", 20, 25, FORWARD, "best loop"),
    _over_baseline("forward, 2,048 steps,", 110, 180, FORWARD, "mambapy"),
    Target("channel_last over channel-first, time", 1.15, 1.0, "times", over(LAST, **FORWARD, ours=True), most=True),
    _over_baseline("training, 512 steps,", 40, 60, TRAINING, "best loop"),
    _over_baseline("training, 512 steps,", 50, 90, TRAINING, "mambapy"),
    _over_baseline("training, 512 steps,", 2000, 4000, TRAINING, "materialising loop"),
    Target("forward, % of roofline", 50, 80, "percent", roofline_percent(**FORWARD, ours=True)),
    Target(
        "ns/element, 1,048,576 steps over 4,096",
        1.3,
        1.1,
        "times",
        over(LONG | {"time": 1048576}, **LONG | {"time": 4096}),
        most=True,
    ),
    Target(
        "training memory beyond inputs, outputs and gradients, 65,536 steps",
        10,
        3,
        "percent",
        memory_percent("training_memory"),
        most=True,
    ),
    _over_baseline("selective_step", 4, 6, STEP, "PyTorch expression"),
    Target("bfloat16 input, speed over float32", 0.95, 1.05, "times", over(FORWARD | {"ours": True}, **HALF)),
    Target("linear_scan forward, % of copy bandwidth", 60, 85, "percent", roofline_percent(**LINEAR, ours=True)),
    _over_baseline("gated_delta_rule training, 8 heads, 2,048 steps,", 20, 60, DELTA_TRAINING, "recurrent loop"),
    _over_baseline("ssd_scan forward, 24 heads, 128 states,", 10, 16, SSD_FORWARD, "chunked form, 256 steps"),
    Target(
        "ssd_scan forward, over the chunked form at its best",
        3,
        5,
        "times",
        over_fastest("chunked form", SSD_FORWARD),
    ),
    _over_baseline("ssd_scan forward,", 1.6, 2.5, SSD_FORWARD, "selective_scan, A expanded"),
    Target(
        "ssd_scan forward, % of the rate of matrix products",
        30,
        50,
        "percent",
        roofline_percent(**SSD_FORWARD, ours=True),
    ),
    _over_baseline("ssd_scan training,", 4, 8, SSD | {"measure": "training"}, "chunked form, 256 steps"),
    Target(
        "ssd_scan, training memory beyond inputs, outputs and gradients",
        25,
        15,
        "percent",
        memory_percent("ssd_training_memory"),
        most=True,
    ),
    _over_baseline("causal_conv1d forward,", 2, 4, CONVOLUTION | {"measure": "forward"}, "conv1d and silu"),
    _over_baseline("causal_conv1d training,", 2, 3, CONVOLUTION | {"measure": "training"}, "conv1d and silu"),
    _over_baseline("causal_conv1d_step", 4, 8, CONVOLUTION_STEP, "conv1d update"),
)

GPU_SIZES = {"op": "selective_scan", "dtype": "bfloat16", "channel_last": False}
BIG = GPU_SIZES | {"batch": 8, "channels": 1536, "time": 4096}
NARROW = GPU_SIZES | {"batch": 1, "channels": 128, "time": 32768}
GROWTH = GPU_SIZES | {"batch": 1, "channels": 1536, "measure": "forward", "ours": True}
GPU_LINEAR = {"op": "linear_scan", "dtype": "bfloat16", "measure": "forward", "channel_last": False, "ours": True}


def _gpu_pair(measure: str, sizes: dict[str, Any], what: str, least: float, aim: float) -> Target:
    return _over_baseline(f"{measure}, {what},", least, aim, sizes | {"measure": measure}, "mamba_ssm")


def _microseconds(result: Result) -> float | None:
    found = row(result, op="selective_step", batch=1, channels=1536, ours=True)
    return None if found is None else found["milliseconds"] * 1e3


GPU_TARGETS = (
    _gpu_pair("forward", BIG, "B8 D1536 L4096", 1.5, 2.5),
    _gpu_pair("backward", BIG, "B8 D1536 L4096", 2, 4),
    _gpu_pair("forward", NARROW, "B1 D128 L32,768", 4, 10),
    _gpu_pair("backward", NARROW, "B1 D128 L32,768", 4, 10),
    Target(
        "ns/element, B1 D1536, 262,144 steps over 4,096",
        1.1,
        1.0,
        "times",
        over(GROWTH | {"time": 262144}, **GROWTH | {"time": 4096}),
        most=True,
    ),
    Target("forward, % of roofline", 60, 85, "percent", roofline_percent(**BIG, measure="forward", ours=True)),
    Target("backward, % of roofline", 50, 75, "percent", roofline_percent(**BIG, measure="backward", ours=True)),
    Target("linear_scan forward, % of copy bandwidth", 80, 92, "percent", roofline_percent(**GPU_LINEAR)),
    Target("selective_step in a CUDA graph, B1 D1536", 4, 2.5, "microseconds", _microseconds, most=True),
)


REPLACED = {"forward, 2,048 steps, over best loop": (50, 70), "selective_step over PyTorch expression": (4, 8)}
"""Previous ``(at_least, aim)`` of targets beyond the roofline."""


def assess(result: Result) -> list[dict[str, Any]]:
    if result["quick"]:
        return []
    return [target.assess(result) for target in (CPU_TARGETS if result["device"] == "cpu" else GPU_TARGETS)]
