"""The SSD scan; without GPU kernels."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="ssd_scan",
        functions=("ssd_scan", "ssd_step"),
    )
)
