"""The Mamba block (Gu & Dao 2023, figure 3)."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmkernels.checks import MAX_SIZE, require_flag, require_size, state_dtype
from wmkernels.nn.causal_conv1d import CausalConv1d, convolve_with_silu, convolve_with_silu_and_states, pytorch_only
from wmkernels.nn.checks import (
    State,
    checked,
    require_elapsed,
    require_inputs,
    require_not_negative,
    require_packing,
    require_reset,
    require_state,
)
from wmkernels.nn.gated_rms_norm import unit_rms
from wmkernels.nn.memory_module import MemoryModule, is_plain_linear
from wmkernels.selective_scan.function import selective_scan
from wmkernels.selective_step.function import selective_step

Selection = tuple[Tensor, Tensor, Tensor, Tensor]  # delta, A, B, C


class Mamba(MemoryModule):
    """A Mamba block without norm and residual connection; loads state dicts of the published block.

    Args:
        d_model: features of inputs and outputs.
        d_state: states per inner channel.
        d_conv: convolution kernel size.
        expand: inner channels per feature.
        dt_rank: rank of the step-size projection; ``"auto"``: ceil(d_model / 16).
        dt_min: initial step sizes are log-uniform from dt_min to dt_max.
        dt_init: that projection's initial weights, constant or uniform, up to dt_scale / sqrt(dt_rank).
        dt_init_floor: minimum initial step size.
        bias: of the input and output projections.
        groups: sets of B and C, each for d_inner / groups adjacent channels.
        projection_norm_eps: RMS norms without weights of the step sizes' rank, B and C, as in FalconMamba: added to the
            mean square, there 1e-6. None for no norms.
        backend: as for ``wmkernels.selective_scan``.
        dtype: of the parameters; A_log and D stay in float32 (float64).

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.Mamba(d_model=32)
        >>> outputs, state = memory(torch.randn(2, 100, 32))
        >>> output, state = memory.step(torch.randn(2, 32), state)
        >>> outputs.shape, output.shape
        (torch.Size([2, 100, 32]), torch.Size([2, 32]))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'window': (2, 3, 64), 'scan': (2, 64, 16)}
    """

    undecayed: ClassVar[tuple[str, ...]] = ("A_log", "D")

    @checked
    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        groups: int = 1,
        projection_norm_eps: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        name = type(self).__name__
        if not 1 <= d_inner <= MAX_SIZE:
            raise ValueError(f"{name}: expand * d_model is {expand * d_model}, expected 1 to {MAX_SIZE} inner channels")
        if d_inner % groups:
            raise ValueError(f"{name}: groups is {groups}, expected a divisor of the {d_inner} inner channels")
        require_not_negative(name, "projection_norm_eps", projection_norm_eps)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"{name}: dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min <= dt_max")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = d_inner
        self.dt_rank = rank
        self.groups = groups
        self.projection_norm_eps = projection_norm_eps
        self.backend = backend
        self._dt = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        wide: dict[str, Any] = {"device": device, "dtype": state_dtype(dtype or torch.get_default_dtype())}
        # In the published order: equal seeds give equal weights.
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **factory)
        self.conv1d = CausalConv1d(d_inner, d_conv, bias=conv_bias, backend=pytorch_only(backend), **factory)
        self.x_proj = nn.Linear(d_inner, rank + 2 * groups * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(rank, d_inner, bias=True, **factory)
        self._reset_step_size()
        self.A_log = nn.Parameter(torch.empty(d_inner, self._decays, **wide))
        self.D = nn.Parameter(torch.empty(d_inner, **wide))
        self._reset_decay()
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)
        self._mark_parameters()
        self._mark_when_loaded()

    @property
    def _decays(self) -> int:
        return self.d_state

    def reset_parameters(self) -> None:
        for projection in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj):
            projection.reset_parameters()
        self._reset_step_size()
        self._reset_decay()
        self.out_proj.reset_parameters()

    def _reset_step_size(self) -> None:
        low, high, kind, scale, floor = self._dt
        weight, bias = self.dt_proj.weight, self.dt_proj.bias
        bound = self.dt_rank**-0.5 * scale
        if kind == "constant":
            nn.init.constant_(weight, bound)
        else:
            nn.init.uniform_(weight, -bound, bound)
        draw = torch.rand(self.d_inner, device=bias.device, dtype=bias.dtype)
        step = torch.exp(draw * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
        with torch.no_grad():
            bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse softplus

    def _reset_decay(self) -> None:
        """A = -1, ..., -d_state (S4D-real)."""
        with torch.no_grad():
            self.A_log.copy_(self._initial_decay().log().expand_as(self.A_log))
            self.D.fill_(1)

    def _initial_decay(self) -> Tensor:
        return torch.arange(1, self.d_state + 1, device=self.A_log.device)

    def _mark_parameters(self) -> None:
        super()._mark_parameters()
        for name, parameter in self.dt_proj.named_parameters():
            if name.split(".")[-1] == "bias":
                parameter._no_reinit = True  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"
        return f"{sizes}, dt_rank={self.dt_rank}" + (f", backend={self.backend!r}" if self.backend else "")

    def init_state(self, batch_size: int) -> State:
        """Zeros, float32 (float64): ``"window"`` of the convolution, ``"scan"`` (batch, d_inner, d_state)."""
        require_size(type(self).__name__, "batch_size", batch_size)
        # A parameter of this module: others may be adapted, quantised or sharded.
        dtype, device = state_dtype(self.A_log.dtype), self.A_log.device
        shapes = Mamba._state_shapes(self, batch_size)
        return {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}

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
        """Outputs (batch, time, d_model) and the differentiable last state.

        Args:
            inputs: (batch, time, d_model).
            state: zeros if None; one row per sequence with ``cu_seqlens``.
            reset: bool (batch, time), true at a sequence's first step.
            cu_seqlens: int (sequences + 1), from 0 to time; requires batch 1.
            elapsed: (batch, time), time since the step before, which scales the step size; None for 1. Without input,
                one step of n is n steps of 1.
            single_step: as ``step``, which calls the module with it.

        Raises:
            ValueError: invalid shape, device, backend or cu_seqlens.
            TypeError: invalid dtype or state.
        """
        return self._run(inputs, state, reset, cu_seqlens, elapsed, None, single_step)

    def forward_with_states(
        self,
        inputs: Tensor,
        states_after: Sequence[int],
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """As of ``memory_module``: the scan alone has a call for each part."""
        return self._forward(inputs, state, reset, None, elapsed, None, states_after)

    def _run(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        elapsed: Tensor | None,
        turn: Tensor | None,
        single_step: bool,
    ) -> tuple[Tensor, State]:
        if require_flag(type(self).__name__, "single_step", single_step):
            return self._step(inputs, state, reset, elapsed, turn)
        outputs, (after,) = self._forward(inputs, state, reset, cu_seqlens, elapsed, turn, None)
        return outputs, after

    def _forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        elapsed: Tensor | None,
        turn: Tensor | None,
        stops: Sequence[int] | None,
    ) -> tuple[Tensor, list[State]]:
        """Outputs, and the states after each of ``stops`` steps, by default the last."""
        name = type(self).__name__
        require_inputs(name, "inputs", inputs, ("batch", "time", "d_model"), self.d_model)
        require_reset(name, reset, inputs)
        require_packing(name, cu_seqlens, inputs)
        require_elapsed(name, elapsed, inputs)
        rows = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self._require_state(state, rows, inputs)
        x, z = self.in_proj(inputs).chunk(2, -1)  # (batch, time, d_inner)
        if stops is None:
            x, window = convolve_with_silu(self.conv1d, x, state, reset, cu_seqlens)
            windows = [window]
        else:
            x, windows = convolve_with_silu_and_states(self.conv1d, x, stops, state, reset)
        (delta, A, B, C), bias, rotations = self._selection(x, state, reset, cu_seqlens, elapsed, turn, stops)
        if elapsed is not None:
            delta, bias = self._scaled(delta, bias, elapsed), None
        D, scan = self._wide(self.D, x), None if state is None else self._wide(state["scan"], x)
        outputs, scans = [], []
        for x_part, delta_part, B_part, C_part, z_part, reset_part in _parts((x, delta, B, C, z), reset, stops or ()):
            y, scan = selective_scan(
                x_part,
                delta_part,
                A,
                B_part,
                C_part,
                D,
                z_part,
                bias,
                delta_softplus=elapsed is None,
                return_last_state=True,
                initial_state=scan,
                reset=reset_part,
                cu_seqlens=cu_seqlens,
                channel_last=True,
                backend=self.backend,
            )
            outputs.append(y)
            scans.append(scan)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        states = zip(windows, scans[: len(windows)], rotations, strict=True)
        return self.out_proj(y), [{**window, "scan": scan, **rotation} for window, scan, rotation in states]

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
        return self._step(input, state, reset, elapsed, None)

    def _step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        elapsed: Tensor | None,
        turn: Tensor | None,
    ) -> tuple[Tensor, State]:
        require_inputs(type(self).__name__, "input", input, ("batch", "d_model"), self.d_model)
        require_reset(type(self).__name__, reset, input)
        require_elapsed(type(self).__name__, elapsed, input)
        self._require_state(state, input.shape[0], input)
        if state is None:
            state = self.init_state(input.shape[0])
        x, z = self.in_proj(input).chunk(2, -1)  # (batch, d_inner)
        x, carried = convolve_with_silu(self.conv1d, x, state, reset, single_step=True)
        (delta, A, B, C), bias, rotation_state = self._selection_step(x, state, reset, elapsed, turn)
        if elapsed is not None:
            delta, bias = self._scaled(delta, bias, elapsed), None
        if self.groups == 1:  # for the fast path
            B, C = B.squeeze(1), C.squeeze(1)
        y, scan = selective_step(
            self._wide(state["scan"], x),
            x,
            delta,
            A,
            B,
            C,
            self._wide(self.D, x),
            z,
            bias,
            delta_softplus=elapsed is None,
            reset=reset,
            backend=self.backend,
        )
        return self.out_proj(y), {**carried, "scan": scan, **rotation_state}

    def _selection(
        self,
        x: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None,
        cu_seqlens: Tensor | None,
        elapsed: Tensor | None,
        turn: Tensor | None,
        stops: Sequence[int] | None,
    ) -> tuple[Selection, Tensor | None, list[State]]:
        """Of all steps; the last are further states after each of ``stops``, by default the last step."""
        delta, bias, B, C = self._project(x)
        further: list[State] = [{} for _ in ([x.shape[1]] if stops is None else stops)]
        return (delta, self._decay(x), B.transpose(1, 2), C.transpose(1, 2)), bias, further

    def _selection_step(
        self,
        x: Tensor,
        state: Mapping[str, Tensor],
        reset: Tensor | None,
        elapsed: Tensor | None,
        turn: Tensor | None,
    ) -> tuple[Selection, Tensor | None, State]:
        delta, bias, B, C = self._project(x)
        return (delta, self._decay(x), B, C), bias, {}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """delta (..., d_inner), the bias to add to it, B and C (..., groups, d_state)."""
        size = self.groups * self.d_state
        rank, B, C = self.x_proj(x).split([self.dt_rank, size, size], -1)
        shape = (self.groups, self.d_state)
        B, C = B.unflatten(-1, shape), C.unflatten(-1, shape)
        if self.projection_norm_eps is not None:
            rank, B, C = (unit_rms(x, self.projection_norm_eps) for x in (rank, B, C))
        bias: Tensor | None = None
        if is_plain_linear(self.dt_proj):
            # The scan adds the bias, in float32: 16 bits would round the sum, an error of 1% in the step size.
            delta = F.linear(rank, self.dt_proj.weight)
            bias = None if self.dt_proj.bias is None else self._wide(self.dt_proj.bias, x)
        else:
            delta = self.dt_proj(rank)
        return delta, bias, B, C

    def _scaled(self, delta: Tensor, bias: Tensor | None, elapsed: Tensor) -> Tensor:
        """Step sizes: the scan's own softplus would come after the product."""
        delta = self._wide(delta, delta)
        return F.softplus(delta if bias is None else delta + bias) * elapsed.to(delta.dtype)[..., None]

    def decay(self) -> Tensor:
        """A, (d_inner, d_state), in the dtype of ``A_log``."""
        return self._decay(self.A_log)

    def _decay(self, x: Tensor) -> Tensor:
        return -torch.exp(self._wide(self.A_log, x))

    def _wide(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(state_dtype(like.dtype))

    def _require_state(self, state: Mapping[str, Tensor] | None, rows: int, inputs: Tensor) -> None:
        if state is not None:
            require_state(type(self).__name__, state, self._state_shapes(rows), inputs)

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {"window": (rows, self.d_conv - 1, self.d_inner), "scan": (rows, self.d_inner, self.d_state)}


def _parts(
    sequences: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], reset: Tensor | None, stops: Sequence[int]
) -> Iterator[tuple[Any, ...]]:
    """x, delta, B, C, z and resets of the steps between ``stops``; time is the dimension 1, of B and C 2."""
    time = sequences[0].shape[1]
    ends = sorted({*stops, time})
    if len(ends) == 1:
        yield (*sequences, reset)
        return
    sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
    # Splits, whose gradient is one concatenation.
    splits = [tensor.split(sizes, dim) for tensor, dim in zip(sequences, (1, 1, 2, 2, 1), strict=True)]
    yield from zip(*splits, [None] * len(ends) if reset is None else reset.split(sizes, 1), strict=True)
