"""The public causal convolution."""

import torch
from torch import Tensor

from wmkernels.causal_conv1d.autograd import OP, CausalConv1dFunction
from wmkernels.causal_conv1d.chunked import causal_conv1d_chunked
from wmkernels.causal_conv1d.meta import ConvInputs
from wmkernels.causal_conv1d.reference import causal_conv1d_reference
from wmkernels.causal_conv1d.validation import STEP, canonical, canonical_step
from wmkernels.checks import DENSE, Signature
from wmkernels.dispatch import choose, kernels
from wmkernels.modes import can_bypass_dispatcher, needs_autograd, requires_pytorch
from wmkernels.registration import differentiably

_FAST_PATH_DTYPES = (torch.float32, torch.float64)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    channel_last: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, as before the scan of Mamba (Gu & Dao 2023); differentiable.

    ``y_t = act(bias + sum_k weight[k] x_{t - (width - 1) + k})`` per channel.

    Args:
        x: (batch, channels, time), any strides; float32, float64, bfloat16 or float16. The others may have any of
            these dtypes that float32 (float64 for float64) holds. Arithmetic is in float32 (float64).
        weight: (channels, width), of the newest input last.
        bias: (channels,).
        activation: ``"silu"``, or None for the sum itself.
        initial_state: the last inputs before ``x``, oldest first: (batch, channels, width - 1), or (sequences, ...)
            with ``cu_seqlens``; zeros if None.
        reset: bool (batch, time), true at a sequence's first step: all inputs before it count as zeros, NaN included.
        cu_seqlens: int32 or int64 (sequences + 1,), nondecreasing from 0 to time: packed sequences, batch 1. Not
            checked on a GPU.
        channel_last: x and y are (batch, time, channels), states (batch, width - 1, channels).
        return_last_state: also return the last inputs, zeros before the last reset.
        backend: as for ``selective_scan``.

    Returns:
        y, shape and dtype of ``x``; with ``return_last_state`` also the last state, as ``initial_state``, float32
        (float64 for float64).

    Raises:
        ValueError: invalid shape, device, activation, backend or cu_seqlens.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> x, weight = torch.arange(4.0).expand(1, 1, 4), torch.tensor([[1.0, 10.0]])
        >>> y, state = wmkernels.causal_conv1d(x, weight, return_last_state=True)
        >>> y, state
        (tensor([[[ 0., 10., 21., 32.]]]), tensor([[[3.]]]))
    """
    _SIGNATURE.require(
        x, weight, bias, activation, initial_state, reset, cu_seqlens, channel_last, return_last_state, backend
    )
    inputs = canonical(x, weight, bias, activation, initial_state, reset, cu_seqlens, channel_last)
    out, last_state = _run(inputs, backend, OP)
    if channel_last:
        out, last_state = out.transpose(1, 2), last_state.transpose(1, 2)
    return (out, last_state) if return_last_state else out


def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reset: Tensor | None = None,
    channel_last: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One differentiable step; other arguments and errors are those of ``causal_conv1d``.

    Args:
        state: the last inputs, oldest first, (batch, channels, width - 1); unchanged.
        x: (batch, channels).
        weight: (channels, width).
        bias: (channels,).
        activation: ``"silu"`` or None.
        reset: bool (batch,); true drops ``state``.
        channel_last: states are (batch, width - 1, channels).
        backend: as for ``selective_scan``.

    Returns:
        y, as ``x``, and the new state, float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device, activation or backend.
        TypeError: invalid dtype.

    Example:
        >>> import torch, wmkernels
        >>> state, weight = torch.tensor([[[2.0]]]), torch.tensor([[1.0, 10.0]])
        >>> wmkernels.causal_conv1d_step(state, torch.tensor([[3.0]]), weight)
        (tensor([[32.]]), tensor([[[3.]]]))
    """
    stepped = _step_fast_path(state, x, weight, bias, activation, reset, channel_last, backend)
    if stepped is not None:
        return stepped
    _STEP_SIGNATURE.require(state, x, weight, bias, activation, reset, channel_last, backend)
    inputs = canonical_step(state, x, weight, bias, activation, reset, channel_last)
    out, new_state = _run(inputs, backend, STEP)
    return out.squeeze(-1), new_state.transpose(1, 2) if channel_last else new_state


def _run(inputs: ConvInputs, backend: str | None, function: str) -> tuple[Tensor, Tensor]:
    pytorch_for = requires_pytorch(inputs.differentiable)
    chosen = choose(OP, inputs.x.device, backend, function=function, pytorch_for=pytorch_for)
    if chosen == "reference":
        return causal_conv1d_reference(inputs)
    if chosen == "chunked":
        return causal_conv1d_chunked(inputs)
    if needs_autograd(inputs.differentiable):
        out, last_state = differentiably(CausalConv1dFunction, *inputs, chosen)
    else:
        out, last_state = torch.ops.wmkernels.causal_conv1d_forward(*inputs, chosen)
    return out, last_state


def _step_fast_path(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reset: Tensor | None,
    channel_last: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """A step by the extension's fast path, which takes one dtype for all tensors; None where it does not apply."""
    if not (
        isinstance(x, Tensor)
        and isinstance(state, Tensor)
        and x.layout is DENSE is state.layout
        and x.dtype in _FAST_PATH_DTYPES
        and x.is_cpu
        and type(channel_last) is bool
        and (activation is None or (type(activation) is str and activation == "silu"))
        and (backend is None or type(backend) is str)
        and can_bypass_dispatcher((state, x, weight, bias, reset))
        and choose(OP, x.device, backend, function=STEP) == "cpu"
    ):
        return None
    out, new_state = _empty(x), _empty(state)
    tensors = (state, new_state, out, x, weight, bias, reset)
    done = kernels(OP, "cpu").step_fast_path(tensors, activation is not None, channel_last)
    return (out, new_state) if done else None


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)  # twice as fast as ``new_empty``


_SIGNATURE, _STEP_SIGNATURE = Signature(causal_conv1d), Signature(causal_conv1d_step)
