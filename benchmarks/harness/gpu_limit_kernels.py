"""Triton kernels of arithmetic on registers: eight independent values per thread, 16 operations per round."""

import triton
import triton.language as tl

BLOCK: int = 2048


@triton.jit
def multiply_add_kernel(  # type: ignore[no-untyped-def]
    out, factor, addend, rounds, SIZE: tl.constexpr = 2048
):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.arange(0, SIZE).to(tl.float32)
    for _round in range(rounds):
        for _step in tl.static_range(16):
            value = value * factor + addend
    tl.store(out + offsets, value)


@triton.jit
def exponential_kernel(  # type: ignore[no-untyped-def]
    out, start, rounds, SIZE: tl.constexpr = 2048
):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = start + tl.arange(0, SIZE).to(tl.float32) * 1e-4
    for _round in range(rounds):
        for _step in tl.static_range(16):
            # Negation is free; values converge to about 0.64.
            value = tl.inline_asm_elementwise(
                "{ .reg .f32 minus; neg.f32 minus, $1; ex2.approx.ftz.f32 $0, minus; }",
                "=f,f",
                [value],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    tl.store(out + offsets, value)
