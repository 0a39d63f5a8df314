"""Implementations compared: this package's backends and the installed baselines.

An implementation maps ``problems.make_inputs`` to the output. A baseline gets its best layout if a transposed view
gives it. Softplus, gating and discretisation are timed.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wmkernels
from scans.problems import Inputs

Run = Callable[[Inputs], Any]
SSD_CHUNKS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Implementation:
    """``prepare`` is untimed."""

    name: str
    run: Run
    op: str
    backend: str | None = None  # None: a baseline
    source: str = "benchmarks/scans/baselines.py"
    prepare: Run | None = None

    @property
    def ours(self) -> bool:
        return self.backend is not None


def ours(op: str, backend: str, channel_last: bool = False) -> Implementation:
    def scan(inputs: Inputs) -> Any:
        softplus = "delta_bias" in inputs
        return wmkernels.selective_scan(**inputs, delta_softplus=softplus, channel_last=channel_last, backend=backend)

    def step(inputs: Inputs) -> Tensor:
        return wmkernels.selective_step(**inputs, delta_softplus="delta_bias" in inputs, backend=backend)[0]

    def linear(inputs: Inputs) -> Any:
        return wmkernels.linear_scan(**inputs, channel_last=channel_last, backend=backend)

    def delta(inputs: Inputs) -> Any:
        return wmkernels.gated_delta_rule(**inputs, channel_last=channel_last, backend=backend)

    def ssd(inputs: Inputs) -> Any:
        return wmkernels.ssd_scan(**inputs, backend=backend)

    def convolution(inputs: Inputs) -> Any:
        return wmkernels.causal_conv1d(**inputs, activation="silu", channel_last=channel_last, backend=backend)

    def convolution_step(inputs: Inputs) -> Tensor:
        return wmkernels.causal_conv1d_step(**inputs, activation="silu", backend=backend)[0]

    runs: dict[str, Run] = {
        "selective_scan": scan,
        "selective_step": step,
        "linear_scan": linear,
        "gated_delta_rule": delta,
        "ssd_scan": ssd,
        "causal_conv1d": convolution,
        "causal_conv1d_step": convolution_step,
    }
    return Implementation(f"wmkernels {backend}", runs[op], op, backend)


def state_update() -> Implementation:
    def update(inputs: Inputs) -> Tensor:
        renamed = {"delta": "dt", "u": "x", "delta_bias": "dt_bias"}
        arguments = {renamed.get(name, name): x for name, x in inputs.items()}
        return wmkernels.selective_state_update(**arguments, dt_softplus="delta_bias" in inputs)

    return Implementation("wmkernels selective_state_update", update, "selective_step", "default")


def _activated(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, step (after softplus), A, B, C as (batch, time, ...) views in fp32 or wider."""
    wide = inputs["A"].dtype
    u, delta = (inputs[name].transpose(1, 2).to(wide) for name in ("u", "delta"))
    if "delta_bias" in inputs:
        delta = F.softplus(delta + inputs["delta_bias"])
    B, C = (inputs[name].transpose(1, 2).to(wide) for name in ("B", "C"))
    return u, delta, inputs["A"], B, C


def _finish(y: Tensor, inputs: Inputs) -> Tensor:
    """(batch, time, channels) -> (batch, channels, time), with skip connection and gate."""
    out = y.transpose(1, 2) + inputs["D"][:, None] * inputs["u"]
    if "z" in inputs:
        out = out * F.silu(inputs["z"])
    return out.to(inputs["u"].dtype)


