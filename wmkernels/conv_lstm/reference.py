"""ConvLSTM as a PyTorch loop over time: the specification of all backends.

    i_t = σ(W_xi ∗ x_t + W_hi ∗ h_{t-1} + w_ci ∘ c_{t-1} + b_i)
    f_t = σ(W_xf ∗ x_t + W_hf ∗ h_{t-1} + w_cf ∘ c_{t-1} + b_f)
    c_t = f_t ∘ c_{t-1} + i_t ∘ tanh(W_xc ∗ x_t + W_hc ∗ h_{t-1} + b_c)
    o_t = σ(W_xo ∗ x_t + W_ho ∗ h_{t-1} + w_co ∘ c_t + b_o)
    h_t = o_t ∘ tanh(c_t)                                                    (Shi et al. 2015, equation 3)

reset[t] zeroes h_{t-1} and c_{t-1}. Arithmetic is in the state dtype; h recurs in the dtype of x, so sequence and
rollout agree.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.checks import no_autocast, state_dtype
from wmkernels.conv_lstm.meta import ConvLSTMInputs


def conv_lstm_reference(inputs: ConvLSTMInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, h, c), without autocast, which would round the convolutions."""
    with no_autocast(inputs.x.device):
        return _conv_lstm(inputs)


def _conv_lstm(inputs: ConvLSTMInputs) -> tuple[Tensor, Tensor, Tensor]:
    x, weight_ih, weight_hh, bias, peephole, h, c, reset, stride, padding, dilation = inputs
    dtype = state_dtype(x.dtype)
    top, bottom, left, right = padding
    x_wide = F.pad(x.to(dtype), (left, right, top, bottom))
    weight_ih, weight_hh = weight_ih.to(dtype), weight_hh.to(dtype)
    shape = inputs.sizes[1:]  # (batch, hidden, height, width)
    starts_at_zero = h is None
    h = x.new_zeros(shape) if h is None else h.to(x.dtype)
    c = x.new_zeros(shape, dtype=dtype) if c is None else c.to(dtype)
    weights = peephole_weights(peephole, dtype)
    same = [size // 2 for size in weight_hh.shape[-2:]]
    outputs: list[Tensor] = []
    for t in range(x.shape[0]):
        if reset is not None:
            forget = reset[t].view(-1, 1, 1, 1)
            h, c = h.masked_fill(forget, 0), c.masked_fill(forget, 0)
        gates = F.conv2d(x_wide[t], weight_ih, stride=tuple(stride), dilation=tuple(dilation))
        recurrent = F.conv2d(h.to(dtype), weight_hh, padding=same)
        gates = gates + without_memory(recurrent, reset, t, starts_at_zero)
        if bias is not None:
            gates = gates + bias.to(dtype).view(-1, 1, 1)
        h, c = update_cell(gates, c, weights)
        h = h.to(x.dtype)
        outputs.append(h)
    if not outputs:
        return x.new_zeros((0, *shape)), h.clone(), c.clone()
    return torch.stack(outputs), h, c


def without_memory(recurrent: Tensor, reset: Tensor | None, t: int, starts_at_zero: bool) -> Tensor:
    """Zero where a sequence starts, by selection: a zero h times an infinite weight is NaN."""
    if t == 0 and starts_at_zero:
        return recurrent.masked_fill(torch.ones((), dtype=torch.bool, device=recurrent.device), 0)
    return recurrent if reset is None else recurrent.masked_fill(reset[t].view(-1, 1, 1, 1), 0)


def update_cell(gates: Tensor, c: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """(h, c) from ``gates`` (batch, 4 * hidden, height, width)."""
    w_i, w_f, w_o = weights
    i, f, g, o = gates.chunk(4, 1)
    i, f = torch.sigmoid(_with_peephole(i, w_i, c)), torch.sigmoid(_with_peephole(f, w_f, c))
    c = f * c + i * torch.tanh(g)
    o = torch.sigmoid(_with_peephole(o, w_o, c))
    return o * torch.tanh(c), c


def _with_peephole(gate: Tensor, weight: Tensor | None, c: Tensor) -> Tensor:
    return gate if weight is None else gate + weight * c


def peephole_weights(peephole: Tensor | None, dtype: torch.dtype) -> Sequence[Tensor | None]:
    """Of i, f, o, each (hidden, 1, 1) or (hidden, height, width)."""
    if peephole is None:
        return (None, None, None)
    return (peephole if peephole.dim() == 4 else peephole[..., None, None]).to(dtype).unbind()
