"""How the Triton kernels of the selective scan divide their work: tiles of channels and segments of time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmkernels.selective_scan.meta import sequence_count
from wmkernels.triton_runtime import (
    ceil_div,
    power_of_two_at_least,
    power_of_two_factor,
    processors,
    segment_length,
    strides,
)

WARP = 32


@dataclass(frozen=True)
class Direction:
    """What fits the forward or the backward kernel, found from the compiled code.

    Attributes:
        elements: steps x states x channels that a thread holds at once: the most that stays in registers.
        warps: of a program.
        thread_channels: channels a thread; in the backward pass two, since sums over channels cost shuffles.
        enough: programs a multiprocessor below which sequences are cut into segments.
        wanted: programs a multiprocessor then.
    """

    elements: int
    warps: int
    thread_channels: int
    enough: float
    wanted: int


FORWARD = Direction(elements=32, warps=4, thread_channels=1, enough=1.5, wanted=6)
BACKWARD = Direction(elements=16, warps=1, thread_channels=2, enough=5, wanted=16)


def group_count(B: Tensor, C: Tensor) -> int:
    """Groups of B and C where either varies, else 1."""
    return next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)


def projection_strides(x: Tensor) -> tuple[int, ...]:
    """Of (batch, groups, state, time), or of (channels, state) with zeros after."""
    return strides(x, 4) if x.dim() == 4 else (*strides(x, 2), 0, 0)


@dataclass(frozen=True)
class Tiles:
    """The division of one call.

    Attributes:
        shape: the tile (T, NI, NL, D1, DL) of triton_device.py, and num_warps.
        time: steps of a row of the batch.
        sequences: initial states.
        segment: steps that a program walks.
        slots_each: segments a sequence, where not packed.
        slots: segments in all.
        whole: no sequence is cut.
    """

    shape: dict[str, int]
    channels: int
    state: int
    time: int
    sequences: int
    group_channels: int
    group_tiles: int
    tiles: int
    segment: int
    slots_each: int
    slots: int
    whole: bool

    @property
    def programs(self) -> int:
        """Programs of one pass."""
        return self.tiles * self.slots

    @property
    def sizes(self) -> tuple[int, ...]:
        """Scalar arguments of the kernels, in their order."""
        return (
            *(self.channels, self.state, self.time, self.sequences, self.group_channels, self.group_tiles),
            *(self.tiles, self.segment, self.slots_each),
        )

    @staticmethod
    def of(
        u: Tensor, state: int, groups: int, cu_seqlens: Tensor | None, chunk: int, segment: int, backward: bool
    ) -> "Tiles":
        """The division of a call with u (batch, channels, time); ``segment`` is 0 unless forced."""
        sequences = sequence_count(u, cu_seqlens)
        _, channels, time = u.shape
        group_channels = channels // groups
        shape = tile_shape(state, group_channels, chunk or segment, u.dtype == torch.float64, backward)
        group_tiles = ceil_div(group_channels, shape["D1"] * shape["DL"])
        tiles = groups * group_tiles
        rows = tiles * sequences
        granule = max(chunk, shape["T"])
        chip = processors(u.device)
        kind = BACKWARD if backward else FORWARD
        segment = segment or segment_length(time, rows, granule, int(kind.enough * chip), kind.wanted * chip)
        if segment >= time:
            # More than any sequence has, so that slots are sequences (csrc/include/wmkernels.h, Chunks).
            segment = (time // granule + 1) * granule
        slots_each = ceil_div(time, segment)
        slots = sequences * slots_each if cu_seqlens is None else time // segment + sequences
        whole = segment > time
        return Tiles(
            shape,
            channels,
            state,
            time,
            sequences,
            group_channels,
            group_tiles,
            tiles,
            segment,
            slots_each,
            slots,
            whole,
        )


def tile_shape(state: int, group_channels: int, granule: int, double: bool, backward: bool) -> dict[str, int]:
    """The tile of triton_device.py; its steps divide ``granule``, so that chunks and segments begin with a tile."""
    kind = BACKWARD if backward else FORWARD
    padded = power_of_two_at_least(state)
    NL = min(padded, max(4, min(WARP, padded // 4)))
    NI = padded // NL
    DL = min(WARP // NL, power_of_two_at_least(group_channels))
    # In the backward pass what a tile holds for each channel and step takes registers too where there are few states,
    # sums and addresses where there are many, and float64 takes two for one.
    large = backward and (double or padded > 16)
    halvings = double + (large or (backward and padded < 16)) + (backward and padded < 4)
    thread_channels = 1 if large else kind.thread_channels
    D1 = min(kind.warps * thread_channels, power_of_two_at_least(ceil_div(group_channels, DL)))
    warps = min(kind.warps, D1)
    elements = kind.elements >> halvings
    T = max(1, min(8, elements // (NI * (D1 // warps))))
    T = power_of_two_factor(granule, T) if granule else T
    return {"T": T, "NI": NI, "NL": NL, "D1": D1, "DL": DL, "num_warps": warps}
