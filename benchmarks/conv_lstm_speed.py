"""Speed of the ConvLSTM on this machine, beside PyTorch loops and the roofline.

    python benchmarks/conv_lstm_speed.py                  # CPU
    python benchmarks/conv_lstm_speed.py --quick          # smoke test, a few seconds
    python benchmarks/conv_lstm_speed.py --device cuda

Prints tables; writes a JSON file and a chart. Each implementation is first checked against the float64 reference.
"""

import argparse
import sys
import time
from typing import Any

import torch

from conv_lstms import chart, plan, report
from conv_lstms.measure import Runner
from harness import cpu_limits, environment, result_file
from harness.progress import Progress
from scans.report import machine_slug
from wmkernels import dispatch

RATES = ("multiply_add", "matrix", "copy")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:<index>")
    parser.add_argument(
        "--backends", type=lambda text: text.split(","), help="comma-separated; default: all that run here"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    chosen = result_file.parse(parser, arguments)
    if chosen.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device is {chosen.device}, expected cpu or cuda")
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    reasons = {name: dispatch.reasons("conv_lstm", name, device) for name in dispatch.BACKENDS}
    if chosen.backends is None:
        chosen.backends = [n for n, why in reasons.items() if not why and n not in dispatch.PYTORCH_BACKENDS] or [
            "reference"
        ]
    for name in chosen.backends:
        if name not in reasons:
            parser.error(f"--backends: there is no {name!r}, only {', '.join(reasons)}")
        if reasons[name]:
            parser.error(f"--backends: {name} cannot run on {device}: {'; '.join(reasons[name])}")
    return chosen


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    device = torch.device(chosen.device)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    dtype = DTYPES[chosen.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    groups = plan.groups(chosen.backends, dtype, device, chosen.quick)
    result: dict[str, Any] = {
        "benchmark": "conv_lstm_speed",
        "device": device.type,
        "quick": chosen.quick,
        "environment": environment.describe(device),
    }
    with Progress(len(groups) + 2) as progress:
        progress.step("peak rates of the machine")
        limits, verdict = _limits(device, dtype)
        before = limits()
        runner = Runner(device, progress)
        for group in groups:
            runner.run(group)
        progress.step("peak rates of the machine again")
        after = limits()
        quiet = verdict(before, after)
    # Noise only slows: the peak is the faster measurement.
    best = {name: max(before[name], after[name]) for name in RATES if before.get(name) and after.get(name)}
    runner.apply_limits(best)
    result["limits"] = {"before": before, "after": after, "used": best}
    result["quiet"] = quiet
    result["rows"] = runner.rows
    result["seconds"] = time.perf_counter() - start
    return result


def _limits(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    if device.type == "cpu":
        return cpu_limits.measure, cpu_limits.verdict
    from harness import gpu_limits

    return lambda: gpu_limits.measure(device) | {"matrix": gpu_limits.matrix_rate(device, dtype)}, gpu_limits.verdict


def main() -> int:
    chosen = parse_arguments()
    result = run(chosen)
    report.show(result)
    result_file.write(result, chosen, machine_slug(result), chart.draw)
    return 1 if any(row["backend"] is not None and "error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
