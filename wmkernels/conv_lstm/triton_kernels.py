"""ConvLSTM in Triton: ``per_step.py`` or one kernel per step."""

import functools

from torch import Tensor

from wmkernels.conv_lstm import per_step, triton_convolution
from wmkernels.conv_lstm.meta import ConvLSTMInputs, forward_outputs
from wmkernels.conv_lstm.triton_update import Update

backward = functools.partial(per_step.backward, Update())


def forward(inputs: ConvLSTMInputs, keep: int) -> tuple[Tensor, ...]:
    if not triton_convolution.is_profitable(inputs.x.dtype, inputs.weight_ih, inputs.weight_hh, inputs.sizes):
        return per_step.forward(Update(), inputs, keep)
    outputs = forward_outputs(inputs, keep)
    per_step.run_steps(triton_convolution.FusedStep(inputs), outputs, inputs)
    return outputs
