"""A map that stays where it is: the state is fixed in the world's frame, and the keys turn with the observer.

The key of a place at position p is [cos(w_f . p), sin(w_f . p)] over frequencies w_f: a move by d turns it by w_f . d.
On a complete lattice of frequencies, keys of unlike places are orthogonal: a write at one place leaves all others as
they were. Angles accumulate in float64 and are wrapped before they become float32.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from wmkernels.checks import (
    FLOATS,
    dtype_name,
    no_autocast,
    require_device,
    require_dtype,
    require_float,
    require_reset,
    require_shape,
    require_size,
    require_tensor,
    shown,
    state_dtype,
)
from wmkernels.linear_scan.function import linear_scan
from wmkernels.modes import can_read_values
from wmkernels.nn.checks import State, checked, require_inputs, require_state
from wmkernels.nn.memory_module import MemoryModule
from wmkernels.nn.rotary_mamba import TURN
from wmkernels.place_memory.function import place_memory
from wmkernels.place_memory.reference import turned

DEPENDENT = 1e-3  # of a Gram matrix's largest eigenvalue: below it, float32 cannot tell keys from dependent ones
SOFTEST = 1e-2  # added to the squared length of a mean direction, which bounds the gradient of its angle


class PlaceMemory(MemoryModule):
    """Remembers what was seen at places, as features read back wherever they come into view.

    Each step writes ``values`` at the offsets around the observer, then moves, and reads the offsets around the new
    position: the output predicts the next view. It has no parameters, and its state dict is empty.

    On a complete lattice, n writes elsewhere move a float32 read-out by at most 8 * 2**-23 * sqrt(n + r) times the
    largest value, where the map has r rows.

    Args:
        channels: features per place.
        offsets: (places, dims), positions of the view relative to the observer.
        frequencies: (frequencies, dims), radians per position; see ``lattice``.
        velocities: (groups, dims), positions per step: the channels are divided among groups, each of which drifts.
        write: "delta" replaces what a place holds, "sum" adds to it.
        moves: (moves, dims), the candidate displacements of ``weights``.
        ridge: added to the Gram matrix of the view's keys before it is inverted; at least 1e-3 of its largest
            eigenvalue where the smallest is below that: keys of a view with more places than rows of the map, or of
            places that nearly coincide, share what is written to them.
        backend: as for ``selective_scan``.
        device, dtype: of the keys; the state's map is at least float32, its angle float64.

    Example:
        >>> import torch, wmkernels
        >>> memory = wmkernels.nn.PlaceMemory(16, [[0, 0], [0, 1]], wmkernels.nn.lattice(15))
        >>> values, moved = torch.randn(4, 10, 2, 16), torch.zeros(4, 10, 2)
        >>> read, state = memory(values, moved)
        >>> {name: tuple(value.shape) for name, value in state.items()}
        {'map': (4, 1, 226, 16), 'angle': (4, 1, 113)}
    """

    frequencies: Tensor
    amplitude: Tensor
    drift: Tensor
    keys: Tensor
    inverse: Tensor

    @checked
    def __init__(
        self,
        channels: int,
        offsets: Any,
        frequencies: Any,
        velocities: Any = None,
        write: Literal["delta", "sum"] = "delta",
        *,
        moves: Any = None,
        ridge: float = 1e-6,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        w = _positions("frequencies", frequencies)
        dims = w.shape[1]
        offsets = _positions("offsets", offsets, dims)
        drift = _positions("velocities", [[0.0] * dims] if velocities is None else velocities, dims)
        if channels % len(drift):
            raise ValueError(f"PlaceMemory: channels is {channels}, expected a multiple of the {len(drift)} velocities")
        if not ridge >= 0:
            raise ValueError(f"PlaceMemory: ridge is {ridge}, expected at least 0")
        self.channels, self.groups, self.write_rule, self.ridge = channels, len(drift), write, ridge
        self.backend = backend
        conjugate = ((w / math.pi).round() * math.pi - w).abs().amax(1) < 1e-9  # w = -w on whole positions: no sine
        weight = 2 - conjugate.double()
        amplitude = (weight / weight.sum()).sqrt()
        keys = _keys(offsets, w, amplitude)
        exact = {"frequencies": w, "amplitude": amplitude, "drift": drift @ w.t()}
        if moves is not None:
            exact["move_angles"] = _positions("moves", moves, dims) @ w.t()
        exact |= {"keys": keys, "inverse": self._inverse(keys)}
        self._drifts = bool(drift.any())
        self._exact = exact  # float64 on the CPU, whatever the module's device and dtype
        device = torch.empty(0).device if device is None else device
        kind = state_dtype(torch.get_default_dtype() if dtype is None else dtype)
        for name, value in exact.items():
            followed = kind if name in ("keys", "inverse") else value.dtype
            self.register_buffer(name, value.to(device, followed), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves devices; only keys follow a dtype, and never below float32."""
        super()._apply(fn, recurse)
        kind = state_dtype(self.keys.dtype)
        for name, value in self._exact.items():
            found = self._buffers[name]
            assert found is not None
            if not found.is_meta:
                self._buffers[name] = value.to(found.device, kind if name in ("keys", "inverse") else value.dtype)
        return self

    def _kept(self, name: str, dtype: torch.dtype) -> Tensor:
        """A buffer of keys, rounded once, from float64."""
        buffer: Tensor = getattr(self, name)
        return buffer if buffer.dtype == dtype else self._exact[name].to(buffer.device, dtype)

    def extra_repr(self) -> str:
        places, rows = self.keys.shape
        return f"{self.channels}, places={places}, frequencies={rows // 2}, groups={self.groups}, {self.write_rule}"

    def init_state(self, batch_size: int) -> State:
        """``"map"`` (batch, groups, 2 frequencies, channels / groups), ``"angle"`` (batch, groups, frequencies)."""
        require_size("PlaceMemory", "batch_size", batch_size)
        shapes = self._state_shapes(batch_size)
        like = self.keys
        return {
            "map": torch.zeros(shapes["map"], device=like.device, dtype=like.dtype),
            "angle": torch.zeros(shapes["angle"], device=like.device, dtype=torch.float64),
        }

    def _state_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        frequencies = len(self.frequencies)
        return {
            "map": (rows, self.groups, 2 * frequencies, self.channels // self.groups),
            "angle": (rows, self.groups, frequencies),
        }

    def forward(
        self,
        values: Tensor,
        displacement: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        gate: Tensor | None = None,
        elapsed: Tensor | None = None,
        ahead: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Writes each step's view, moves, and reads the view after the move.

        Args:
            values: (batch, time, places, channels).
            displacement: (batch, time, dims), positions; without it and ``weights`` the observer stays.
            state: of ``init_state`` or of the last call; None: an empty map.
            reset: bool (batch, time), true at a sequence's first step: empties the map before it.
            weights: (batch, time, moves) over the candidate ``moves``, instead of ``displacement``: the angle advances
                by the direction of the weighted mean of the moves' directions.
            gate: (batch, time, places) or (batch, time, places, groups), 0 to 1, what part of a write is done.
            elapsed: (batch, time), in steps, how long groups drift; 1 by default.
            ahead: (batch, time, dims), where each step reads, from its position before the move, if that is not where
                it moves: a prediction reads where a step is expected to lead, before it is known where it led.

        Returns:
            (batch, time, places, channels) and the state.

        Raises:
            ValueError: a wrong shape or device; both ``displacement`` and ``weights``.
            TypeError: a wrong dtype.
        """
        require_inputs("PlaceMemory", "values", values, ("batch", "time", "places", "channels"), self.channels)
        batch, time = values.shape[:2]
        require_shape(
            "PlaceMemory",
            "values",
            values,
            ("batch", "time", "places", "channels"),
            (batch, time, len(self.keys), self.channels),
            "offsets",
        )
        if state is None:
            state = self.init_state(batch)
        else:
            require_state("PlaceMemory", state, self._state_shapes(batch), values)
        require_reset("PlaceMemory", reset, ("batch", "time"), (batch, time), values, "values")
        kind = state_dtype(values.dtype)
        turn = self._turn(values, displacement, weights, elapsed)
        angle, last = linear_scan(
            turn.new_ones(()).expand_as(turn),
            turn,
            state["angle"].double(),
            reset=reset,
            channel_last=True,
            return_last_state=True,
        )
        phase, gates = _phase(angle, kind), self._gates(values, gate)
        if ahead is not None:
            # A second step per step, which writes nothing: the first reads ahead, the second moves on.
            reading = _phase(angle - turn + self._turn(values, ahead, None, elapsed, "ahead"), kind)
            phase = _interleaved(reading, phase)
            gates = values.new_ones((*values.shape[:3], self.groups), dtype=kind) if gates is None else gates
            gates = _interleaved(gates, torch.zeros_like(gates))
            values = _interleaved(values, torch.zeros_like(values))
            reset = None if reset is None else _interleaved(reset, torch.zeros_like(reset))
        read, h = place_memory(
            values,
            phase,
            self._kept("keys", kind),
            self._kept("inverse", kind) if self.write_rule == "delta" else None,
            gates,
            initial_state=state["map"].to(kind),
            initial_phase=_phase(state["angle"], kind),
            reset=reset,
            return_last_state=True,
            backend=self.backend,
        )
        if ahead is not None:
            read = read[:, ::2]
        return read, {"map": h, "angle": last.remainder(TURN)}

    def step(
        self,
        values: Tensor,
        displacement: Tensor | None = None,
        state: Mapping[str, Tensor] | None = None,
        reset: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        gate: Tensor | None = None,
        elapsed: Tensor | None = None,
        ahead: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """``forward`` of one step, arguments and read-out without time."""
        given: dict[str, Any] = {"values": values, "displacement": displacement, "reset": reset}
        given |= {"weights": weights, "gate": gate, "elapsed": elapsed, "ahead": ahead}
        timed = {}
        for name, x in given.items():
            if x is None and name != "values":
                continue
            require_tensor("PlaceMemory", name, x)
            if not x.dim():
                raise ValueError(f"PlaceMemory: {name} has shape (), expected (batch, ...)")
            timed[name] = x[:, None]
        read, after = self(state=state, **timed)
        return read[:, 0], after

    def move(self, state: Mapping[str, Tensor], displacement: Tensor, elapsed: float = 0) -> State:
        """The state after a move by ``displacement`` (batch, dims) and ``elapsed`` steps of drift, without a write."""
        dims = self.frequencies.shape[1]
        _require("displacement", displacement, ("batch", "dims"), (self._rows(state), dims), self.frequencies, "state")
        if isinstance(elapsed, bool) or not isinstance(elapsed, int | float):
            raise TypeError(f"PlaceMemory: elapsed is {shown(elapsed)}, expected a number")
        if not math.isfinite(elapsed):
            raise ValueError(f"PlaceMemory: elapsed is {elapsed}, expected a finite number")
        turn = (displacement.double() @ self.frequencies.t())[:, None] - self.drift * elapsed
        return {**state, "angle": (state["angle"] + turn).remainder(TURN)}

    def read(self, state: Mapping[str, Tensor], offsets: Any) -> Tensor:
        """What the map holds at ``offsets`` (places, dims) or (batch, places, dims) from the present position.

        Returns:
            (batch, places, channels), of the map's dtype.
        """
        h, _, keys = self._at(state, offsets)
        with no_autocast(h.device):
            return (keys @ h).transpose(1, 2).flatten(-2)

    def write(self, state: Mapping[str, Tensor], offsets: Any, values: Tensor, gate: Tensor | None = None) -> State:
        """The state with ``values`` (batch, places, channels) written at ``offsets``, as in ``read``.

        ``gate`` is (batch, places) or (batch, places, groups).
        """
        h, still, keys = self._at(state, offsets)  # (batch, groups, places, 2 frequencies)
        sizes = (len(h), keys.shape[2], self.channels)
        _require("values", values, ("batch", "places", "channels"), sizes, h, "state and offsets")
        gates = self._gates(values, gate)
        written = values.to(h.dtype).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        with no_autocast(h.device):
            if self.write_rule == "delta":
                written = written - keys @ h
            if gates is not None:
                written = written * gates.mT[..., None]
            if self.write_rule == "delta":
                written = self._inverse(still).to(h) @ written
            return {**state, "map": h + keys.mT @ written}

    def _at(self, state: Mapping[str, Tensor], offsets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The map, and the keys of ``offsets`` at angle zero and at the present angle."""
        rows, h = self._rows(state), state["map"]
        offsets = _positions("offsets", offsets, self.frequencies.shape[1], self.frequencies.device, rows)
        keys = _keys(offsets, self.frequencies, self.amplitude)
        if keys.dim() == 3:
            keys = keys[:, None]
        return h, keys, turned(keys.to(h.dtype), _phase(state["angle"], h.dtype))

    def _rows(self, state: Mapping[str, Tensor]) -> int:
        """Of a state that fits the module."""
        held = state.get("map") if isinstance(state, Mapping) else None
        rows = len(held) if isinstance(held, Tensor) and held.dim() else 0
        require_state("PlaceMemory", state, self._state_shapes(rows), self.frequencies)
        return rows

    def _inverse(self, keys: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(keys @ keys.mT)  # ascending
        floor = DEPENDENT * values[..., -1:]
        ridge = torch.where(values[..., :1] < floor, floor.clamp(min=self.ridge), self.ridge)
        return vectors / (values + ridge)[..., None, :] @ vectors.mT

    def _gates(self, values: Tensor, gate: Tensor | None) -> Tensor | None:
        """(..., places, groups)."""
        if gate is None:
            return None
        require_tensor("PlaceMemory", "gate", gate)
        require_float("PlaceMemory", "gate", gate, values, "values")
        sizes, labels = tuple(values.shape[:-1]), ("batch", "time", "places")[: values.dim() - 1]
        labels = (*labels[:-1], "places")
        if gate.dim() == values.dim():
            labels, sizes = (*labels, "groups"), (*sizes, self.groups)
        require_shape("PlaceMemory", "gate", gate, labels, sizes, "values")
        gate = gate.to(state_dtype(values.dtype))
        return gate if gate.dim() == values.dim() else gate[..., None].expand(*sizes, self.groups)

    def _turn(
        self,
        values: Tensor,
        displacement: Tensor | None,
        weights: Tensor | None,
        elapsed: Tensor | None,
        name: str = "displacement",
    ) -> Tensor:
        """Float64 angle increments (batch, time, groups, frequencies); ``name`` is that of ``displacement``."""
        batch, time = values.shape[:2]
        w = self.frequencies
        if displacement is not None and weights is not None:
            raise ValueError("PlaceMemory: displacement and weights are both given, expected one of them")
        if displacement is not None:
            _require(name, displacement, ("batch", "time", "dims"), (batch, time, w.shape[1]), values, "values")
            turn = displacement.double() @ w.t()
        elif weights is not None:
            turn = self._mean_turn(values, weights)
        else:
            turn = w.new_zeros((batch, time, len(w)))
        drift = self.drift
        if elapsed is not None:
            _require("elapsed", elapsed, ("batch", "time"), (batch, time), values, "values")
            drift = drift * elapsed.double()[..., None, None]
        elif not self._drifts:
            return turn[:, :, None]
        return turn[:, :, None] - drift

    def _mean_turn(self, values: Tensor, weights: Tensor) -> Tensor:
        """The angle of the weighted mean of exp(i angle), with a gradient bounded where the mean is short."""
        angles = self._buffers.get("move_angles")
        if angles is None:
            raise ValueError("PlaceMemory: weights were given, expected displacement; the argument moves makes weights")
        sizes = (*values.shape[:2], len(angles))
        _require("weights", weights, ("batch", "time", "moves"), sizes, values, "values and moves")
        weights = weights.double()
        cos, sin = weights @ angles.cos(), weights @ angles.sin()
        c, s = cos.detach(), sin.detach()
        return torch.atan2(s, c) + (c * sin - s * cos) / (c * c + s * s + SOFTEST)  # the second term is 0


def _keys(offsets: Tensor, frequencies: Tensor, amplitude: Tensor) -> Tensor:
    """(..., places, 2 frequencies), float64, at angle zero."""
    angle = offsets @ frequencies.t()
    return torch.cat([angle.cos() * amplitude, angle.sin() * amplitude], -1)


def _phase(angle: Tensor, dtype: torch.dtype) -> Tensor:
    """[cosines, sines] of float64 angles, wrapped to [-pi, pi] before they are rounded."""
    wrapped = (angle.detach() / TURN).round_().mul_(-TURN).add_(angle).to(dtype)  # in place: bound by memory bandwidth
    return torch.cat([wrapped.cos(), wrapped.sin()], -1)


def _interleaved(one: Tensor, other: Tensor) -> Tensor:
    """Along time."""
    return torch.stack([one, other], 2).flatten(1, 2)


def _require(
    name: str, value: Tensor, labels: tuple[str, ...], sizes: tuple[int, ...], like: Tensor, against: str
) -> None:
    """Expects a floating tensor of that shape, on the device of ``like``. Raises TypeError, ValueError."""
    require_tensor("PlaceMemory", name, value)
    require_dtype("PlaceMemory", name, value, FLOATS, f"({', '.join(labels)})")
    require_device("PlaceMemory", name, value, like.device, against)
    require_shape("PlaceMemory", name, value, labels, sizes, against)


def _positions(
    name: str, value: Any, dims: int | None = None, device: torch.device | str = "cpu", batch: int | None = None
) -> Tensor:
    """(rows, dims) or, where there is a batch, (batch, rows, dims), float64. Raises TypeError, ValueError."""
    labels = f"(rows, {'dims' if dims is None else f'dims={dims}'})"
    try:
        value = torch.as_tensor(value, device=device).detach()
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"PlaceMemory: {name} is {shown(value)}, expected numbers {labels}: {error}") from None
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"PlaceMemory: {name} has dtype {dtype_name(value.dtype)}, expected real numbers {labels}")
    value = value.double()
    shaped = value.dim() == 2 or (value.dim() == 3 and len(value) == batch)
    if not shaped or 0 in value.shape[-2:] or (dims is not None and value.shape[-1] != dims):
        also = "" if batch is None else f" or (batch={batch}, {labels[1:]}"
        raise ValueError(f"PlaceMemory: {name} has shape {tuple(value.shape)}, expected {labels}{also}")
    if can_read_values(value, on_gpu=True) and not value.isfinite().all():
        raise ValueError(f"PlaceMemory: {name} holds values that are not finite")
    return value
