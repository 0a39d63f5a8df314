"""A Mamba block with a complex state, computed as a real scan in the rotating frame.

``h_t = exp(step_t a + i w_t) h_{t-1} + step_t B_t u_t`` is read by ``Re(conj(C_t) h_t)``. With
``angle_t = w_1 + ... + w_t`` and ``g_t = exp(-i angle_t) h_t``,

    g_t = exp(step_t a) g_{t-1} + step_t (exp(-i angle_t) B_t) u_t,    read by    Re(conj(exp(-i angle_t) C_t) g_t).

Adjacent real states hold a complex one. Angles accumulate in float64, where sums of a constant float32 rate are exact,
and are wrapped to [0, 2 pi) after each call: error below 1e-8 after a million steps.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wmkernels.checks import FLOATS, require_device, require_dtype, require_shape, require_tensor, state_dtype
from wmkernels.linear_scan.function import linear_scan
from wmkernels.nn.checks import State, checked
from wmkernels.nn.mamba import Mamba, Selection

TURN = 2 * math.pi
_SPEED_BIAS, _SPEED_STD = 1.5, 0.3  # of the projection whose tanh is the initial speed


class RotaryMamba(Mamba):
    """``Mamba`` with a complex state, after Mamba-3 (arXiv 2603.15569), to distinguish lags.

    The state dict adds ``angle_rate`` (groups, d_state / 2) in radians per step, ``angle_proj.weight`` with
    ``selective_angle``, ``speed_proj.weight`` and ``speed_proj.bias`` with ``selective_speed``; ``A_log`` is (d_inner,
    d_state / 2).

    Args:
        d_model: as for ``Mamba``, like arguments not listed.
        d_state: real states per inner channel, even.
        groups: sets of B, C and angles.
        selective_angle: input-dependent rate.
        selective_speed: an input-dependent factor of a group's rates, from -1 to 1, initially near 1. At -1 the angles
            turn back: what was written last comes first.
        decay: initial -A.

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.RotaryMamba(d_model=32, groups=2)
        >>> outputs, state = memory(torch.randn(2, 100, 32))
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'window': (2, 3, 64), 'scan': (2, 64, 16), 'angle': (2, 2, 8)}
    """

    undecayed = (*Mamba.undecayed, "angle_rate")

    @checked
    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        groups: int = 1,
        selective_angle: bool = False,
        selective_speed: bool = False,
        decay: float = 0.5,
        **arguments: Any,
    ) -> None:
        if d_state % 2:
            raise ValueError(f"RotaryMamba: d_state is {d_state}, expected an even number: two for each complex state")
        if not decay > 0:
            raise ValueError(f"RotaryMamba: decay is {decay}, expected more than 0")
        self._initial = decay
        super().__init__(d_model, d_state, groups=groups, **arguments)
        like = self.A_log
        self.angle_rate = nn.Parameter(torch.empty(groups, d_state // 2, device=like.device, dtype=like.dtype))
        self.angle_proj: nn.Linear | None = None
        if selective_angle:
            weight = self.in_proj.weight
            size = groups * d_state // 2
            self.angle_proj = nn.Linear(self.d_inner, size, bias=False, device=weight.device, dtype=weight.dtype)
        self.speed_proj: nn.Linear | None = None
        if selective_speed:
            weight = self.in_proj.weight
            self.speed_proj = nn.Linear(self.d_inner, groups, device=weight.device, dtype=weight.dtype)
        self._reset_angle()
        self._mark_parameters()

    @property
    def _decays(self) -> int:
        return self.d_state // 2

    def _initial_decay(self) -> Tensor:
        return torch.full((self._decays,), self._initial, device=self.A_log.device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_angle()

    def _reset_angle(self) -> None:
        groups, pairs = self.angle_rate.shape
        with torch.no_grad():
            spread = torch.linspace(0, math.pi, groups * pairs, device=self.angle_rate.device)
            self.angle_rate.copy_(spread.view(pairs, groups).t())
        if self.angle_proj is not None:
            nn.init.zeros_(self.angle_proj.weight)
        if self.speed_proj is not None:
            nn.init.normal_(self.speed_proj.weight, std=_SPEED_STD)
            nn.init.constant_(self.speed_proj.bias, _SPEED_BIAS)

    def extra_repr(self) -> str:
        selective = f"selective_angle={self.angle_proj is not None}, selective_speed={self.speed_proj is not None}"
        return f"{super().extra_repr()}, groups={self.groups}, {selective}"

    def init_state(self, batch_size: int) -> State:
        """Adds ``"angle"`` (batch, groups, d_state / 2), float64 radians."""
        state = super().init_state(batch_size)
        angle = torch.zeros((batch_size, *self.angle_rate.shape), device=self.angle_rate.device, dtype=torch.float64)
        return {**state, "angle": angle}

    def forward(
        self,
        inputs: Tensor,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        elapsed: Tensor | None = None,
        turn: Tensor | None = None,
        single_step: bool = False,
    ) -> tuple[Tensor, State]:
        """As ``Mamba.forward``; ``elapsed`` scales the angles as well.

        ``turn`` (batch, time, groups, d_state / 2) adds radians to each step's angles: a control input, such as a move,
        turns the memory.
        """
        return self._run(inputs, state, reset, cu_seqlens, elapsed, turn, single_step)

    def step(
        self,
        input: Tensor,
        state: Mapping[str, Tensor] | None,
        reset: Tensor | None = None,
        *,
        elapsed: Tensor | None = None,
        turn: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As ``Mamba.step``; ``turn`` (batch, groups, d_state / 2)."""
        if turn is None:
            return super().step(input, state, reset, elapsed=elapsed)
        if self._steps_by_call:
            stepped: tuple[Tensor, State] = self(input, state, reset, elapsed=elapsed, turn=turn, single_step=True)
            return stepped
        return self._step(input, state, reset, elapsed, turn)

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {**super()._state_shapes(rows), "angle": (rows, *self.angle_rate.shape)}

    def _decay(self, x: Tensor) -> Tensor:
        return super()._decay(x).repeat_interleave(2, 1)

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
        delta, bias, B, C = self._project(x)
        before = None if state is None else state["angle"].double()
        angle, last = self._accumulate(self._rates(x, elapsed, turn), before, reset, cu_seqlens)
        further: list[State] = [{"angle": angle[:, stop - 1].clone()} for stop in stops or ()]
        B, C = apply_rotary(B, angle), apply_rotary(C, angle)
        selection = delta, self._decay(x), B.transpose(1, 2), C.transpose(1, 2)
        return selection, bias, [{"angle": last}] if stops is None else further

    def _selection_step(
        self,
        x: Tensor,
        state: Mapping[str, Tensor],
        reset: Tensor | None,
        elapsed: Tensor | None,
        turn: Tensor | None,
    ) -> tuple[Selection, Tensor | None, State]:
        delta, bias, B, C = self._project(x)
        before = state["angle"].double()
        if reset is not None:
            before = before.masked_fill(reset[:, None, None], 0)
        angle = (before + self._rates(x, elapsed, turn)).remainder(TURN)  # (batch, groups, pairs)
        return (delta, self._decay(x), apply_rotary(B, angle), apply_rotary(C, angle)), bias, {"angle": angle}

    def _rates(self, x: Tensor, elapsed: Tensor | None, turn: Tensor | None) -> Tensor:
        """Float64 angle increments (..., groups, pairs)."""
        rates = self.angle_rate.double().expand(*x.shape[:-1], *self.angle_rate.shape)
        if self.angle_proj is not None:
            rates = rates + self.angle_proj(x).double().unflatten(-1, self.angle_rate.shape)
        if self.speed_proj is not None:
            rates = rates * self.speed_proj(x).double().tanh()[..., None]
        if elapsed is not None:
            rates = rates * elapsed.double()[..., None, None]
        if turn is not None:
            require_tensor("RotaryMamba", "turn", turn)
            require_device("RotaryMamba", "turn", turn, x.device, "the input")
            require_dtype("RotaryMamba", "turn", turn, FLOATS, "(radians)")
            labels = ("batch", "time")[: x.dim() - 1]
            require_shape("RotaryMamba", "turn", turn, (*labels, "groups", "pairs"), rates.shape, "the input")
            rates = rates + turn.double()
        return rates

    def _accumulate(
        self, rates: Tensor, before: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Angles (batch, time, groups, pairs) and last angles."""
        bounds = None
        if cu_seqlens is not None:
            bounds = cu_seqlens.to(torch.int64)
            rates, reset = _packed(rates, before, reset, bounds)
        total, last = linear_scan(
            torch.ones_like(rates),
            rates,
            before if bounds is None else None,
            reset=reset,
            channel_last=True,
            return_last_state=True,
            backend=self.backend,
        )
        angle = total.remainder(TURN)
        if bounds is None:
            return angle, last.remainder(TURN)
        ends = angle[0].index_select(0, (bounds[1:] - 1).clamp(min=0)) if angle.shape[1] else angle.new_zeros(())
        empty = (bounds[1:] == bounds[:-1])[:, None, None]
        kept = ends.new_zeros(empty.shape) if before is None else before.remainder(TURN)
        return angle, torch.where(empty, kept, ends)


def _packed(rates: Tensor, before: Tensor | None, reset: Tensor | None, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Adds initial angles and resets at sequence starts."""
    time = rates.shape[1]
    occupied = bounds[1:] > bounds[:-1]
    # Empty sequences index a dummy last row.
    starts = torch.where(occupied, bounds[:-1], time)
    first = torch.zeros(time + 1, dtype=torch.bool, device=rates.device).index_fill(0, starts, True)[:time]
    if before is not None:
        carried = rates.new_zeros(time + 1, *rates.shape[2:]).index_add(0, starts, before)[:time]
        if reset is not None:
            carried = carried.masked_fill(reset[0, :, None, None], 0)
        rates = rates + carried
    return rates, first[None] if reset is None else reset | first


def apply_rotary(projection: Tensor, angle: Tensor) -> Tensor:
    """exp(-i angle) times ``projection`` (..., groups, 2 pairs)."""
    dtype = state_dtype(projection.dtype)
    angle = angle.to(dtype)  # wrapped; bfloat16 would round it by up to 1/64 rad
    cos, sin = angle.cos(), angle.sin()
    real, imaginary = projection.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([real * cos + imaginary * sin, imaginary * cos - real * sin], -1).flatten(-2)
    return rotated.to(projection.dtype)


def renamed(module: str, name: str) -> type[RotaryMamba]:
    """The deprecated ``RotatedMamba``; warns."""
    if name != "RotatedMamba":
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    message = f"{module}.RotatedMamba is now RotaryMamba; the old name goes with the next release"
    warnings.warn(message, FutureWarning, stacklevel=3)
    return RotaryMamba


def __getattr__(name: str) -> type[RotaryMamba]:
    return renamed(__name__, name)
