"""Floating-point operations of a ConvLSTM's convolutions, for ``torch.utils.flop_counter``.

PyTorch's formula of a convolution: a multiplication and an addition per weight and output position, zero padding
included. The cell's pointwise work counts nothing, as in PyTorch's formulas, so that all backends count alike.
"""

import math

from wmkernels.conv_lstm.meta import ConvLSTMInputs


def forward_flops(inputs: ConvLSTMInputs) -> int:
    """Both convolutions of every step, the first step's h included."""
    return inputs.sizes.time * (_per_step(inputs, "weight_ih") + _per_step(inputs, "weight_hh"))


def backward_flops(inputs: ConvLSTMInputs, recomputes_gates: bool) -> int:
    """Two convolutions for each of the forward pass; without an initial h, its gradient is not needed."""
    flops = (2 + recomputes_gates) * forward_flops(inputs)
    return flops - _per_step(inputs, "weight_hh") if inputs.h is None and inputs.sizes.time else flops


def _per_step(inputs: ConvLSTMInputs, weight: str) -> int:
    _, batch, _, height, width = inputs.sizes
    return 2 * batch * height * width * math.prod(getattr(inputs, weight).shape)
