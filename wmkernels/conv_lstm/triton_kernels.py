"""The ConvLSTM's Triton backend: ``per_step.py`` with the update of ``triton_update.py``, or a step in one kernel."""

import functools
from collections.abc import Sequence

from torch import Tensor

from wmkernels.conv_lstm import per_step, triton_convolution
from wmkernels.conv_lstm.meta import forward_outputs, sizes_of
from wmkernels.conv_lstm.triton_update import Update

backward = functools.partial(per_step.backward, Update())


def forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    reset: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    keep: int,
) -> tuple[Tensor, ...]:
    """(out, h, c, cells, gates) of canonical inputs; ``keep`` says which of the last two are kept."""
    sizes = sizes_of(x, weight_ih, weight_hh, stride, padding, dilation)
    if not triton_convolution.is_profitable(x.dtype, weight_ih, weight_hh, sizes):
        arguments = (x, weight_ih, weight_hh, bias, peephole, h, c, reset, stride, padding, dilation)
        return per_step.forward(Update(), *arguments, keep)
    outputs = forward_outputs(x, sizes, keep)
    inputs = per_step.parameters_of(bias, peephole)
    step_fn = triton_convolution.FusedStep(x, weight_ih, weight_hh, inputs, sizes, stride, padding, dilation)
    per_step.run_steps(step_fn, outputs, h, c, reset)
    return outputs
