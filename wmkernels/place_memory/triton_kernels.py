"""Launches the place memory's Triton kernels."""

# mypy: ignore-errors
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.place_memory.meta import PlaceMemoryInputs, backward_outputs, forward_outputs
from wmkernels.place_memory.triton_backward import backward_kernel, states_kernel
from wmkernels.place_memory.triton_forward import forward_kernel

# steps between two saved states
STEPS = 16


PLACES, CHANNELS = 32, 16
# (frequencies of a block, warps), float64 and others: the largest that spill no registers
WIDE, NARROW = (16, 8), (32, 4)
KEY_WARPS = 8  # of the backward kernel with gradients of keys


class Launch(NamedTuple):
    """What all kernels of a call share."""

    tiles: int
    keys: Tensor
    mix: Tensor
    programs: int
    options: dict[str, object]

    def run(self, kernel: object, *arguments: object, sizes: tuple[int, ...], **options: object) -> None:
        runtime.launch(kernel, self.programs, *arguments, *sizes, **{**self.options, **options})


def _launch(inputs: PlaceMemoryInputs) -> Launch:
    sequences, groups, _, channels = inputs.state_shape
    keys, inverse = inputs.keys.contiguous(), inputs.inverse
    # In float64: rounded once, and never TF32.
    mix = keys if inverse is None else (inverse.double().mT @ keys.double()).to(keys.dtype)
    dtype = tl.float64 if keys.dtype == torch.float64 else tl.float32
    frequencies, warps = WIDE if keys.dtype == torch.float64 else NARROW
    blocks = {"FREQUENCIES": frequencies, "PLACES": PLACES, "CHANNELS": CHANNELS}
    tiles = runtime.ceil_div(channels, CHANNELS)
    return Launch(
        tiles, keys, mix, sequences * groups * tiles, {**blocks, "dtype": dtype, "num_warps": warps, "num_stages": 1}
    )


def _scratch(inputs: PlaceMemoryInputs, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=inputs.keys.dtype, device=inputs.keys.device)


def forward(inputs: PlaceMemoryInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As ``meta.forward_outputs``."""
    out, last_state, residual = forward_outputs(inputs, keep)
    values, phase, _, _, gate, initial_state, initial_phase, reset, cu_seqlens = inputs
    sequences, groups, rows, channels = inputs.state_shape
    reset, places = runtime.as_bytes(reset), values.shape[2]
    launch = _launch(inputs)
    with runtime.on_device(values):
        launch.run(
            forward_kernel,
            *(values, phase, launch.keys, launch.mix, gate, initial_state, initial_phase, reset, cu_seqlens),
            *(out, last_state, residual if residual.numel() else None),
            _scratch(inputs, sequences, groups, places, channels),
            runtime.strides(values, 4),
            runtime.strides(phase, 4),
            runtime.strides(gate, 4),
            runtime.strides(initial_state, 4),
            runtime.strides(initial_phase, 3),
            runtime.strides(reset, 2),
            sizes=(values.shape[1], places, rows // 2, channels, groups, launch.tiles),
            DELTA=inputs.inverse is not None,
        )
    return out, last_state, residual


def backward(
    grad_out: Tensor | None,
    grad_last_state: Tensor | None,
    inputs: PlaceMemoryInputs,
    residual: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    """As ``meta.backward_outputs``."""
    gradients = backward_outputs(inputs, *wanted)
    phase_gradient, key_gradient = wanted
    values, phase, _, inverse, gate, initial_state, initial_phase, reset, cu_seqlens = inputs
    batch, time, places, _ = values.shape
    sequences, groups, rows, channels = inputs.state_shape
    reset = runtime.as_bytes(reset)
    if inverse is None:
        residual = values
    launch = _launch(inputs)
    tiles = launch.tiles

    def partial(gradient: Tensor) -> Tensor | None:
        return _scratch(inputs, tiles, *gradient.shape) if gradient.numel() else None

    grad_phase, grad_gate, grad_initial_phase = (partial(gradients[i]) for i in (1, 4, 6))
    grad_state = gradients[5] if initial_state is not None else _scratch(inputs, *inputs.state_shape)
    views = _scratch(inputs, 2, sequences, groups, places, channels)
    states = work = key_sums = None
    if key_gradient:
        key_sums = _scratch(inputs, launch.programs, 2, places, rows).zero_()
    sizes = (time, places, rows // 2, channels, groups)
    with runtime.on_device(values):
        if phase_gradient or key_gradient:
            slots = time // STEPS + sequences if cu_seqlens is not None else batch * (time // STEPS + 1)
            states = _scratch(inputs, slots, groups, rows, channels)
            work = _scratch(inputs, sequences, groups, 2 * STEPS, rows, channels)
            launch.run(
                states_kernel,
                *(residual, phase, launch.mix, gate, initial_state, initial_phase, reset, cu_seqlens),
                *(states, work, views[0]),
                runtime.strides(residual, 4),
                runtime.strides(phase, 4),
                runtime.strides(gate, 4),
                runtime.strides(initial_state, 4),
                runtime.strides(initial_phase, 3),
                runtime.strides(reset, 2),
                sizes=(*sizes, tiles),
                STEPS=STEPS,
            )
        launch.run(
            backward_kernel,
            *(grad_out, grad_last_state, residual, phase, launch.keys, launch.mix, gate, initial_phase, reset),
            *(cu_seqlens, states, work, views[0], views[1]),
            *(gradients[0], grad_phase, grad_gate, grad_state, grad_initial_phase, key_sums),
            runtime.strides(grad_out, 4),
            runtime.strides(grad_last_state, 4),
            runtime.strides(residual, 4),
            runtime.strides(phase, 4),
            runtime.strides(gate, 4),
            runtime.strides(initial_phase, 3),
            runtime.strides(reset, 2),
            sizes=(batch, *sizes, sequences, tiles),
            DELTA=inverse is not None,
            STEPS=STEPS,
            **({"num_warps": KEY_WARPS} if key_gradient else {}),
        )
    for i, sums in ((1, grad_phase), (4, grad_gate), (6, grad_initial_phase)):
        if sums is not None:
            torch.sum(sums, 0, out=gradients[i])
    if key_sums is not None:
        grad_keys, grad_mix = key_sums.sum(0, dtype=torch.float64)
        if inverse is not None:
            gradients[3].copy_(launch.keys.double() @ grad_mix.mT)
            grad_mix = inverse.double() @ grad_mix
        gradients[2].copy_(grad_keys + grad_mix)
    return gradients
