"""Triton backend of the selective scan."""

from wmkernels.selective_scan.triton_forward import forward
from wmkernels.selective_scan.triton_gradients import backward

__all__ = ["backward", "forward"]
