"""The linear scan by the name of its Triton kernel."""

from torch import Tensor

from wmkernels.compat.linear_recurrence import recurrence


def scan(forget: Tensor, inputs: Tensor) -> Tensor:
    """As ``scan`` of ``warp``, with ``forget`` for gates and ``inputs`` for tokens."""
    return recurrence("scan", forget, inputs)
