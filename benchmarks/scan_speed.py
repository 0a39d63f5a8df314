"""Speed of the scans on this machine, beside baselines and the roofline.

    python benchmarks/scan_speed.py                       # CPU
    python benchmarks/scan_speed.py --quick               # smoke test, a few seconds
    python benchmarks/scan_speed.py --device cuda

Prints tables; writes a JSON file and a chart. Each implementation is first checked against the float64 reference.
"""

import argparse
import sys
import time
from typing import Any

import torch

from harness import cpu_limits, environment, result_file
from harness.progress import Progress
from scans import chart, report, training_memory
from scans.measure import Runner
from scans.plan_cpu import CpuPlan
from scans.plan_cuda import CudaPlan
from wmkernels import dispatch

RATES = ("multiply_add", "matrix", "exponential", "copy")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:<index>")
    parser.add_argument(
        "--backends", type=lambda text: text.split(","), help="comma-separated; default: all that run here"
    )
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], help="comma-separated")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the activations; default: float32 on a CPU, bfloat16 on a GPU"
    )
    chosen = result_file.parse(parser, arguments)
    if chosen.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device is {chosen.device}, expected cpu or cuda")
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    chosen.backends = _backends(parser, chosen.backends, device)
    if chosen.lengths is not None and (not chosen.lengths or min(chosen.lengths) < 1):
        parser.error("--lengths must be positive")
    return chosen


def _backends(parser: argparse.ArgumentParser, asked: list[str] | None, device: torch.device) -> list[str]:
    reasons = {name: dispatch.reasons("selective_scan", name, device) for name in dispatch.BACKENDS}
    if asked is None:
        able = [name for name, why in reasons.items() if not why and name not in dispatch.PYTORCH_BACKENDS]
        return able or ["reference"]
    for name in asked:
        if name not in reasons:
            parser.error(f"--backends: there is no {name!r}, only {', '.join(reasons)}")
        if reasons[name]:
            parser.error(f"--backends: {name} cannot run on {device}: {'; '.join(reasons[name])}")
    return asked


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device.index or 0)
    dtype = DTYPES[chosen.dtype or ("bfloat16" if on_gpu else "float32")]
    plan = (CudaPlan if on_gpu else CpuPlan)(chosen.backends, chosen.lengths, dtype, chosen.quick)
    groups = plan.groups()
    result: dict[str, Any] = {
        "benchmark": "scan_speed",
        "device": device.type,
        "quick": chosen.quick,
        "environment": environment.describe(device),
        "missing_baselines": plan.missing,
    }
    with Progress(len(groups) + 3) as progress:
        progress.step("peak rates of the machine")
        limits, verdict = _limits(device)
        before = limits()
        runner = Runner(device, progress)
        for group in groups:
            runner.run(group)
        progress.step("training memory")
        for name, measured in plan.memory().items():
            result[name] = training_memory.measure(*measured, device)
        if on_gpu:
            result["very_long"] = plan.very_long(device)
        progress.step("peak rates of the machine again")
        try:
            after = limits()
            quiet = verdict(before, after)
        except Exception as error:  # a kernel that broke the GPU: earlier rows stay valid
            after, quiet = before, {"quiet": False, "ratios": [], "reason": f"no second measurement: {error}"}
    # Noise only slows: the peak is the faster measurement.
    best = {name: max(before[name], after[name]) for name in RATES if before.get(name) and after.get(name)}
    runner.apply_limits(best)
    result["limits"] = {"before": before, "after": after, "used": best}
    result["quiet"] = quiet
    result["rows"] = runner.rows
    result["seconds"] = time.perf_counter() - start
    return result


def _limits(device: torch.device) -> tuple[Any, Any]:
    if device.type == "cpu":
        return cpu_limits.measure, cpu_limits.verdict
    from harness import gpu_limits

    return lambda: gpu_limits.measure(device), gpu_limits.verdict


def main() -> int:
    chosen = parse_arguments()
    result = run(chosen)
    report.show(result)
    result_file.write(result, chosen, report.machine_slug(result), chart.draw)
    failed = [row for row in result["rows"] if row["backend"] is not None and "error" in row]
    return 1 if failed or any(entry["correct"] is False for entry in result.get("very_long", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
