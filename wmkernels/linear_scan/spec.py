"""Linear scan. CUDA kernels: see benchmarks/results/scan_speed_h200.json."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="linear_scan",
        functions=("linear_scan",),
        verified={"cuda": (90,)},
    )
)
