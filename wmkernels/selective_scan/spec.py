"""The selective scan. CUDA kernels: see benchmarks/results/scan_speed_h200.json."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="selective_scan",
        functions=("selective_scan",),
        verified={"cuda": (90,)},
        max_state=256,
    )
)
