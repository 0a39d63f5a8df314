"""The linear scan of complex numbers."""

from torch import Tensor

from wmkernels.compat.linear_recurrence import recurrence


def scan(forget: Tensor, inputs: Tensor) -> Tensor:
    """As ``scan`` of ``warp``; ``forget`` is complex, else TypeError, ``inputs`` complex or real."""
    if not forget.is_complex():
        raise TypeError(f"scan: forget has dtype {forget.dtype}, expected complex64 or complex128")
    return recurrence("scan", forget, inputs)
