"""The causal convolution over a sequence, and its step."""

import torch
from torch import Tensor

from wmkernels.causal_conv1d.function import causal_conv1d, causal_conv1d_step
from wmkernels.checks import require_dtype, require_shape, require_tensor, require_writable
from wmkernels.compat.arguments import is_silu, narrowed, reset_of, rows_of, without_padding, write_rows

FN, UPDATE = "causal_conv1d_fn", "causal_conv1d_update"


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``wmkernels.causal_conv1d``; differentiable.

    Args:
        x: (batch, channels, time), any strides.
        weight: (channels, width), any width.
        bias: (channels,).
        seq_idx: int (batch, time), the sequence of each step: where it changes, a sequence starts; negative: output 0.
        initial_states: (batch, channels, width - 1), not with ``seq_idx``.
        return_final_states: also return the last inputs, not with ``seq_idx``.
        final_states_out: (batch, channels, width - 1), into which they are written.
        activation: ``"silu"`` or ``"swish"``, or None.

    Returns:
        The output, as ``x``; with ``return_final_states`` also the final states, as ``x`` or ``final_states_out``.

    Raises:
        ValueError: invalid shape, device or activation; ``seq_idx`` with states.
        TypeError: invalid dtype.

    Example:
        >>> import torch
        >>> from wmkernels.compat.causal_conv1d import causal_conv1d_fn
        >>> x, weight, seq_idx = torch.ones(1, 1, 4), torch.ones(1, 2), torch.tensor([[0, 0, 1, 1]])
        >>> causal_conv1d_fn(x, weight, seq_idx=seq_idx)
        tensor([[[1., 2., 1., 2.]]])
    """
    return _convolve(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, None)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``causal_conv1d_fn`` by the backend ``reference``."""
    return _convolve(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation, "reference"
    )


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    final_states_out: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    silu = is_silu(FN, activation)
    require_tensor(FN, "x", x)
    _require_no_states(seq_idx, initial_states, return_final_states, final_states_out)
    if x.dim() != 3:
        raise ValueError(f"{FN}: x has shape {tuple(x.shape)}, expected (batch, channels, time)")
    reset = reset_of(FN, seq_idx, x, (x.shape[0], x.shape[2]))
    out, states = causal_conv1d(
        x,
        *narrowed(x, weight, bias),
        activation="silu" if silu else None,
        initial_state=narrowed(x, initial_states)[0],
        reset=reset,
        return_last_state=True,
        backend=backend,
    )
    if seq_idx is not None:
        out = out.masked_fill(seq_idx[:, None] < 0, 0)
    if final_states_out is None:
        return (out, states.to(x.dtype)) if return_final_states else out
    require_shape(FN, "final_states_out", final_states_out, ("batch", "channels", "width - 1"), states.shape, "x")
    final_states_out.copy_(states)
    return (out, final_states_out) if return_final_states else out


