"""Many ConvLSTM steps in one CUDA kernel, for 16-bit maps of at most a few thousand positions.

All blocks are resident and keep their hidden weights in shared memory. Grid synchronisation has not run on a GPU, so it
needs ``WMKERNELS_PERSISTENT=1``, read at import.
"""

import os

import torch
from torch import Tensor

from wmkernels.checks import no_autocast
from wmkernels.conv_lstm.convolutions import Convolution, merged, rows
from wmkernels.conv_lstm.meta import ConvLSTMInputs, Sizes
from wmkernels.conv_lstm.per_step import HOISTED_BYTES, gate_bytes, parameters_of, steps_per_chunk
from wmkernels.native_call import DTYPE_CODES, Members, run
from wmkernels.triton_runtime import ceil_div, processors

OP = "conv_lstm_persistent"
ENABLED = os.environ.get("WMKERNELS_PERSISTENT") == "1"
CHANNELS = 16  # per block
SHARED_BYTES = 160 << 10  # per block, from sm_80
SMALL_SHARED_BYTES = 99 << 10


def tiles_of(weight_hh: Tensor, sizes: Sizes) -> int:
    """Tiles of 16 positions per block; 0 if the kernel cannot run or its blocks are not all resident."""
    hidden, taps = sizes.hidden, weight_hh.shape[2] * weight_hh.shape[3]
    if weight_hh.dtype not in (torch.bfloat16, torch.float16) or hidden % CHANNELS:
        return 0
    if taps * hidden * 4 * CHANNELS * 2 > _shared_bytes(weight_hh.device):
        return 0
    positions = sizes.batch * sizes.height * sizes.width
    resident = processors(weight_hh.device) // (hidden // CHANNELS)
    return next((tiles for tiles in (1, 2) if ceil_div(positions, 16 * tiles) <= resident), 0)


def _shared_bytes(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 6), (8, 9), (12, 0)):
        return SMALL_SHARED_BYTES
    return SHARED_BYTES


def pack_weight(weight_hh: Tensor) -> Tensor:
    """Weights in the threads' tensor-core read order."""
    hidden, taps = weight_hh.shape[1], weight_hh.shape[2] * weight_hh.shape[3]
    weight = weight_hh.reshape(2, 2, hidden // CHANNELS, 4, 4, hidden // 16, 2, 4, 2, taps)
    high, low, part, warp, channel, block, half, pair, row, tap = range(10)
    return weight.permute(part, tap, block, warp, channel, low, pair, high, half, row).reshape(-1)


def forward(tiles: int, inputs: ConvLSTMInputs, outputs: tuple[Tensor, ...]) -> None:
    """Fills the forward outputs."""
    out, hn, cn, cells, gates = outputs
    x, weight_hh, h, c, reset = inputs.x, inputs.weight_hh, inputs.h, inputs.c, inputs.reset
    sizes = time, batch, hidden, height, width = inputs.sizes
    of_input, parameters = Convolution(inputs.weight_ih, *inputs[8:]), parameters_of(inputs.bias, inputs.peephole)
    count, dtype, peephole = batch * height * width, x.dtype, parameters.peephole
    every, running = rows(out).view(time, count, hidden), rows(cn).view(count, hidden)
    wide, narrow = torch.float32, (count, hidden)
    weights = pack_weight(weight_hh)
    h_prev = None if h is None else rows(h).view(narrow)
    if h_prev is not None and h_prev.storage_offset() % 2:
        h_prev = h_prev.clone()  # the kernel reads pairs
    c_prev = None if c is None else rows(c).view(narrow)
    chunk_steps = steps_per_chunk(time, gate_bytes(sizes, dtype), HOISTED_BYTES)
    barrier_counter = torch.zeros((ceil_div(time, chunk_steps), 1), dtype=torch.int32, device=x.device)
    for number, begin in enumerate(range(0, time, chunk_steps)):
        end = min(begin + chunk_steps, time)
        with no_autocast(x.device):
            gates_x = of_input(merged(x[begin:end])).view(end - begin, count, 4 * hidden)
        flags = None if reset is None else reset[begin:end]
        peephole_positions = 1 if peephole is None else peephole.shape[1]
        members: Members = {
            "time": end - begin,
            "batch": batch,
            "height": height,
            "width": width,
            "hidden": hidden,
            "hh_height": weight_hh.shape[2],
            "hh_width": weight_hh.shape[3],
            "peephole_varies": int(peephole_positions != 1),
            "dtype": DTYPE_CODES[dtype],
            "tiles": tiles,
            "gates_x": (gates_x, gates_x.shape, dtype),
            "weights": (weights, weights.shape, dtype),
            "bias": (parameters.bias, (4 * hidden,), wide),
            "peephole": (peephole, (3, peephole_positions, hidden), wide),
            "h0": (h_prev, narrow, dtype),
            "c0": (c_prev, narrow, wide),
            "reset": (flags, (end - begin, batch), torch.bool),
            "barrier_counter": (barrier_counter[number], (1,), torch.int32),
            "out": (every[begin:end], (end - begin, *narrow), dtype),
            "cn": (running, narrow, wide),
        }
        if cells.numel():
            members["cells"] = (cells.view(time, *narrow)[begin:end], (end - begin, *narrow), wide)
        if gates.numel():
            members["gates"] = (gates.view(time, count, 4 * hidden)[begin:end], (end - begin, count, 4 * hidden), wide)
        run(OP, members, x.device)
        h_prev, c_prev = every[end - 1], running
    hn.copy_(out[-1])
