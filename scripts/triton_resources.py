"""Tabulates registers, stack and shared memory of the Triton kernels.

Needs no GPU: launchers run on CPU tensors and compile instead of launching.

    python scripts/triton_resources.py            writes docs/triton_resources.json
    python scripts/triton_resources.py --check    fails if it differs or a kernel spills
    python scripts/triton_resources.py --only fp32 --arch 90 --dump FOLDER    also writes the disassembly
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from wmkernels import triton_runtime
from wmkernels.conv_lstm import per_step, triton_convolution
from wmkernels.conv_lstm import triton_kernels as conv_lstm
from wmkernels.conv_lstm.meta import KEEP_CELLS, KEEP_GATES, KEEP_NOTHING, ConvLSTMInputs
from wmkernels.gated_delta_rule import triton_kernels as delta_rule
from wmkernels.gated_delta_rule.meta import CHUNK, DeltaRuleInputs
from wmkernels.linear_scan import triton_kernels as linear
from wmkernels.linear_scan.meta import LinearScanInputs
from wmkernels.place_memory import triton_kernels as place_memory
from wmkernels.place_memory.meta import PlaceMemoryInputs
from wmkernels.selective_scan import triton_kernels as selective
from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.selective_step import triton_kernels as selective_step
from wmkernels.selective_step.meta import StepInputs

TABLE = Path(__file__).parent.parent / "docs" / "triton_resources.json"
ARCHITECTURES = (80, 90, 100, 120)
# bytes per block, of compute capability 12.0
SHARED_LIMIT = 99 * 1024
# bytes per thread; ptxas may spill one or two values with registers free
STACK_LIMIT = 16
TOOLS = Path(nvidia.__file__).parent / "bin"


class CompileOnly:
    """Replaces Triton's driver."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(architecture: int, made: list[tuple[str, int, Any]]) -> Iterator[None]:
    """``made`` gets (kernel name, warps, compiled kernel)."""

    def compile_instead(kernel: Any, programs: int, *arguments: Any, num_warps: int, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=(1,), num_warps=num_warps, enable_fp_fusion=True, **options)
        made.append((kernel.fn.__name__, num_warps, compiled))

    launch, triton_runtime.launch = triton_runtime.launch, compile_instead
    triton.runtime.driver.set_active(CompileOnly(architecture))
    try:
        yield
    finally:
        triton_runtime.launch = launch


