"""Selective step. CUDA kernels: see benchmarks/results/scan_speed_h200.json."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="selective_step",
        functions=("selective_step", "selective_state_update"),
        verified={"cuda": (90,)},
        max_state=256,
    )
)
