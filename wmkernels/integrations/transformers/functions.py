"""Functions of transformers from 5.15 on, by this package's ops: one per signature.

Each returns ``NotImplemented`` where its op cannot compute what the library's function does.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from wmkernels.causal_conv1d.function import causal_conv1d, causal_conv1d_step
from wmkernels.checks import FLOATS
from wmkernels.dispatch import PYTORCH_BACKENDS, choose
from wmkernels.gated_delta_rule.function import gated_delta_rule
from wmkernels.integrations.transformers.mixer_call import count, current, is_recorded, packed_reset
from wmkernels.modes import needs_autograd
from wmkernels.selective_scan.function import selective_scan
from wmkernels.selective_step.function import selective_state_update, selective_step
from wmkernels.ssd_scan.function import ssd_scan, ssd_step

Function = Callable[..., Any]
ACTIVATIONS = {"silu": "silu", "swish": "silu", None: None}
_NO_LIMIT = (float("-inf"), float("inf"))


def replacement(original: Function, op: str, ours: Function) -> Function:
    """A function that calls ``ours`` where the op's kernel runs, and ``original`` elsewhere.

    PyTorch's form of an op replaces the library's where that would drop a state or mix packed sequences.
    """

    @functools.wraps(original, updated=())  # a module, where the package kernels is installed
    def function(*args: Any, **kwargs: Any) -> Any:
        if _can_run(op, args[0]):
            result = ours(*args, **kwargs)
            if result is None:
                return None
            if result is not NotImplemented:
                count(ours.__name__)
                return result
        count("original")
        return original(*args, **kwargs)

    return function


def _can_run(op: str, x: object) -> bool:
    if not isinstance(x, Tensor) or is_recorded() or x.device.type != "cpu" or x.dtype not in FLOATS:
        return False
    call = current()
    if call is not None and (call.reset is not None or call.states):
        return True
    return choose(op, x.device) not in PYTORCH_BACKENDS


def _reset(arguments: dict[str, Any], x: Tensor, time_dim: int) -> Tensor | None:
    """Of the mixer's call, or of a call from elsewhere. A convolution's input may begin with the cached window."""
    call, time = current(), x.shape[time_dim]
    reset = packed_reset(arguments, x.shape[0], time, x.device) if call is None else call.reset
    return reset if reset is None or reset.shape[1] == time else F.pad(reset, (time - reset.shape[1], 0))


def kept(state: Tensor) -> Tensor:
    """A cached state as a backward pass may read it: the library overwrites it meanwhile."""
    return state.clone() if torch.is_grad_enabled() else state


def _kept(state: Tensor | None) -> Tensor | None:
    return None if state is None else kept(state)


def _differentiates(*tensors: Tensor | None) -> bool:
    return needs_autograd(tensors)


def conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Any:
    """``causal_conv1d_fn``: (batch, channels, time)."""
    if activation not in ACTIVATIONS:
        return NotImplemented
    reset = _reset(kwargs, hidden_states, 2)
    return causal_conv1d(hidden_states, weight, bias, activation=ACTIVATIONS[activation], reset=reset)


def conv_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """``causal_conv1d_update``: one step, (batch, channels, 1); writes ``conv_state``, at least width - 1 wide."""
    if activation not in ACTIVATIONS or hidden_states.shape[-1] != 1:
        return NotImplemented
    needed = weight.shape[1] - 1
    if conv_state.shape[-1] < needed:
        raise ValueError(
            f"causal_conv1d_update: conv_state has shape {tuple(conv_state.shape)}, expected at least width - 1 = "
            f"{needed} inputs for weights of width {weight.shape[1]}"
        )
    known = torch.cat([conv_state, hidden_states], -1)
    window = known[..., -weight.shape[1] : -1]
    out, _ = causal_conv1d_step(window, hidden_states[..., 0], weight, bias, activation=ACTIVATIONS[activation])
    conv_state.copy_(known[..., 1:])
    return out.unsqueeze(-1)


def scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Any:
    """``mamba_selective_scan``: (batch, channels, time). The ways to compute it that the library offers are ignored."""
    call = current()
    return selective_scan(
        *(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state),
        initial_state=kept(call.states.pop(0)) if call is not None and call.states else None,
        reset=_reset(kwargs, hidden_states, 2),
    )


def state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``mamba_selective_state_update``: one step, (batch, channels); writes ``state``."""
    if _differentiates(state, hidden_states, dt, A, B, C, D, dt_bias, z):
        out, new_state = selective_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)
        state.copy_(new_state)
        return out
    return selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``mamba2_chunk_scan``: (batch, time, heads, d). The kernel chooses its own chunk."""
    return ssd_scan(
        *(hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus),
        dt_limit=(dt_limit[0], dt_limit[1]),
        initial_state=_kept(initial_states),
        reset=_reset(kwargs, hidden_states, 1),
        return_last_state=return_final_states,
    )


def head_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """``mamba2_selective_state_update``: one step, (batch, heads, d); writes ``state``.

    The library expands what a head has once to (heads, d, state): read here once per head.
    """
    expanded = (dt.stride(-1), A.stride(-1), A.stride(-2), 0 if dt_bias is None else dt_bias.stride(-1))
    if any(expanded):
        return NotImplemented
    out, new_state = ssd_step(
        *(state, hidden_states, dt[..., 0], A[:, 0, 0], B, C, D, z),
        None if dt_bias is None else dt_bias[:, 0],
        dt_softplus,
        dt_limit=_NO_LIMIT,
    )
    state.copy_(cast(Tensor, new_state))
    return out


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> Any:
    """``torch_chunk_gated_delta_rule``: (batch, time, heads, size). The kernel chooses its own chunk."""
    if use_qk_l2norm_in_kernel:
        query, key = _l2norm(query), _l2norm(key)
    out, state = gated_delta_rule(
        *(query, key, value, g, beta),
        initial_state=_kept(initial_state),
        reset=_reset(kwargs, value, 1),
        channel_last=True,
        return_last_state=True,
    )
    return out, state if output_final_state else None


def delta_step(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``torch_recurrent_gated_delta_rule``: any number of steps, the same arguments without ``chunk_size``."""
    return delta_rule(query, key, value, g, beta, 1, *args, **kwargs)


def fused(*args: Any, **kwargs: Any) -> None:
    """``mamba_inner_fn`` and ``mamba2_split_conv1d_scan_combined``: after None a mixer calls the functions above.

    They would norm and mask in other places than the mixer does, in training alone.
    """


def _l2norm(x: Tensor) -> Tensor:
    x = x.float() if x.dtype != torch.float64 else x
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
