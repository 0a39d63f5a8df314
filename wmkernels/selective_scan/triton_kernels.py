"""The selective scan's Triton backend: forward and backward."""

from wmkernels.selective_scan.triton_forward import forward
from wmkernels.selective_scan.triton_gradients import backward

__all__ = ["backward", "forward"]
