"""Peak rates of the CPU: multiply-adds, matrix products, exponentials, copy bandwidth.

Multiply-adds count as vector instructions of 16 fp32 lanes. Without the extension, a large matrix product measures
them as well, at about five sixths of the peak. The best try counts: noise only slows.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wmkernels.dispatch import load_native

LANES = 16
QUIET_RATIO = 1.7
TRIES = 5


def measure() -> dict[str, Any]:
    """Rates with one, two and all threads."""
    threads = torch.get_num_threads()
    counts = sorted({1, min(2, threads), threads})
    try:
        multiply_adds, method = _multiply_adds(counts)
        products = {count: _with_threads(count, _matrix_rate) for count in counts}
        exponentials = {count: _with_threads(count, _exponential_rate) for count in counts}
        copies = {count: _with_threads(count, _copy_rate) for count in counts}
    finally:
        torch.set_num_threads(threads)
    ratio = multiply_adds[2] / multiply_adds[1] if 2 in multiply_adds else None
    return {
        "threads": threads,
        "multiply_add": multiply_adds[threads],
        "matrix": products[threads],
        "exponential": exponentials[threads],
        "copy": copies[threads],
        "by_threads": {"multiply_add": multiply_adds, "matrix": products, "exponential": exponentials, "copy": copies},
        "multiply_add_method": method,
        "two_thread_ratio": ratio,
        "units": {
            "multiply_add": "vector instructions of 16 fp32 lanes per second",
            "matrix": "multiply-adds per second of torch.mm in fp32",
            "exponential": "torch.exp in fp32, elements per second",
            "copy": "bytes read and written per second by Tensor.copy_ of 128 MiB",
        },
    }


def verdict(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    ratios = [x["two_thread_ratio"] for x in (before, after)]
    if None in ratios:
        return {"quiet": True, "ratios": ratios, "reason": "one core: there is no second thread to compare with"}
    worst = min(ratios)
    if worst < QUIET_RATIO:
        reason = f"two threads did only {worst:.2f} times the multiply-adds of one (below {QUIET_RATIO}): busy"
        return {"quiet": False, "ratios": ratios, "reason": reason}
    return {"quiet": True, "ratios": ratios, "reason": f"two threads did {worst:.2f} times the multiply-adds of one"}


def multiply_adds_per_second(threads: int) -> float:
    """In fp32, by vectors."""
    rates, _ = _multiply_adds([threads])
    return LANES * rates[threads]


def _with_threads(count: int, rate: Callable[[], float]) -> float:
    torch.set_num_threads(count)
    return rate()


def _best(work: Callable[[], object], tries: int = TRIES) -> float:
    best = float("inf")
    for _ in range(tries + 1):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _multiply_adds(counts: list[int]) -> tuple[dict[int, float], str]:
    native = load_native()
    if native is not None and hasattr(native, "cpu_multiply_adds"):
        return {count: _register_rate(native.cpu_multiply_adds, count) for count in counts}, "registers"
    return {count: _with_threads(count, _matrix_rate) / LANES for count in counts}, "matrix product"


def _matrix_rate() -> float:
    size = 1536
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return size**3 / _best(lambda: torch.mm(a, b, out=out))


def _register_rate(multiply_adds: Callable[[int], int], count: int) -> float:
    rounds = 6_000_000
    done = multiply_adds(1)

    def work() -> None:
        workers = [threading.Thread(target=multiply_adds, args=(rounds,)) for _ in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return count * rounds * done / LANES / _best(work)


def _exponential_rate() -> float:
    x = torch.linspace(-8, 0, 1 << 18)
    out = torch.empty_like(x)

    def work() -> Tensor:
        for _ in range(8):
            torch.exp(x, out=out)
        return out

    return 8 * x.numel() / _best(work)


def _copy_rate() -> float:
    source = torch.zeros(1 << 25)  # 128 MiB: beyond caches
    target = torch.zeros(1 << 25)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))
