"""Floating-point operations of the causal convolution, for ``torch.utils.flop_counter``."""

from wmkernels.causal_conv1d.meta import ConvInputs


def forward_flops(inputs: ConvInputs) -> int:
    """A multiplication and an addition per tap; one operation for the bias and one for silu."""
    return inputs.x.numel() * (_sum(inputs) + inputs.silu)


def backward_flops(inputs: ConvInputs) -> int:
    """A forward sum each for the gradients of x and of the weights; for silu its argument again, and its slope."""
    gradients = 4 * inputs.weight.shape[1] + (inputs.bias is not None)
    return inputs.x.numel() * (gradients + (_sum(inputs) + 1 if inputs.silu else 0))


def _sum(inputs: ConvInputs) -> int:
    """Per output."""
    return 2 * inputs.weight.shape[1] + (inputs.bias is not None)
