"""The public gated delta rule."""

import torch
from torch import Tensor

from wmkernels.checks import Signature, is_autocast
from wmkernels.dispatch import choose
from wmkernels.gated_delta_rule.autograd import OP, GatedDeltaRule
from wmkernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from wmkernels.gated_delta_rule.meta import CHUNK, DeltaRuleInputs
from wmkernels.gated_delta_rule.reference import gated_delta_rule_reference
from wmkernels.gated_delta_rule.validation import STEP, canonical
from wmkernels.modes import needs_autograd, requires_pytorch
from wmkernels.registration import differentiably


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    channel_last: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule with decay (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464), differentiable.

    ``S_t = exp(gate_t) S_{t-1} + k_t u_t^T`` with ``u_t = beta_t (v_t - exp(gate_t) S_{t-1}^T k_t)``, and ``y_t = scale
    S_t^T q_t``: each step decays the state and corrects what ``k_t`` recalls. A gate of 0 is the delta rule of Schlag
    et al. 2021. Keys are not normalised: a step is stable for ``beta_t |k_t|^2`` up to 2.

    Args:
        q: (batch, heads, d_k, time), any strides; float32, float64, bfloat16 or float16. The others may have any of
            these dtypes that float32 (float64 for float64) holds. Arithmetic is in float32 (float64).
        k: as ``q``.
        v: (batch, value_heads, d_v, time); value_heads is a multiple of heads, and value head h reads head
            ``h // (value_heads // heads)`` of q and k.
        gate: logarithm of the decay, 0 or below, (batch, value_heads, time).
        beta: step size of the correction, as ``gate``.
        scale: of the output; ``d_k ** -0.5`` if None.
        initial_state: (batch, value_heads, d_k, d_v), or (sequences, ...) with ``cu_seqlens``; zeros if None.
        reset: bool (batch, time); true drops the previous state, NaN included.
        cu_seqlens: int32 or int64 (sequences + 1,), nondecreasing from 0 to time: packed sequences, batch 1. Not
            checked on a GPU.
        channel_last: q, k, v and y are (batch, time, heads, size), gate and beta (batch, time, value_heads).
        return_last_state: also return the last state.
        backend: as for ``selective_scan``.

    Returns:
        y, shape and dtype of ``v``; with ``return_last_state`` also the last state, as ``initial_state``, float32
        (float64 for float64).

    Raises:
        ValueError: invalid shape, device, backend or cu_seqlens.
        TypeError: invalid dtype or scale.

    Example:
        >>> import torch, wmkernels
        >>> q, k, v = (torch.nn.functional.normalize(torch.randn(2, 4, 16, 100), dim=2) for _ in range(3))
        >>> gate, beta = -torch.rand(2, 4, 100), torch.rand(2, 4, 100)
        >>> y, state = wmkernels.gated_delta_rule(q, k, v, gate, beta, return_last_state=True)
        >>> y.shape, state.shape
        (torch.Size([2, 4, 16, 100]), torch.Size([2, 4, 16, 16]))
    """
    _SIGNATURE.require(
        q, k, v, gate, beta, scale, initial_state, reset, cu_seqlens, channel_last, return_last_state, backend
    )
    inputs = canonical(OP, q, k, v, gate, beta, scale, initial_state, reset, cu_seqlens, channel_last)
    out, last_state = _run(inputs, v, backend, OP)
    if channel_last:
        out = out.permute(0, 3, 1, 2)
    return (out, last_state) if return_last_state else out


def gated_delta_rule_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    reset: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One differentiable step; other arguments and errors are those of ``gated_delta_rule``.

    Args:
        state: (batch, value_heads, d_k, d_v); unchanged.
        q: (batch, heads, d_k).
        k: as ``q``.
        v: (batch, value_heads, d_v).
        gate: (batch, value_heads).
        beta: as ``gate``.
        scale: of the output; ``d_k ** -0.5`` if None.
        reset: bool (batch,); true drops ``state``.
        backend: as for ``selective_scan``.

    Returns:
        y, as ``v``, and the new state, float32 (float64 for float64).

    Raises:
        ValueError: invalid shape, device or backend.
        TypeError: invalid dtype or scale.

    Example:
        >>> import torch, wmkernels
        >>> q, k, v = (torch.nn.functional.normalize(torch.randn(1, 2, 8), dim=2) for _ in range(3))
        >>> state, gate, beta = torch.zeros(1, 2, 8, 8), -torch.rand(1, 2), torch.rand(1, 2)
        >>> y, state = wmkernels.gated_delta_rule_step(state, q, k, v, gate, beta)
        >>> y.shape
        torch.Size([1, 2, 8])
    """
    _STEP_SIGNATURE.require(state, q, k, v, gate, beta, scale, reset, backend)
    inputs = canonical(STEP, q, k, v, gate, beta, scale, state, reset, None, False)
    out, new_state = _run(inputs, v, backend, STEP)
    return out.squeeze(-1), new_state


def _run(inputs: DeltaRuleInputs, v: Tensor, backend: str | None, function: str) -> tuple[Tensor, Tensor]:
    device = inputs.q.device
    pytorch_for = requires_pytorch(inputs.differentiable)
    chosen = choose(OP, device, backend, function=function, pytorch_for=pytorch_for)
    if chosen == "reference":
        out, last_state = gated_delta_rule_reference(inputs)
    elif chosen == "chunked":
        out, last_state = gated_delta_rule_chunked(inputs)
    elif needs_autograd(inputs.differentiable):
        out, last_state, _, _ = differentiably(GatedDeltaRule, *inputs, CHUNK, chosen)
    else:
        out, last_state, _, _ = torch.ops.wmkernels.gated_delta_rule_forward(*inputs, 0, chosen)
    if out.dtype != v.dtype and not is_autocast(device):  # v was widened beside others
        out = out.to(v.dtype)
    return out, last_state


_SIGNATURE, _STEP_SIGNATURE = Signature(gated_delta_rule), Signature(gated_delta_rule_step)