def _require_no_states(
    seq_idx: Tensor | None, initial_states: Tensor | None, return_final_states: bool, final_states_out: Tensor | None
) -> None:
    """Raises ValueError: a row of several sequences has no one state."""
    given = {
        "initial_states": initial_states is not None,
        "return_final_states": bool(return_final_states),
        "final_states_out": final_states_out is not None,
    }
    for name, is_given in given.items():
        if seq_idx is not None and is_given:
            raise ValueError(
                f"{FN}: {name} is given with seq_idx, expected one of the two; wmkernels.causal_conv1d takes states "
                "with reset or cu_seqlens"
            )


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next outputs; ``conv_state`` takes up ``x`` in place. Differentiable where gradients are recorded.

    Args:
        x: (batch, channels) or (batch, channels, time).
        conv_state: the last inputs, oldest first, (batch, channels, n) with n at least width - 1; more rows than the
            batch with ``conv_state_indices``.
        weight: (channels, width).
        bias: (channels,).
        activation: ``"silu"`` or ``"swish"``, or None.
        cache_seqlens: int (batch,), inputs before these: ``conv_state`` is then a ring, and the next input goes to
            ``cache_seqlens % n``.
        conv_state_indices: int (batch,), unique rows of ``conv_state``; negative: no update, output 0.

    Returns:
        The output, as ``x``.

    Raises:
        ValueError: invalid shape, device or activation; a ``conv_state`` of the wrong width.
        TypeError: invalid dtype.

    Example:
        >>> import torch
        >>> from wmkernels.compat.causal_conv1d import causal_conv1d_update
        >>> conv_state, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[1.0, 10.0]])
        >>> causal_conv1d_update(torch.tensor([[3.0]]), conv_state, weight), conv_state
        (tensor([[32.]]), tensor([[[2., 3.]]]))
    """
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, None)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """``causal_conv1d_update`` by the backend ``reference``."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, None, "reference")


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    backend: str | None,
) -> Tensor:
    silu = "silu" if is_silu(UPDATE, activation) else None
    _require_state(x, conv_state, weight, cache_seqlens, conv_state_indices)
    weight, bias = narrowed(x, weight, bias)
    before = rows_of(conv_state_indices, conv_state)
    width, length = weight.shape[1], conv_state.shape[2]
    if cache_seqlens is None:
        window = before[..., length - width + 1 :]
    else:  # the input at age a lies at cache_seqlens - a
        at = (cache_seqlens[:, None] - torch.arange(width - 1, 0, -1, device=x.device)).remainder(length)
        window = before.gather(2, at[:, None].expand(-1, x.shape[1], -1).long())
    window = narrowed(x, window)[0]
    if x.dim() == 2:
        out, _ = causal_conv1d_step(window, x, weight, bias, activation=silu, backend=backend)
        inputs = x.unsqueeze(-1)
    else:
        out = causal_conv1d(x, weight, bias, activation=silu, initial_state=window, backend=backend)  # type: ignore[assignment]
        inputs = x
    inputs = inputs.to(conv_state.dtype)
    if cache_seqlens is None:
        after = torch.cat([before, inputs], -1)[..., -length:]
    else:
        newest = inputs[..., -length:]
        at = cache_seqlens[:, None] + torch.arange(inputs.shape[2], device=x.device)[-length:]
        after = before.scatter(2, at.remainder(length)[:, None].expand(-1, x.shape[1], -1).long(), newest)
    write_rows(conv_state_indices, conv_state, after)
    return without_padding(conv_state_indices, out)


def _require_state(
    x: Tensor, conv_state: Tensor, weight: Tensor, cache_seqlens: Tensor | None, conv_state_indices: Tensor | None
) -> None:
    for name, tensor in (("x", x), ("conv_state", conv_state), ("weight", weight)):
        require_tensor(UPDATE, name, tensor)
    if x.dim() not in (2, 3):
        raise ValueError(f"{UPDATE}: x has shape {tuple(x.shape)}, expected (batch, channels) or with time after it")
    if weight.dim() != 2:
        raise ValueError(f"{UPDATE}: weight has shape {tuple(weight.shape)}, expected (channels, width)")
    batch, channels, past = x.shape[0], x.shape[1], weight.shape[1] - 1
    rows = conv_state.shape[0] if conv_state_indices is not None and conv_state.dim() else batch
    if conv_state.dim() != 3 or conv_state.shape[:2] != (rows, channels) or conv_state.shape[2] < max(past, 1):
        raise ValueError(
            f"{UPDATE}: conv_state has shape {tuple(conv_state.shape)}, expected (batch={rows}, channels={channels}, "
            f"at least width - 1 = {past}) to match x and weight"
        )
    require_writable(UPDATE, "conv_state", conv_state)
    for name, value in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if value is not None:
            require_tensor(UPDATE, name, value)
            require_dtype(UPDATE, name, value, (torch.int64, torch.int32), "")
            require_shape(UPDATE, name, value, ("batch",), (batch,), "x")
