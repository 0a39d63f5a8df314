"""How the Triton kernels of the selective scan divide their work: tiles of channels and segments of time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmkernels.selective_scan.outputs import sequence_count
from wmkernels.triton_runtime import ceil_div, power_of_two_at_least, power_of_two_factor, processors, segment_length, strides

WARP = 32

# Elements (steps x states) of a channel that a thread holds at once, and warps a program, by direction. Found from the
# compiled code: the most that stays in registers.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 32, 16
WARPS = 4
# Programs an SM below which sequences are cut, and those wanted then.
ENOUGH, WANTED = 1.5, 6


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
        segment = segment or segment_length(time, rows, granule, int(ENOUGH * chip), WANTED * chip)
        if segment >= time:
            # More than any sequence has, so that slots are sequences (csrc/wmkernels.h, Chunks).
            segment = (time // granule + 1) * granule
        slots_each = ceil_div(time, segment)
        slots = sequences * slots_each if cu_seqlens is None else time // segment + sequences
        whole = segment > time
        return Tiles(
            shape, channels, state, time, sequences, group_channels, group_tiles, tiles, segment, slots_each, slots, whole
        )


def tile_shape(state: int, group_channels: int, granule: int, double: bool, backward: bool) -> dict[str, int]:
    """The tile of triton_device.py; its steps divide ``granule``, so that chunks and segments begin with a tile."""
    padded = power_of_two_at_least(state)
    NL = min(padded, max(4, min(WARP, padded // 4)))
    NI = padded // NL
    DL = min(WARP // NL, max(1, power_of_two_at_least(group_channels)))
    D1 = min(WARPS, power_of_two_at_least(ceil_div(group_channels, DL)))
    elements = (BACKWARD_ELEMENTS if backward else FORWARD_ELEMENTS) // (2 if double else 1)
    T = power_of_two_factor(granule, max(1, min(16, elements // NI))) if granule else max(1, min(16, elements // NI))
    return {"T": T, "NI": NI, "NL": NL, "D1": D1, "DL": DL, "num_warps": D1}
