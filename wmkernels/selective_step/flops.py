"""Floating-point operations of a step: those of ``selective_scan`` over one step."""

from wmkernels.selective_scan.flops import forward_flops
from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.selective_step.meta import StepInputs


def step_flops(inputs: StepInputs) -> int:
    """As counted in ``selective_scan/flops.py``."""
    _, u, delta, A, B, C, D, z, delta_bias, _, delta_softplus = inputs
    return forward_flops(ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus))
