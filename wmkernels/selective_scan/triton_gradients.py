"""Launches the selective scan's backward pass in Triton, and adds up its partial results."""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.selective_scan.meta import backward_outputs
from wmkernels.selective_scan.triton_backward import backward_kernel
from wmkernels.selective_scan.triton_segments import chain, outflow_kernel
from wmkernels.selective_scan.triton_tiles import Tiles, group_count, projection_strides

SUM_ROWS = 64


@triton.jit
def sum_parts_kernel(
    parts,  # (count, rows, columns), contiguous
    total,  # (batch, groups, columns, time) where rows is batch x groups x time
    total_strides,
    count,
    rows,
    columns,
    groups,
    time,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum over the parts, in order, in the dtype of the total."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    place = parts + row * columns + column
    step = tl.full((), columns, tl.int64) * rows
    result = tl.zeros([ROWS, COLUMNS], parts.dtype.element_ty)
    for _ in range(count):
        result += tl.load(place, mask=inside, other=0.0)
        place += step
    b, g, t = row // time // groups, row // time % groups, row % time
    offsets = b * total_strides[0] + g * total_strides[1] + column * total_strides[2] + t * total_strides[3]
    tl.store(total + offsets, result.to(total.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, total: Tensor) -> None:
    """Adds the parts of dB or dC (tiles, batch, groups, time, state) up into (batch, groups, state, time)."""
    count, batch, groups, time, state = parts.shape
    columns = runtime.power_of_two_at_least(state)
    rows = max(1, 4 * SUM_ROWS // columns)
    runtime.launch(
        sum_parts_kernel,
        runtime.ceil_div(batch * groups * time, rows),
        parts,
        total,
        runtime.strides(total, 4),
        count,
        batch * groups * time,
        state,
        groups,
        time,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=2,
    )


def backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    delta_softplus: bool,
    channel_last: bool,
    chunk: int,
    *,
    segment: int = 0,
) -> tuple[Tensor, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state).

    ``segment`` forces a cut into segments of that many steps, a multiple of the chunk.
    """
    gradients = backward_outputs(u, A, B, C, D, z, delta_bias, initial_state, channel_last)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial = gradients
    reset = runtime.as_bytes(reset)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    chunk_states = chunk_states.contiguous()
    batch, channels, time = u.shape
    state = A.shape[1]
    tiles = Tiles.of(u, state, group_count(B, C), cu_seqlens, chunk, segment, backward=True)
    shape = tiles.shape

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=A.dtype, device=A.device)

    def parts_of(x: Tensor) -> Tensor:
        if x.dim() == 4:
            return empty(tiles.group_tiles, batch, x.shape[1], time, state)
        return empty(tiles.slots, channels, state)

    A_parts, B_parts, C_parts = empty(tiles.slots, channels, state), parts_of(B), parts_of(C)
    D_parts = None if D is None else empty(tiles.slots, channels)
    bias_parts = None if delta_bias is None else empty(tiles.slots, channels)
    tile_states = shape["NI"] * shape["D1"] * shape["NL"] * shape["DL"]
    scratch = empty(tiles.programs, chunk // shape["T"], tile_states)

    with runtime.on_device(u):
        entering = grad_last_state
        if not tiles.whole:
            flows, decays = empty(tiles.slots, channels, state), empty(tiles.slots, channels, state)
            runtime.launch(
                outflow_kernel,
                tiles.programs,
                *(delta, A, C, z, delta_bias, reset, cu_seqlens, grad_out, flows, decays),
                runtime.strides(delta, 3),
                runtime.strides(A, 2),
                projection_strides(C),
                runtime.strides(z, 3),
                *runtime.strides(delta_bias, 1),
                runtime.strides(reset, 2),
                runtime.strides(grad_out, 3),
                *tiles.sizes,
                SOFTPLUS=delta_softplus,
                C_VARIES=C.dim() == 4,
                **shape,
            )
            entering = chain(grad_last_state, flows, decays, cu_seqlens, tiles, reverse=True)
        runtime.launch(
            backward_kernel,
            tiles.programs,
            *(u, delta, A, B, C, D, z, delta_bias, reset, cu_seqlens, chunk_states, grad_out, entering, scratch),
            grad_u,
            grad_delta,
            None if z is None else grad_z,
            *(A_parts, B_parts, C_parts, D_parts, bias_parts),
            None if initial_state is None else grad_initial,
            runtime.strides(u, 3),
            runtime.strides(delta, 3),
            runtime.strides(A, 2),
            projection_strides(B),
            projection_strides(C),
            *runtime.strides(D, 1),
            runtime.strides(z, 3),
            *runtime.strides(delta_bias, 1),
            runtime.strides(reset, 2),
            runtime.strides(grad_out, 3),
            runtime.strides(entering, 3),
            runtime.strides(grad_u, 3),
            batch,
            *tiles.sizes,
            chunk,
            SOFTPLUS=delta_softplus,
            B_VARIES=B.dim() == 4,
            C_VARIES=C.dim() == 4,
            ENTERING_BY_SLOT=not tiles.whole,
            **shape,
        )
        totals = (grad_A, grad_B, grad_C, grad_D, grad_bias)
        for total, parts in zip(totals, (A_parts, B_parts, C_parts, D_parts, bias_parts), strict=True):
            if parts is None:
                continue
            if parts.dim() == 5:
                sum_parts(parts, total)
            else:
                torch.sum(parts, 0, out=total)
    return gradients
