"""What ``Mamba2`` and ``Mamba3`` share: ``forward`` and ``step`` around the SSD scan, step sizes, the state."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import MAX_SIZE, require_flag, require_size, state_dtype
from wmkernels.nn.checks import (
    State,
    require_elapsed,
    require_inputs,
    require_packing,
    require_reset,
    require_state,
)
from wmkernels.nn.memory_module import MemoryModule
from wmkernels.ssd_scan.function import ssd_scan, ssd_step
from wmkernels.ssd_scan.meta import SSDState


class Projected(NamedTuple):
    """What a block makes of its inputs before the scan."""

    arguments: dict[str, Any]  # of ssd_scan or ssd_step
    beside: tuple[Tensor, ...]  # what the output takes besides the scan's
    carried: State  # the block's own part of the state


class SSDModule(MemoryModule):
    """A block around ``ssd_scan``; a subclass projects inputs and outputs.

    Attributes:
        dt_bias: (heads,), whose softplus is the step size for an input of zero.
    """

    dt_bias: nn.Parameter
    backend: str | None

    def _set_sizes(
        self,
        d_model: int,
        d_state: int,
        expand: float,
        headdim: int,
        ngroups: int,
        d_ssm: int | None,
        chunk_size: int | None,
    ) -> None:
        name, inner = type(self).__name__, expand * d_model
        for argument, size in (("d_ssm", d_ssm), ("chunk_size", chunk_size)):
            if size is not None:
                require_size(name, argument, size, least=1)
        if not 1 <= int(inner) <= MAX_SIZE:
            raise ValueError(f"{name}: expand * d_model is {inner}, expected 1 to {MAX_SIZE} inner channels")
        self.d_model, self.d_state, self.expand, self.headdim, self.ngroups = d_model, d_state, expand, headdim, ngroups
        self.d_inner, self.chunk_size = int(inner), chunk_size
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm > self.d_inner:
            raise ValueError(f"{name}: d_ssm is {d_ssm}, expected at most the {self.d_inner} inner channels")
        if self.d_ssm % headdim:
            raise ValueError(f"{name}: headdim is {headdim}, expected a divisor of the scan's {self.d_ssm} channels")
        self.heads = self.d_ssm // headdim
        if self.heads % ngroups:
            raise ValueError(f"{name}: ngroups is {ngroups}, expected a divisor of the {self.heads} heads")

    def _set_step_size(self, dt_min: float, dt_max: float, dt_init_floor: float, wide: dict[str, Any]) -> None:
        if not 0 < dt_min <= dt_max:
            name = type(self).__name__
            raise ValueError(f"{name}: dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min <= dt_max")
        self._dt = (dt_min, dt_max, dt_init_floor)
        self.dt_bias = nn.Parameter(torch.empty(self.heads, **wide))
        self._reset_step_size()

    def _reset_step_size(self) -> None:
        low, high, floor = self._dt
        draw = torch.rand(self.heads, device=self.dt_bias.device, dtype=self.dt_bias.dtype)
        step = torch.exp(draw * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
        with torch.no_grad():
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse softplus

    def init_state(self, batch_size: int) -> State:
        """Zeros, float32 (float64); ``"scan"`` is (batch, heads, headdim, d_state)."""
        require_size(type(self).__name__, "batch_size", batch_size)
        dtype, device = state_dtype(self.dt_bias.dtype), self.dt_bias.device
        return {
            name: torch.zeros(shape, device=device, dtype=torch.float64 if name == "phase" else dtype)
            for name, shape in self._state_shapes(batch_size).items()
        }

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        elapsed: Tensor | None = None,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """Outputs (batch, time, d_model) and the differentiable last state; as ``Mamba.forward``.

        Args:
            inputs: (batch, time, d_model).
            state: zeros if None; one row per sequence with ``cu_seqlens``.
            reset: bool (batch, time), true at a sequence's first step.
            cu_seqlens: int (sequences + 1), from 0 to time; requires batch 1.
            elapsed: (batch, time), time since the step before, which scales the step size; None for 1.
            single_step: as ``step``, which calls the module with it.

        Raises:
            ValueError: invalid shape, device, backend or cu_seqlens.
            TypeError: invalid dtype or state.
        """
        name = type(self).__name__
        if require_flag(name, "single_step", single_step):
            return self._step(inputs, state, reset, elapsed)
        require_inputs(name, "inputs", inputs, ("batch", "time", "d_model"), self.d_model)
        require_reset(name, reset, inputs)
        require_packing(name, cu_seqlens, inputs)
        require_elapsed(name, elapsed, inputs)
        rows = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self._require_state(state, rows, inputs)
        projected = self._project(inputs, state, reset, cu_seqlens, elapsed, single_step=False)
        y, last = ssd_scan(
            **projected.arguments,
            initial_state=None if state is None else self._scan_state(state, projected.arguments["x"]),
            reset=reset,
            cu_seqlens=cu_seqlens,
            chunk=self.chunk_size,
            return_last_state=True,
            backend=self.backend,
        )
        return self._output(y, *projected.beside), {**projected.carried, **_named(last)}

    def step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """One step: ``input`` (batch, d_model), ``reset`` bool and ``elapsed`` (batch,)."""
        if self._steps_by_call:
            options = {} if elapsed is None else {"elapsed": elapsed}
            stepped: tuple[Tensor, State] = self(input, state, reset, single_step=True, **options)
            return stepped
        return self._step(input, state, reset, elapsed)

    def _step(
        self, input: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None, elapsed: Tensor | None
    ) -> tuple[Tensor, State]:
        name = type(self).__name__
        require_inputs(name, "input", input, ("batch", "d_model"), self.d_model)
        require_reset(name, reset, input)
        require_elapsed(name, elapsed, input)
        self._require_state(state, input.shape[0], input)
        if state is None:
            state = self.init_state(input.shape[0])
        projected = self._project(input, state, reset, None, elapsed, single_step=True)
        before = self._scan_state(state, projected.arguments["x"])
        y, after = ssd_step(before, **projected.arguments, reset=reset, backend=self.backend)
        return self._output(y, *projected.beside), {**projected.carried, **_named(after)}

    def _project(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        elapsed: Tensor | None,
        single_step: bool,
    ) -> Projected:
        raise NotImplementedError

    def _output(self, y: Tensor, *beside: Tensor) -> Tensor:
        """``y`` (..., heads, headdim) -> (..., d_model)."""
        raise NotImplementedError

    def _scan_state(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor | SSDState:
        raise NotImplementedError

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _step_size(self, dt: Tensor, elapsed: Tensor | None, limit: tuple[float, float]) -> dict[str, Any]:
        """Arguments of the scan, whose softplus would come after a product with ``elapsed``."""
        wide = state_dtype(dt.dtype)
        bias = self.dt_bias.to(wide)
        if elapsed is None:
            return {"dt": dt, "dt_bias": bias, "dt_softplus": True, "dt_limit": limit}
        step = F.softplus(dt.to(wide) + bias).clamp(*limit)
        return {"dt": step * elapsed.to(wide)[..., None]}

    def _require_state(self, state: Mapping[str, Tensor] | None, rows: int, inputs: Tensor) -> None:
        if state is not None:
            require_state(type(self).__name__, state, self._state_shapes(rows), inputs)


def _named(last: Tensor | SSDState) -> State:
    if isinstance(last, Tensor):
        return {"scan": last}
    assert last.phase is not None and last.B is not None and last.x is not None
    return {"scan": last.state, "phase": last.phase, "B": last.B, "x": last.x}
