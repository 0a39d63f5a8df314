"""The SSD scan; its CUDA and Triton kernels have not run on a GPU."""

from wmkernels.registry import OpSpec, register

SPEC = register(
    OpSpec(
        name="ssd_scan",
        functions=("ssd_scan", "ssd_step"),
    )
)
