"""The Gated DeltaNet block (Yang, Kautz & Hatamizadeh 2024, figure 1)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import MAX_SIZE, require_flag, require_size, state_dtype
from wmkernels.gated_delta_rule.function import gated_delta_rule, gated_delta_rule_step
from wmkernels.nn.causal_conv1d import CausalConv1d, convolve_with_silu, pytorch_only
from wmkernels.nn.checks import (
    State,
    checked,
    require_elapsed,
    require_inputs,
    require_packing,
    require_reset,
    require_state,
)
from wmkernels.nn.memory_module import MemoryModule

NORM_EPS = 1e-6


class GatedDeltaNet(MemoryModule):
    """A Gated DeltaNet block without norm and residual connection.

    The memory is a matrix per head. A step writes ``beta_t (v_t - what k_t recalls)`` under its key, so the key's value
    is replaced, where a ``Mamba`` adds to what decays. Keys and queries have unit length.

    Args:
        d_model: features of inputs and outputs.
        heads: of queries and keys.
        d_head: features of a query and a key; 3/4 d_model / heads if None, as published.
        expand_v: features of a value per feature of a key.
        value_heads: a multiple of ``heads``; ``heads`` if None.
        d_conv: convolution kernel size.
        dt_min: initial step sizes, which scale the decays, are log-uniform from dt_min to dt_max.
        bias: of the input and output projections.
        backend: as for ``wmkernels.selective_scan``.
        dtype: of the parameters; A_log and dt_bias stay in float32 (float64).

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.GatedDeltaNet(d_model=32, heads=2)
        >>> outputs, state = memory(torch.randn(2, 100, 32))
        >>> output, state = memory.step(torch.randn(2, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'window': (2, 3, 96), 'recurrent': (2, 2, 12, 24)}
    """

    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    @checked
    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        d_head: int | None = None,
        expand_v: float = 2,
        value_heads: int | None = None,
        d_conv: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_head = max(1, 3 * d_model // (4 * heads)) if d_head is None else d_head
        value_heads = heads if value_heads is None else value_heads
        for argument, size in (("d_head", d_head), ("value_heads", value_heads)):
            require_size("GatedDeltaNet", argument, size, least=1)
        d_value = int(expand_v * d_head)
        if not 1 <= d_value <= MAX_SIZE:
            raise ValueError(
                f"GatedDeltaNet: expand_v * d_head is {expand_v * d_head}, expected 1 to {MAX_SIZE} features of a value"
            )
        if value_heads % heads:
            raise ValueError(f"GatedDeltaNet: value_heads is {value_heads}, expected a multiple of heads={heads}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"GatedDeltaNet: dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min <= dt_max")
        self.d_model, self.heads, self.d_head = d_model, heads, d_head
        self.value_heads, self.d_value, self.d_conv = value_heads, d_value, d_conv
        self.backend = backend
        self._dt = (dt_min, dt_max)
        keys, values = heads * d_head, value_heads * d_value
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": state_dtype(dtype or torch.get_default_dtype())}
        self.in_proj = nn.Linear(d_model, 2 * keys + 2 * values, bias=bias, **factory)  # q, k, v, z
        self.gate_proj = nn.Linear(d_model, 2 * value_heads, bias=False, **factory)  # beta, step size
        self.conv1d = CausalConv1d(2 * keys + values, d_conv, bias=False, backend=pytorch_only(backend), **factory)
        self.A_log = nn.Parameter(torch.empty(value_heads, **wide))
        self.dt_bias = nn.Parameter(torch.empty(value_heads, **wide))
        self.norm = nn.RMSNorm(d_value, eps=NORM_EPS, **factory)
        self.out_proj = nn.Linear(values, d_model, bias=bias, **factory)
        self._reset_decay()
        self._mark_parameters()
        self._mark_when_loaded()

    def reset_parameters(self) -> None:
        for part in (self.in_proj, self.gate_proj, self.conv1d, self.norm, self.out_proj):
            part.reset_parameters()
        self._reset_decay()

    def _reset_decay(self) -> None:
        """Decay rates uniform up to 16, step sizes log-uniform."""
        low, high = (math.log(x) for x in self._dt)
        with torch.no_grad():
            self.A_log.uniform_(1e-3, 16).log_()
            step = self.dt_bias.uniform_(low, high).exp()
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse softplus

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, heads={self.heads}, d_head={self.d_head}, value_heads={self.value_heads}"
        return f"{sizes}, d_value={self.d_value}" + (f", backend={self.backend!r}" if self.backend else "")

    def init_state(self, batch_size: int) -> State:
        """Zeros, float32 (float64): ``"window"`` of the convolution, ``"recurrent"`` (batch, value_heads, d_k, d_v)."""
        require_size("GatedDeltaNet", "batch_size", batch_size)
        dtype, device = state_dtype(self.A_log.dtype), self.A_log.device
        return {
            name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in self._shapes(batch_size).items()
        }

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """Outputs (batch, time, d_model) and the differentiable last state.

        Args:
            inputs: (batch, time, d_model).
            state: zeros if None; one row per sequence with ``cu_seqlens``.
            reset: bool (batch, time), true at a sequence's first step.
            elapsed: time since the step before, which scales the decay, (batch, time); ones if None.
            cu_seqlens: int (sequences + 1), from 0 to time; requires batch 1.
            single_step: as ``step``, which calls the module with it.

        Raises:
            ValueError: invalid shape, device, backend or cu_seqlens.
            TypeError: invalid dtype or state.
        """
        if require_flag("GatedDeltaNet", "single_step", single_step):
            return self._step(inputs, state, reset, elapsed)
        require_inputs("GatedDeltaNet", "inputs", inputs, ("batch", "time", "d_model"), self.d_model)
        require_reset("GatedDeltaNet", reset, inputs)
        require_packing("GatedDeltaNet", cu_seqlens, inputs)
        rows = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self._require_state(state, rows, inputs)
        mixed, z = self._project(inputs)
        mixed, carried = convolve_with_silu(self.conv1d, mixed, state, reset, cu_seqlens)
        arguments = (*self._heads(mixed), *self._gates(inputs, elapsed))
        y, recurrent = gated_delta_rule(
            *arguments,
            initial_state=None if state is None else state["recurrent"].to(state_dtype(inputs.dtype)),
            reset=reset,
            cu_seqlens=cu_seqlens,
            channel_last=True,
            return_last_state=True,
            backend=self.backend,
        )
        return self._output(y, z), {**carried, "recurrent": recurrent}

    def step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """One step: ``input`` (batch, d_model), ``reset`` bool (batch,), ``elapsed`` (batch,)."""
        if self._steps_by_call:
            stepped: tuple[Tensor, State] = self(input, state, reset, elapsed=elapsed, single_step=True)
            return stepped
        return self._step(input, state, reset, elapsed)

    def _step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None, elapsed: Tensor | None
    ) -> tuple[Tensor, State]:
        require_inputs("GatedDeltaNet", "input", input, ("batch", "d_model"), self.d_model)
        require_reset("GatedDeltaNet", reset, input)
        self._require_state(state, input.shape[0], input)
        if state is None:
            state = self.init_state(input.shape[0])
        mixed, z = self._project(input)
        mixed, carried = convolve_with_silu(self.conv1d, mixed, state, reset, single_step=True)
        arguments = (*self._heads(mixed), *self._gates(input, elapsed))
        before = state["recurrent"].to(state_dtype(input.dtype))
        y, recurrent = gated_delta_rule_step(before, *arguments, reset=reset, backend=self.backend)
        return self._output(y, z), {**carried, "recurrent": recurrent}

    def _project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """q, k and v side by side, and z (..., value_heads, d_value)."""
        values = self.value_heads * self.d_value
        mixed, z = self.in_proj(inputs).split([2 * self.heads * self.d_head + values, values], -1)
        return mixed, z.unflatten(-1, (self.value_heads, self.d_value))

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., heads, size); q and k of unit length."""
        keys = self.heads * self.d_head
        q, k, v = mixed.split([keys, keys, self.value_heads * self.d_value], -1)
        q, k = (x.unflatten(-1, (self.heads, self.d_head)) for x in (q, k))
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
        return q, k, v.unflatten(-1, (self.value_heads, self.d_value))

    def _gates(self, inputs: Tensor, elapsed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logarithm of the decay, and beta, (..., value_heads), in the state dtype."""
        require_elapsed("GatedDeltaNet", elapsed, inputs)
        wide = state_dtype(inputs.dtype)
        beta, step = self.gate_proj(inputs).to(wide).chunk(2, -1)
        step = F.softplus(step + self.dt_bias.to(wide))
        if elapsed is not None:
            step = step * elapsed.to(wide)[..., None]
        return -self.A_log.to(wide).exp() * step, beta.sigmoid()

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.out_proj((self.norm(y) * F.silu(z)).flatten(-2))
        return out

    def _require_state(self, state: Mapping[str, Tensor] | None, rows: int, inputs: Tensor) -> None:
        if state is not None:
            require_state("GatedDeltaNet", state, self._shapes(rows), inputs)

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        mixed = 2 * self.heads * self.d_head + self.value_heads * self.d_value
        return {
            "window": (rows, self.d_conv - 1, mixed),
            "recurrent": (rows, self.value_heads, self.d_head, self.d_value),
        }
