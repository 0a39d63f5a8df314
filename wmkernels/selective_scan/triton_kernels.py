"""The selective scan's Triton backend: forward, backward and a single step."""

from wmkernels.selective_scan.triton_forward import forward
from wmkernels.selective_scan.triton_gradients import backward
from wmkernels.selective_scan.triton_step import step

__all__ = ["backward", "forward", "step"]
