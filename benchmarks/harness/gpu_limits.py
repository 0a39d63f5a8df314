"""Peak rates of the GPU: multiply-adds and ex2 on registers, copy bandwidth. Without Triton: copy bandwidth only."""

from typing import Any

import torch

TRIES = 5
ROUNDS = 256


def measure(device: torch.device) -> dict[str, Any]:
    rates: dict[str, Any] = {"copy": _copy_rate(device), "multiply_add": None, "exponential": None}
    try:
        rates |= _arithmetic_rates(device)
    except Exception as error:
        rates["arithmetic_error"] = f"{type(error).__name__}: {str(error)[:200]}"
    rates["units"] = {
        "multiply_add": "fp32 multiply-adds per second",
        "exponential": "special-function exponentials per second",
        "copy": "bytes read and written per second by Tensor.copy_ of 1 GiB",
    }
    return rates


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of a large matrix product, on tensor cores if any."""
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return size**3 / _best_seconds(lambda: torch.mm(a, b, out=out))


def verdict(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Quiet if the copy bandwidth is unchanged: other processes and thermal throttling change it."""
    ratio = after["copy"] / before["copy"]
    quiet = 0.9 < ratio < 1.1
    reason = f"the copy bandwidth after the run was {ratio:.2f} times that before"
    return {"quiet": quiet, "ratios": [ratio], "reason": reason}


def _best_seconds(work: Any) -> float:
    work()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))


def _arithmetic_rates(device: torch.device) -> dict[str, float]:
    from harness.gpu_limit_kernels import BLOCK, exponential_kernel, multiply_add_kernel

    programs = 32 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * BLOCK, dtype=torch.float32, device=device)
    rounds = ROUNDS
    per_launch = programs * BLOCK * rounds * 16
    grid = (programs,)
    multiply_add = _best_seconds(
        lambda: multiply_add_kernel[grid](out, 0.999, 0.001, rounds, num_warps=8, enable_fp_fusion=True)
    )
    exponential = _best_seconds(lambda: exponential_kernel[grid](out, 0.5, rounds, num_warps=8, enable_fp_fusion=True))
    return {"multiply_add": per_launch / multiply_add, "exponential": per_launch / exponential}
