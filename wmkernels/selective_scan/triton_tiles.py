"""Tiles and segments of the Triton scan."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmkernels.selective_scan.meta import ScanInputs
from wmkernels.triton_runtime import (
    ceil_div,
    choose_segment_length,
    next_power_of_2,
    power_of_two_factor,
    processors,
    strides,
)

WARP = 32


@dataclass(frozen=True)
class Direction:
    """Tile limits, chosen from the compiled code's registers.

    Attributes:
        elements: maximum steps x states x channels per thread.
        warps: per program.
        thread_channels: per thread; two halve backward's shuffles.
        min_programs: per multiprocessor; below it sequences are cut.
        target_programs: per multiprocessor when cut.
    """

    elements: int
    warps: int
    thread_channels: int
    min_programs: float
    target_programs: int


FORWARD = Direction(elements=32, warps=4, thread_channels=1, min_programs=1.5, target_programs=6)
BACKWARD = Direction(elements=16, warps=1, thread_channels=2, min_programs=5, target_programs=16)


def projection_strides(x: Tensor) -> tuple[int, ...]:
    """Four strides of B or C."""
    return strides(x, 4) if x.dim() == 4 else (*strides(x, 2), 0, 0)


@dataclass(frozen=True)
class Tiles:
    """Partition of a call; ``shape`` as in triton_device.py, ``whole`` if nothing is cut."""

    shape: dict[str, int]
    channels: int
    state: int
    time: int
    sequences: int
    group_channels: int
    group_tiles: int
    tiles: int
    segment_length: int
    segments_per_sequence: int
    segments: int
    whole: bool

    @property
    def programs(self) -> int:
        """Per pass."""
        return self.tiles * self.segments

    @property
    def sizes(self) -> tuple[int, ...]:
        """Scalar kernel arguments."""
        return (
            *(self.channels, self.state, self.time, self.sequences, self.group_channels, self.group_tiles),
            *(self.tiles, self.segment_length, self.segments_per_sequence),
        )

    @staticmethod
    def of(inputs: ScanInputs, chunk: int, segment_length: int, backward: bool) -> "Tiles":
        """Nonzero ``segment_length`` is forced."""
        u, state, groups, sequences = inputs.u, inputs.A.shape[1], inputs.groups, inputs.sequences
        _, channels, time = u.shape
        group_channels = channels // groups
        shape = tile_shape(state, group_channels, chunk or segment_length, u.dtype == torch.float64, backward)
        group_tiles = ceil_div(group_channels, shape["D1"] * shape["DL"])
        tiles = groups * group_tiles
        rows = tiles * sequences
        granule = max(chunk, shape["T"])
        chip = processors(u.device)
        kind = BACKWARD if backward else FORWARD
        segment_length = segment_length or choose_segment_length(
            time, rows, granule, int(kind.min_programs * chip), kind.target_programs * chip
        )
        if segment_length >= time:
            # Above every sequence's length, so that packed sequences too have one segment each.
            segment_length = (time // granule + 1) * granule
        segments_per_sequence = ceil_div(time, segment_length)
        segments = (
            sequences * segments_per_sequence if inputs.cu_seqlens is None else time // segment_length + sequences
        )
        whole = segment_length > time
        return Tiles(
            shape,
            channels,
            state,
            time,
            sequences,
            group_channels,
            group_tiles,
            tiles,
            segment_length,
            segments_per_sequence,
            segments,
            whole,
        )


def tile_shape(state: int, group_channels: int, granule: int, double: bool, backward: bool) -> dict[str, int]:
    """Steps T divide ``granule``."""
    kind = BACKWARD if backward else FORWARD
    padded = next_power_of_2(state)
    NL = min(padded, max(4, min(WARP, padded // 4)))
    NI = padded // NL
    DL = min(WARP // NL, next_power_of_2(group_channels))
    # Backward, per-channel values take registers with few states, sums and addresses with many; a float64 takes two.
    large = backward and (double or padded > 16)
    halvings = double + (large or (backward and padded < 16)) + (backward and padded < 4)
    thread_channels = 1 if large else kind.thread_channels
    D1 = min(kind.warps * thread_channels, next_power_of_2(ceil_div(group_channels, DL)))
    warps = min(kind.warps, D1)
    elements = kind.elements >> halvings
    T = max(1, min(8, elements // (NI * (D1 // warps))))
    T = power_of_two_factor(granule, T) if granule else T
    return {"T": T, "NI": NI, "NL": NL, "D1": D1, "DL": DL, "num_warps": warps}
