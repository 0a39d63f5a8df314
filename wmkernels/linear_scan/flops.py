"""Floating-point operations of the linear scan, for ``torch.utils.flop_counter``."""

from wmkernels.linear_scan.meta import LinearScanInputs


def forward_flops(inputs: LinearScanInputs) -> int:
    """A multiplication and an addition per element."""
    return 2 * inputs.gates.numel()


def backward_flops(inputs: LinearScanInputs) -> int:
    """The same recurrence for the state's gradient, and a multiplication for the gate's."""
    return 3 * inputs.gates.numel()
