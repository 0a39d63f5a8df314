"""``h_t = a_t h_{t-1} + b_t`` of real and of complex numbers."""

import math

import torch
from torch import Tensor

from wmkernels import chunked
from wmkernels.checks import FLOATS, require_device, require_dtype, require_shape, require_tensor
from wmkernels.compat.arguments import narrowed
from wmkernels.linear_scan.function import linear_scan

_COMPLEX = (torch.complex64, torch.complex128)


def recurrence(op: str, gates: Tensor, tokens: Tensor, reverse: bool = False) -> Tensor:
    """h (batch, channels, time), differentiable; complex where one of the two is.

    Raises:
        ValueError: invalid shape or device.
        TypeError: invalid dtype.
    """
    for name, value in (("gates", gates), ("tokens", tokens)):
        require_tensor(op, name, value)
        require_dtype(op, name, value, (*FLOATS, *_COMPLEX), "")
    require_device(op, "tokens", tokens, gates.device, "gates")
    if gates.dim() != 3:
        raise ValueError(f"{op}: gates has shape {tuple(gates.shape)}, expected (batch, channels, time)")
    require_shape(op, "tokens", tokens, ("batch", "channels", "time"), gates.shape, "gates")
    if gates.is_complex() or tokens.is_complex():
        return _complex_recurrence(gates, tokens, reverse)
    out = linear_scan(gates, *narrowed(gates, tokens), reverse=reverse)
    assert isinstance(out, Tensor)
    return out


def _complex_recurrence(gates: Tensor, tokens: Tensor, reverse: bool) -> Tensor:
    """In chunks of plain PyTorch."""
    dtype = torch.promote_types(torch.promote_types(gates.dtype, tokens.dtype), torch.complex64)
    gates, tokens = (x.to(dtype).permute(2, 0, 1) for x in (gates, tokens))  # (time, batch, channels)
    if gates.shape[0] == 0:
        return tokens.permute(1, 2, 0).clone()
    if reverse:
        gates, tokens = gates.flip(0), tokens.flip(0)
    state, outputs = torch.zeros_like(tokens[0]), []
    steps = chunked.steps_per_chunk(state.numel() * dtype.itemsize)
    for start in range(0, gates.shape[0], steps):
        part = slice(start, start + steps)
        outputs.append(chunked.recomputed(_scan_chunk, gates[part], tokens[part], state))
        state = outputs[-1][-1]
    out = torch.cat(outputs)
    return (out.flip(0) if reverse else out).permute(1, 2, 0)


def _scan_chunk(gates: Tensor, tokens: Tensor, state: Tensor) -> Tensor:
    """By doubling (Hillis & Steele 1986), or step by step where products of gates may overflow."""
    growth = gates.detach().abs().clamp(min=1).log().sum(0)
    if growth.numel() and not growth.max().item() < math.log(torch.finfo(gates.dtype).max):
        states = []
        for gate, token in zip(gates, tokens, strict=True):
            state = gate * state + token
            states.append(state)
        return torch.stack(states)
    scanned, distance = torch.cat([tokens[:1] + gates[:1] * state, tokens[1:]]), 1
    while distance < gates.shape[0]:
        # Each step holds the product of gates and the state of its last ``distance`` steps.
        later = gates[distance:]
        scanned = torch.cat([scanned[:distance], scanned[distance:] + later * scanned[:-distance]])
        gates = torch.cat([gates[:distance], later * gates[:-distance]])
        distance *= 2
    return scanned
