"""ConvLSTM in PyTorch, with input convolutions over chunks of at most ``wmkernels.chunked.CHUNK_BYTES``.

Without ``keep_gates``, backward recomputes each chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels import chunked
from wmkernels.checks import no_autocast, state_dtype
from wmkernels.conv_lstm.meta import ConvLSTMInputs
from wmkernels.conv_lstm.reference import peephole_weights, update_cell, without_memory


def conv_lstm_chunked(inputs: ConvLSTMInputs, keep_gates: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, h, c)."""
    x, weight_ih, weight_hh, bias, peephole, h, c, reset, stride, padding, dilation = inputs
    dtype = state_dtype(x.dtype)
    shape = inputs.sizes[1:]
    starts_at_zero = h is None
    h = x.new_zeros(shape) if h is None else h.to(x.dtype)
    c = x.new_zeros(shape, dtype=dtype) if c is None else c.to(dtype)
    top, bottom, left, right = padding

    def run_chunk(
        x: Tensor,
        h: Tensor,
        c: Tensor,
        starts_at_zero: bool,
        reset: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        maps = F.pad(x.to(dtype), (left, right, top, bottom)).flatten(0, 1)
        biases = None if bias is None else bias.to(dtype)
        gates_x = F.conv2d(maps, weight_ih.to(dtype), biases, stride=tuple(stride), dilation=tuple(dilation))
        hidden_weight = weight_hh.to(dtype)
        same = [size // 2 for size in weight_hh.shape[-2:]]
        weights = peephole_weights(peephole, dtype)
        outputs = []
        for t, gates in enumerate(gates_x.unflatten(0, x.shape[:2]).unbind()):
            if reset is not None:
                is_reset = reset[t].view(-1, 1, 1, 1)
                h, c = h.masked_fill(is_reset, 0), c.masked_fill(is_reset, 0)
            recurrent = F.conv2d(h.to(dtype), hidden_weight, padding=same)
            h, c = update_cell(gates + without_memory(recurrent, reset, t, starts_at_zero), c, weights)
            h = h.to(x.dtype)
            outputs.append(h)
        return torch.stack(outputs), h, c

    outputs = []
    steps = chunked.steps_per_chunk(4 * c.numel() * dtype.itemsize)
    with no_autocast(x.device):
        for start in range(0, x.shape[0], steps) if x.shape[1] else ():
            chunk = slice(start, start + steps)
            flags = None if reset is None else reset[chunk]
            arguments = (x[chunk], h, c, starts_at_zero and start == 0, flags, weight_ih, weight_hh, bias, peephole)
            out, h, c = run_chunk(*arguments) if keep_gates else chunked.recomputed(run_chunk, *arguments)
            outputs.append(out)
    if not outputs:
        return x.new_zeros((x.shape[0], *shape)), h.clone(), c.clone()
    return torch.cat(outputs), h, c
