"""Launches the Triton backward pass and reduces its partials."""

# mypy: ignore-errors
import torch
import triton
import triton.language as tl
from torch import Tensor

from wmkernels import triton_runtime as runtime
from wmkernels.selective_scan.meta import ScanInputs, backward_outputs
from wmkernels.selective_scan.triton_backward import backward_kernel
from wmkernels.selective_scan.triton_segments import pass_state, segment_gradient_kernel
from wmkernels.selective_scan.triton_tiles import Tiles, projection_strides

SUM_ROWS = 64


@triton.jit
def reduce_partials_kernel(
    partials,  # (count, rows, columns), contiguous
    total,  # (batch, groups, columns, time)
    total_strides,
    count,
    rows,
    columns,
    groups,
    time,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    pointers = partials + row * columns + column
    step = tl.full((), columns, tl.int64) * rows
    result = tl.zeros([ROWS, COLUMNS], partials.dtype.element_ty)
    for _ in range(count):
        result += tl.load(pointers, mask=inside, other=0.0)
        pointers += step
    b, g, t = row // time // groups, row // time % groups, row % time
    offsets = b * total_strides[0] + g * total_strides[1] + column * total_strides[2] + t * total_strides[3]
    tl.store(total + offsets, result.to(total.dtype.element_ty), mask=inside)


def reduce_partials(partials: Tensor, total: Tensor) -> None:
    """(tiles, batch, groups, time, state) -> (batch, groups, state, time)."""
    count, batch, groups, time, state = partials.shape
    columns = runtime.next_power_of_2(state)
    rows = max(1, 4 * SUM_ROWS // columns)
    runtime.launch(
        reduce_partials_kernel,
        runtime.ceil_div(batch * groups * time, rows),
        partials,
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
    inputs: ScanInputs,
    chunk_states: Tensor,
    chunk: int,
    *,
    segment_length: int = 0,
) -> tuple[Tensor, ...]:
    """``segment_length``, a multiple of the chunk, forces a cut."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, reset, cu_seqlens, delta_softplus, _ = inputs
    gradients = backward_outputs(inputs)
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial = gradients
    reset = runtime.as_bytes(reset)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    chunk_states = chunk_states.contiguous()
    batch, channels, time = u.shape
    state = A.shape[1]
    tiles = Tiles.of(inputs, chunk, segment_length, backward=True)
    shape = tiles.shape

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=A.dtype, device=A.device)

    def partials_of(x: Tensor) -> Tensor:
        if x.dim() == 4:
            return empty(tiles.group_tiles, batch, x.shape[1], time, state)
        return empty(tiles.segments, channels, state)

    A_partials, B_partials, C_partials = empty(tiles.segments, channels, state), partials_of(B), partials_of(C)
    D_partials = None if D is None else empty(tiles.segments, channels)
    bias_partials = None if delta_bias is None else empty(tiles.segments, channels)
    tile_states = shape["NI"] * shape["D1"] * shape["NL"] * shape["DL"]
    scratch = empty(tiles.programs, chunk // shape["T"], tile_states)

    with runtime.on_device(u):
        incoming = grad_last_state
        if not tiles.whole:
            segment_dh, decays = empty(tiles.segments, channels, state), empty(tiles.segments, channels, state)
            runtime.launch(
                segment_gradient_kernel,
                tiles.programs,
                *(delta, A, C, z, delta_bias, reset, cu_seqlens, grad_out, segment_dh, decays),
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
            incoming = pass_state(grad_last_state, segment_dh, decays, cu_seqlens, tiles, reverse=True)
        runtime.launch(
            backward_kernel,
            tiles.programs,
            *(u, delta, A, B, C, D, z, delta_bias, reset, cu_seqlens, chunk_states, grad_out, incoming, scratch),
            grad_u,
            grad_delta,
            None if z is None else grad_z,
            *(A_partials, B_partials, C_partials, D_partials, bias_partials),
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
            runtime.strides(incoming, 3),
            runtime.strides(grad_u, 3),
            batch,
            *tiles.sizes,
            chunk,
            SOFTPLUS=delta_softplus,
            B_VARIES=B.dim() == 4,
            C_VARIES=C.dim() == 4,
            INCOMING_PER_SEGMENT=not tiles.whole,
            **shape,
        )
        totals = (grad_A, grad_B, grad_C, grad_D, grad_bias)
        for total, partials in zip(
            totals, (A_partials, B_partials, C_partials, D_partials, bias_partials), strict=True
        ):
            if partials is None:
                continue
            if partials.dim() == 5:
                reduce_partials(partials, total)
            else:
                torch.sum(partials, 0, out=total)
    return gradients
