"""Public ConvLSTM functions."""

import torch
from torch import Tensor

from wmkernels.checks import FLOATS, Signature, state_dtype
from wmkernels.conv_lstm.autograd import OP, ConvLSTMFunction, forward
from wmkernels.conv_lstm.chunked import conv_lstm_chunked
from wmkernels.conv_lstm.meta import (
    KEEP_CELLS,
    KEEP_GATES,
    KEEP_NOTHING,
    ConvLSTMInputs,
    empty_maps,
)
from wmkernels.conv_lstm.reference import conv_lstm_reference
from wmkernels.conv_lstm.validation import Padding, Pair, canonical
from wmkernels.dispatch import choose, kernels
from wmkernels.modes import can_bypass_dispatcher, needs_autograd, requires_pytorch
from wmkernels.registration import differentiably

STEP = "conv_lstm_step"


def conv_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    peephole: Tensor | None = None,
    reset: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = "same",
    dilation: Pair = 1,
    batch_first: bool = False,
    keep_gates: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Convolutional LSTM over a sequence of maps (Shi et al. 2015, arXiv 1506.04214), differentiable in every input.

    ``reference.py`` has the equations. Autocast casts ``x`` and the weights, not the cell.

    Args:
        x: (time, batch, channels, height, width); float32, float64, bfloat16 or float16.
        weight_ih: (4 * hidden, channels, kernel height, kernel width), gates i, f, g, o.
        weight_hh: (4 * hidden, hidden, kernel height, kernel width), odd kernel sizes. Weights of another dtype are
            cast to that of ``x``, as by autocast.
        bias: (4 * hidden); like peephole and state, any dtype that c's holds.
        state: initial (h, c), each (batch, hidden, height, width); None: zeros.
        peephole: (3, hidden) or (3, hidden, height, width), cell weights of i, f and o.
        reset: bool (time, batch); zeroes h and c before that step, NaN included.
        stride: of the input convolution, as are padding and dilation; int or (vertical, horizontal).
        padding: ``"same"`` (ceil(size / stride), odd padding below and right), ``"valid"`` or zeros per side.
        dilation: int or (vertical, horizontal).
        batch_first: ``x``, ``reset`` and outputs are (batch, time, ...).
        keep_gates: for the backward pass; recomputing them costs a third more training arithmetic and saves over half
            the memory.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"chunked"`` or ``"reference"``; as for
            ``selective_scan``.

    Returns:
        ``(outputs, (h, c))``: outputs (time, batch, hidden, height, width), channels last in memory, and the last
        state, with c in float32 (float64).

    Raises:
        ValueError: invalid shape, size, device or backend.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> x = torch.randn(5, 2, 3, 16, 16)
        >>> outputs, (h, c) = wmkernels.conv_lstm(x, torch.randn(32, 3, 3, 3), torch.randn(32, 8, 3, 3))
        >>> outputs.shape, c.shape
        (torch.Size([5, 2, 8, 16, 16]), torch.Size([2, 8, 16, 16]))
    """
    _SIGNATURE.require(
        x,
        weight_ih,
        weight_hh,
        bias,
        state,
        peephole,
        reset,
        stride,
        padding,
        dilation,
        batch_first,
        keep_gates,
        backend,
    )
    leading = ("batch", "time") if batch_first else ("time", "batch")
    arguments = canonical(OP, x, weight_ih, weight_hh, bias, state, peephole, reset, stride, padding, dilation, leading)
    outputs, h, c = _run(arguments, keep_gates, backend, OP)
    return outputs.transpose(0, 1) if batch_first else outputs, (h, c)


def conv_lstm_step(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    *,
    peephole: Tensor | None = None,
    reset: Tensor | None = None,
    stride: Pair = 1,
    padding: Padding = "same",
    dilation: Pair = 1,
    keep_gates: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One differentiable step; other arguments and errors are those of ``conv_lstm``.

    ``x`` is (batch, channels, height, width), ``reset`` bool (batch,). Returns ``(h, (h, c))``.

    Example:
        >>> import torch, wmkernels
        >>> weights = torch.randn(32, 3, 3, 3), torch.randn(32, 8, 3, 3)
        >>> h, state = wmkernels.conv_lstm_step(torch.randn(2, 3, 16, 16), None, *weights)
        >>> h, state = wmkernels.conv_lstm_step(torch.randn(2, 3, 16, 16), state, *weights)
        >>> h.shape
        torch.Size([2, 8, 16, 16])
    """
    if _is_default(stride, padding, dilation) and type(keep_gates) is bool:
        fast = _step_fast_path(x, state, weight_ih, weight_hh, bias, peephole, reset, backend)
        if fast is not None:
            return fast[0], fast
    _STEP_SIGNATURE.require(
        x, state, weight_ih, weight_hh, bias, peephole, reset, stride, padding, dilation, keep_gates, backend
    )
    arguments = canonical(
        STEP, x, weight_ih, weight_hh, bias, state, peephole, reset, stride, padding, dilation, ("batch",)
    )
    _, h, c = _run(arguments, keep_gates, backend, STEP)
    return h, (h, c)


def _is_default(stride: Pair, padding: Padding, dilation: Pair) -> bool:
    whole = type(stride) is int and type(dilation) is int and type(padding) is str
    return whole and stride == 1 and padding == "same" and dilation == 1


def _step_fast_path(
    x: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    reset: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """(h, c) from one extension call, or None: on small maps, argument handling takes longer than the step."""
    if state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
        return None
    h, c = (None, None) if state is None else state
    inputs = (x, weight_ih, weight_hh, bias, peephole, reset)
    if not can_bypass_dispatcher((h, c, *inputs)) or not (isinstance(x, Tensor) and x.is_cpu and x.dim() == 4):
        return None
    if x.dtype not in FLOATS or x.layout is not torch.strided:
        return None
    if not (isinstance(weight_hh, Tensor) and weight_hh.dim() == 4) or torch.is_autocast_enabled("cpu"):
        return None
    if not (backend is None or type(backend) is str) or choose(OP, x.device, backend, function=STEP) != "cpu":
        return None
    maps = (x.shape[0], weight_hh.shape[1], x.shape[2], x.shape[3])
    new = empty_maps(maps, x.dtype, x.device), empty_maps(maps, state_dtype(x.dtype), x.device)
    return new if kernels(OP, "cpu").step_fast_path((h, c, *new, *inputs)) else None


def _run(inputs: ConvLSTMInputs, keep_gates: bool, backend: str | None, function: str) -> tuple[Tensor, Tensor, Tensor]:
    pytorch_for = requires_pytorch(inputs.differentiable)
    chosen = choose(OP, inputs.x.device, backend, function=function, pytorch_for=pytorch_for)
    if chosen == "reference":
        return conv_lstm_reference(inputs)
    if chosen == "chunked":
        return conv_lstm_chunked(inputs, keep_gates)
    if not inputs.x.is_meta and can_bypass_dispatcher(inputs.tensors):
        outputs, h, c, _, _ = forward(*inputs.op_args, KEEP_NOTHING, chosen)
    elif needs_autograd(inputs.differentiable):
        keep = KEEP_GATES if keep_gates else KEEP_CELLS
        outputs, h, c, _, _ = differentiably(ConvLSTMFunction, *inputs.op_args, keep, chosen)
    else:
        outputs, h, c, _, _ = torch.ops.wmkernels.conv_lstm_forward(*inputs.op_args, KEEP_NOTHING, chosen)
    return outputs, h, c


_SIGNATURE, _STEP_SIGNATURE = Signature(conv_lstm), Signature(conv_lstm_step)