def resources(compiled: Any, dump: Path | None) -> dict[str, int]:
    """Stack in bytes per thread, shared in bytes per block."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        if dump:
            code = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True)
            dump.with_suffix(".sass").write_text(code.stdout)
            dump.with_suffix(".ttgir").write_text(compiled.asm["ttgir"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


def activations(batch: int, channels: int, time: int, dtype: torch.dtype, channel_last: bool) -> Tensor:
    if channel_last:
        return torch.empty((batch, time, channels), dtype=dtype).transpose(1, 2)
    return torch.empty((batch, channels, time), dtype=dtype)


def run_selective_scan(state: int, dtype: torch.dtype, channel_last: bool, everything: bool, cut: bool) -> None:
    """``everything``: z, reset, packing, bias."""
    batch, channels, time, chunk = 1, 256, 1024, 64
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    u, delta, grad = (activations(batch, channels, time, dtype, channel_last) for _ in range(3))
    A, D = torch.empty((channels, state), dtype=parameter), torch.empty(channels, dtype=parameter)
    memory = (batch, 1, time, state) if channel_last else (batch, 1, state, time)
    B, C = (torch.empty(memory, dtype=dtype) for _ in range(2))
    if channel_last:
        B, C = B.transpose(2, 3), C.transpose(2, 3)
    z = activations(batch, channels, time, dtype, channel_last)
    reset = torch.zeros((batch, time), dtype=torch.bool) if everything else None
    cu_seqlens = torch.tensor([0, time]) if everything else None
    first = torch.empty((batch, channels, state), dtype=parameter)
    inputs = ScanInputs(u, delta, A, B, C, D, z, D, first, reset, cu_seqlens, True, channel_last)
    segment = 256 if cut else 2 * time
    out = selective.forward(inputs, chunk, segment_length=segment)
    selective.backward(grad, first, inputs, out[2], chunk, segment_length=segment)


def run_selective_step(state: int, dtype: torch.dtype) -> None:
    batch, channels = 2, 256
    h, A = torch.empty((batch, channels, state)), torch.empty((channels, state))
    u, B, D = torch.empty((batch, channels), dtype=dtype), torch.empty((batch, 1, state), dtype=dtype), A[:, 0]
    inputs = StepInputs(h, u, u, A, B, B, D, u, D, torch.zeros(batch, dtype=torch.bool), True)
    selective_step.step(inputs, h, torch.arange(batch))


def run_linear_scan(dtype: torch.dtype, channel_last: bool, reset: bool, reverse: bool) -> None:
    batch, channels, time = 2, 256, 1024
    gates, tokens, grad = (activations(batch, channels, time, dtype, channel_last) for _ in range(3))
    first = torch.empty((batch, channels))
    resets = torch.zeros((batch, time), dtype=torch.bool) if reset else None
    inputs = LinearScanInputs(gates, tokens, first, resets, reverse, channel_last)
    out, _ = linear.forward(inputs, segment_length=256)
    linear.backward(grad, first, inputs, out, segment_length=256)


def run_gated_delta_rule(size: int, dtype: torch.dtype, everything: bool) -> None:
    """``everything``: initial state, reset, packing."""
    time, wide = 1024, torch.float64 if dtype == torch.float64 else torch.float32
    q, gate = torch.empty((1, 2, size, time), dtype=dtype), torch.empty((1, 2, time), dtype=wide)
    first = torch.empty((1, 2, size, size), dtype=wide) if everything else None
    reset = torch.zeros((1, time), dtype=torch.bool) if everything else None
    cu_seqlens = torch.tensor([0, time]) if everything else None
    inputs = DeltaRuleInputs(q, q, q, gate, gate, first, reset, cu_seqlens, size**-0.5)
    _, _, *kept = delta_rule.forward(inputs, CHUNK)
    delta_rule.backward(q, first, inputs, *kept, CHUNK)


def run_conv_lstm_update(dtype: torch.dtype, everything: bool, keep: int) -> None:
    """``everything``: bias, peephole, reset."""
    time, batch, hidden, size = 2, 2, 64, 16
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = torch.empty((time, batch, hidden, size, size), dtype=dtype), torch.empty((4 * hidden, hidden, 1, 1))
    bias, peephole = torch.empty(4 * hidden, dtype=parameter), torch.empty((3, hidden), dtype=parameter)
    reset = torch.zeros((time, batch), dtype=torch.bool)
    extra = (bias, peephole, None, None, reset) if everything else (None,) * 5
    options = ((1, 1), (0, 0, 0, 0), (1, 1))
    inputs = ConvLSTMInputs(x, weight.to(dtype), weight.to(dtype), *extra, *options)
    outputs = per_step.forward(conv_lstm.Update(), inputs, keep)
    if keep:
        grads = (outputs[0], None, None)
        per_step.backward(conv_lstm.Update(), grads, inputs, outputs[0], *outputs[3:])


def run_conv_lstm_at_once(dtype: torch.dtype, size: int, everything: bool) -> None:
    hidden = 64
    x = torch.empty((2, 1, hidden, size, size), dtype=dtype)
    weight, bias = torch.empty((4 * hidden, hidden, 3, 3), dtype=dtype), torch.empty(4 * hidden)
    peephole = torch.empty((3, hidden)) if everything else None
    reset = torch.zeros((2, 1), dtype=torch.bool) if everything else None
    inputs = ConvLSTMInputs(x, weight, weight, bias, peephole, None, None, reset, (1, 1), (1, 1, 1, 1), (1, 1))
    outputs = conv_lstm.forward_outputs(inputs, KEEP_GATES if everything else KEEP_NOTHING)
    per_step.run_steps(triton_convolution.FusedStep(inputs), outputs, inputs)


def run_place_memory(dtype: torch.dtype, everything: bool) -> None:
    """``everything``: gate, initial state and phase, reset, packing, gradients of phases; else an additive write."""
    time, places, rows, channels = 64, 25, 226, 16
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    values, phase = (
        torch.empty((1, time, places, channels), dtype=dtype),
        torch.empty((1, time, 1, rows), dtype=parameter),
    )
    keys, inverse = torch.empty((places, rows), dtype=parameter), torch.empty((places, places), dtype=parameter)
    state, first = torch.empty((1, 1, rows, channels), dtype=parameter), phase[:, 0]
    reset, cu_seqlens = torch.zeros((1, time), dtype=torch.bool), torch.tensor([0, time])
    extra = (inverse, phase[..., :places].mT, state, first, reset, cu_seqlens) if everything else ()
    inputs = PlaceMemoryInputs(values, phase, keys, *extra)
    out, _, residual = place_memory.forward(inputs, everything)
    place_memory.backward(out, state, inputs, residual, (everything, everything))


def cases() -> dict[str, Callable[[], None]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    scan = run_selective_scan
    return {
        "selective_scan bf16 state 4": lambda: scan(4, bf16, False, False, True),
        "selective_scan bf16 state 16": lambda: scan(16, bf16, False, False, True),
        "selective_scan bf16 state 16 channel last": lambda: scan(16, bf16, True, False, False),
        "selective_scan bf16 state 16 packed reset": lambda: scan(16, bf16, False, True, True),
        "selective_scan fp32 state 16": lambda: scan(16, fp32, False, False, False),
        "selective_scan bf16 state 64": lambda: scan(64, bf16, False, False, False),
        "selective_scan bf16 state 256": lambda: scan(256, bf16, False, False, False),
        "selective_scan fp64 state 16": lambda: scan(16, torch.float64, False, False, False),
        "selective_step bf16 state 16": lambda: run_selective_step(16, bf16),
        "selective_step bf16 state 256": lambda: run_selective_step(256, bf16),
        "conv_lstm update bf16": lambda: run_conv_lstm_update(bf16, False, KEEP_CELLS),
        "conv_lstm update bf16 everything": lambda: run_conv_lstm_update(bf16, True, KEEP_GATES),
        "conv_lstm update fp32": lambda: run_conv_lstm_update(fp32, False, KEEP_CELLS),
        "conv_lstm update fp64 everything": lambda: run_conv_lstm_update(torch.float64, True, KEEP_CELLS),
        "conv_lstm at once bf16 16x16": lambda: run_conv_lstm_at_once(bf16, 16, False),
        "conv_lstm at once bf16 64x64": lambda: run_conv_lstm_at_once(bf16, 64, False),
        "conv_lstm at once bf16 128x128": lambda: run_conv_lstm_at_once(bf16, 128, False),
        "conv_lstm at once bf16 128x128 everything": lambda: run_conv_lstm_at_once(bf16, 128, True),
        "place_memory bf16 additive": lambda: run_place_memory(bf16, False),
        "place_memory fp32 everything": lambda: run_place_memory(fp32, True),
        "place_memory fp64 everything": lambda: run_place_memory(torch.float64, True),
        "gated_delta_rule bf16 64x64": lambda: run_gated_delta_rule(64, bf16, False),
        "gated_delta_rule bf16 128x128 everything": lambda: run_gated_delta_rule(128, bf16, True),
        "gated_delta_rule fp32 128x128": lambda: run_gated_delta_rule(128, fp32, False),
        "gated_delta_rule fp64 64x64 everything": lambda: run_gated_delta_rule(64, torch.float64, True),
        "linear_scan bf16": lambda: run_linear_scan(bf16, False, False, False),
        "linear_scan bf16 channel last reset": lambda: run_linear_scan(bf16, True, True, False),
        "linear_scan fp32 reverse reset": lambda: run_linear_scan(fp32, False, True, True),
    }


def measure(only: str, architectures: tuple[int, ...], dump: Path | None) -> list[dict[str, Any]]:
    """Equal kernel names are numbered."""
    rows: list[dict[str, Any]] = []
    for architecture in architectures:
        for case, run in cases().items():
            if only not in case:
                continue
            made: list[tuple[str, int, Any]] = []
            with compiling(architecture, made):
                run()
            seen: Counter[str] = Counter()
            for kernel, warps, compiled in made:
                seen[kernel] += 1
                name = kernel if seen[kernel] == 1 else f"{kernel} {seen[kernel]}"
                stem = dump / f"{case}-{name}-{architecture}".replace(" ", "_") if dump else None
                used = resources(compiled, stem)
                rows.append({"arch": architecture, "case": case, "kernel": name, "warps": warps, **used})
    return rows


def problems(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        where = f"sm_{row['arch']} {row['case']}: {row['kernel']}"
        if row["stack"] > STACK_LIMIT:
            found.append(f"{where} spills {row['stack']} bytes a thread")
        if row["shared"] > SHARED_LIMIT:
            found.append(f"{where} takes {row['shared']} bytes of shared memory, more than {SHARED_LIMIT}")
    return found


def differences(rows: list[dict[str, Any]], table: dict[str, Any]) -> list[str]:
    known = {(row["arch"], row["case"], row["kernel"]): row for row in table["rows"]}
    return [f"{known.get((r['arch'], r['case'], r['kernel']))} is now {r}" for r in rows if r not in table["rows"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES)
    parser.add_argument("--dump", type=Path, help="folder for the disassembly and Triton's GPU code")
    options = parser.parse_args()
    architectures = (options.arch,) if options.arch else ARCHITECTURES
    rows = measure(options.only, architectures, options.dump)
    found = problems(rows)
    if options.check:
        table = json.loads(TABLE.read_text())
        if table["triton"] == triton.__version__:
            found += differences(rows, table)
        else:
            print(f"the table is of triton {table['triton']}, not {triton.__version__}: only the limits are checked")
    elif not options.only and not options.arch:
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "rows": [\n    {lines}\n  ]\n}}\n')
    else:
        print(*rows, sep="\n")
    spilling = sum(row["stack"] > 0 for row in rows)
    print(*found, f"{len(rows)} kernels compiled, {spilling} with a stack", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