def best_loop(inputs: Inputs) -> Tensor:
    """The fastest PyTorch loop known: unbinds time once, keeps channels contiguous."""
    u, step, A, B, C = (x.contiguous() for x in _activated(inputs))
    A = A.t().contiguous()  # (state, channels)
    state = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype, device=u.device)
    driven, outputs = step * u, []
    for step_t, driven_t, B_t, C_t in zip(step.unbind(1), driven.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(step_t[:, None] * A)  # (batch, state, channels)
        state = torch.addcmul(B_t[..., None] * driven_t[:, None], decay, state)
        outputs.append(torch.bmm(C_t[:, None], state).squeeze(1))
    return _finish(torch.stack(outputs, 1), inputs)


def plain_loop(inputs: Inputs) -> Tensor:
    """The common loop: discretised per step, state last."""
    u, step, A, B, C = _activated(inputs)
    state = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype, device=u.device)  # (batch, channels, state)
    outputs = []
    for u_t, step_t, B_t, C_t in zip(u.unbind(1), step.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state, y = _step_update(state, step_t, step_t * u_t, A, B_t, C_t)
        outputs.append(y)
    return _finish(torch.stack(outputs, 1), inputs)


def materialising_loop(inputs: Inputs) -> Tensor:
    """Materialises (batch, channels, time, state), then indexes it."""
    u, step, A, B, C = _activated(inputs)
    decay = torch.exp(torch.einsum("bld,dn->bdln", step, A))
    driven = torch.einsum("bld,bln,bld->bdln", step, B, u)
    state = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype, device=u.device)
    outputs = []
    for t in range(u.shape[1]):
        state = decay[:, :, t] * state + driven[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
    return _finish(torch.stack(outputs, 1), inputs)


def _step_update(state: Tensor, step: Tensor, driven: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.exp(step[..., None] * A) * state + driven[..., None] * B[:, None]
    return state, (state * C[:, None]).sum(-1)


@functools.cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_step_update, dynamic=False)


def compiled_loop(inputs: Inputs) -> Tensor:
    u, step, A, B, C = _activated(inputs)
    state = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype, device=u.device)
    step_once, driven, outputs = _compiled_step(), step * u, []
    for step_t, driven_t, B_t, C_t in zip(step.unbind(1), driven.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state, y = step_once(state, step_t.contiguous(), driven_t.contiguous(), A, B_t.contiguous(), C_t.contiguous())
        outputs.append(y)
    return _finish(torch.stack(outputs, 1), inputs)


def step_expression(inputs: Inputs) -> Tensor:
    state, u, delta, A = (inputs[name] for name in ("state", "u", "delta", "A"))
    if "delta_bias" in inputs:
        delta = F.softplus(delta + inputs["delta_bias"])
    decay = torch.exp(delta[..., None] * A)
    state = decay * state + (delta * u)[..., None] * inputs["B"][:, None]
    out = (state * inputs["C"][:, None]).sum(-1) + inputs["D"] * u
    return out * F.silu(inputs["z"]) if "z" in inputs else out


def linear_loop(inputs: Inputs) -> Tensor:
    gates, tokens = inputs["gates"], inputs["tokens"]
    state, outputs = torch.zeros_like(gates[..., 0], dtype=torch.float32), []
    for gate, token in zip(gates.unbind(-1), tokens.unbind(-1), strict=True):
        state = torch.addcmul(token.to(state.dtype), gate.to(state.dtype), state)
        outputs.append(state)
    return torch.stack(outputs, -1).to(gates.dtype)


def recurrent_loop(inputs: Inputs) -> Tensor:
    """The gated delta rule step by step: unbinds time once; what keys and queries recall are batched products."""
    q, k, v, gate, beta = (x.movedim(-1, 0).contiguous().unbind(0) for x in inputs.values())
    state, outputs = v[0].new_zeros((*q[0].shape, v[0].shape[-1])), []  # (batch, heads, d_k, d_v)
    for q_t, k_t, v_t, gate_t, beta_t in zip(q, k, v, gate, beta, strict=True):
        state = state * gate_t.exp()[..., None, None]
        u_t = beta_t[..., None] * (v_t - (k_t[..., None, :] @ state).squeeze(-2))
        state = torch.addcmul(state, k_t[..., None], u_t[..., None, :])
        outputs.append((q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, -1) * q[0].shape[-1] ** -0.5


def conv1d_and_silu(inputs: Inputs) -> Tensor:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    out = F.conv1d(x, weight[:, None].to(x.dtype), bias.to(x.dtype), padding=weight.shape[1] - 1, groups=x.shape[1])
    return F.silu(out[..., : x.shape[-1]])


def conv1d_update(inputs: Inputs) -> Tensor:
    """The convolution of the window and the input, and the window shifted."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    window = torch.cat([inputs["state"].to(x.dtype), x[..., None]], -1)
    out = F.conv1d(window, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=x.shape[1])
    window[..., 1:].clone()
    return F.silu(out).squeeze(-1)


def chunked_ssd(chunk: int) -> Run:
    """The chunked form that models in PyTorch use: differences of running sums, a product of matrices per chunk."""

    def run(inputs: Inputs) -> Tensor:
        x, dt, A, B, C, D = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D"))
        heads, steps = x.shape[2], min(chunk, x.shape[1])
        wide = A.dtype
        # (batch, chunks, steps, ...), (batch, heads, chunks, steps)
        u, B, C = (v.to(wide).unflatten(1, (-1, steps)) for v in (x * dt[..., None], B, C))
        B, C = (v.expand(*v.shape[:3], heads, v.shape[4]) for v in (B, C))
        gate = (dt.to(wide) * A).unflatten(1, (-1, steps)).permute(0, 3, 1, 2)
        since_start = gate.cumsum(-1)
        future = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        between = (since_start[..., :, None] - since_start[..., None, :]).masked_fill(future, -torch.inf).exp()
        y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, between, u)
        to_end = (since_start[..., -1:] - since_start).exp()
        entering = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, to_end, u)
        state, states = torch.zeros_like(entering[:, 0]), []
        kept = since_start[..., -1].exp().permute(2, 0, 1)  # (chunks, batch, heads)
        for entering_c, kept_c in zip(entering.unbind(1), kept, strict=True):
            states.append(state)
            state = kept_c[..., None, None] * state + entering_c
        y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, torch.stack(states, 1), since_start.exp())
        return (y.flatten(1, 2) + D[:, None] * x).to(x.dtype)

    return run


def expanded_selective_scan(inputs: Inputs) -> Tensor:
    """A, dt and D of a head repeated for its channels."""
    x, size = inputs["x"], inputs["x"].shape[3]
    dt, A, D = (inputs[name].repeat_interleave(size, -1) for name in ("dt", "A", "D"))
    B, C = inputs["B"].squeeze(2), inputs["C"].squeeze(2)
    A = A[:, None].expand(-1, B.shape[-1])
    out = wmkernels.selective_scan(x.flatten(2), dt.to(x.dtype), A, B, C, D, channel_last=True)
    assert isinstance(out, Tensor)
    return out.view_as(x)


def causal_attention(inputs: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(inputs["query"], inputs["key"], inputs["value"], is_causal=True)


def _mambapy(pscan: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    u, step, A, B, C = _activated(inputs)
    states = pscan(torch.exp(step[..., None] * A), step[..., None] * B[:, :, None] * u[..., None])
    return _finish((states @ C[..., None]).squeeze(3), inputs)


def _mambapy_linear(pscan: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    gates, tokens = (inputs[name].transpose(1, 2)[..., None] for name in ("gates", "tokens"))
    return pscan(gates, tokens)[..., 0].transpose(1, 2)


def _mamba_ssm(selective_scan_fn: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    return selective_scan_fn(**inputs, delta_softplus="delta_bias" in inputs)


def _accelerated_scan(scan: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Tensor:
    return scan(inputs["gates"], inputs["tokens"])


def _hgrn(hgrn: Callable[..., Any], inputs: Inputs) -> Tensor:
    return hgrn(inputs["tokens"], inputs["log_gates"])[0].transpose(1, 2)


def _hgrn_inputs(inputs: Inputs) -> Inputs:
    """flash-linear-attention: time-major, logarithm of the gate."""
    gates, tokens = (inputs[name].transpose(1, 2).contiguous() for name in ("gates", "tokens"))
    return {"tokens": tokens, "log_gates": gates.log()}


def baselines(op: str, device: torch.device) -> tuple[list[Implementation], dict[str, str]]:
    """Baselines that run ``op`` here, and why others cannot."""
    missing: dict[str, str] = {}

    def imported(module: str, name: str, package: str) -> Any:
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as error:  # imports may fail in any way
            missing[package] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None

    def add(name: str, run: Any, source: str = "", function: Any = None, prepare: Run | None = None) -> None:
        if not source:
            found.append(Implementation(name, run, op))
        elif function is not None:
            found.append(Implementation(name, functools.partial(run, function), op, source=source, prepare=prepare))

    found: list[Implementation] = []
    on_gpu = device.type == "cuda"
    if op == "selective_scan":
        add("best loop", best_loop)
        add("plain loop", plain_loop)
        add("materialising loop", materialising_loop)
        add("mambapy", _mambapy, "mambapy.pscan.pscan", imported("mambapy.pscan", "pscan", "mambapy"))
        if on_gpu:
            add("compiled loop", compiled_loop)
            module = "mamba_ssm.ops.selective_scan_interface"
            function = imported(module, "selective_scan_fn", "mamba_ssm")
            add("mamba_ssm", _mamba_ssm, f"{module}.selective_scan_fn", function)
    elif op == "selective_step":
        add("PyTorch expression", step_expression)
    elif op == "attention":
        add("causal attention", causal_attention)
    elif op == "ssd_scan":
        for chunk in SSD_CHUNKS:
            add(f"chunked form, {chunk} steps", chunked_ssd(chunk))
        add("selective_scan, A expanded", expanded_selective_scan)
    elif op == "causal_conv1d":
        add("conv1d and silu", conv1d_and_silu)
    elif op == "causal_conv1d_step":
        add("conv1d update", conv1d_update)
    elif op == "gated_delta_rule":
        add("recurrent loop", recurrent_loop)
    elif op == "linear_scan":
        add("loop", linear_loop)
        if on_gpu:
            scan = imported("accelerated_scan.warp", "scan", "accelerated_scan")
            add("accelerated_scan", _accelerated_scan, "accelerated_scan.warp.scan", scan)
            for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
                function = imported("fla.ops.hgrn", name, "flash-linear-attention")
                add(f"fla {name}", _hgrn, f"fla.ops.hgrn.{name}", function, _hgrn_inputs)
        else:
            add("mambapy", _mambapy_linear, "mambapy.pscan.pscan", imported("mambapy.pscan", "pscan", "mambapy"))
    return found, missing
