"""The linear scan by the name of its first CUDA kernel."""

from torch import Tensor

from wmkernels.compat.linear_recurrence import recurrence


def scan(gates: Tensor, tokens: Tensor) -> Tensor:
    """``h_t = gates_t h_{t-1} + tokens_t`` from zeros, differentiable.

    Args:
        gates: (batch, channels, time), real or complex, any time and strides.
        tokens: likewise, of any dtype that the arithmetic of ``gates`` holds.

    Returns:
        h, as ``gates``; complex where one of the two is.

    Raises:
        ValueError: invalid shape or device.
        TypeError: invalid dtype.

    Example:
        >>> import torch
        >>> from wmkernels.compat.accelerated_scan.warp import scan
        >>> scan(torch.full((1, 1, 3), 0.5), torch.ones(1, 1, 3))
        tensor([[[1.0000, 1.5000, 1.7500]]])
    """
    return recurrence("scan", gates, tokens)
