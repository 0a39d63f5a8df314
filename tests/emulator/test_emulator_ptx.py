import numpy as np
import pytest
import torch

from emulator.ptx import launch, translate
from emulator.ptx_block import Fault, Memory

KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1, .param .u32 kernel_param_2)
.reqntid 64
{
    .reg .pred %p<4>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r9, [kernel_param_2];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    mov.b32 %r2, global_smem;
    shl.b32 %r3, %r1, 2;
    add.s32 %r4, %r2, %r3;
BODY
    ret;
}
"""
COPY = "ld.global.b32 %r5, [%rd4+OFFSET]; st.global.b32 [%rd5], %r5;"
REVERSE = "ld.global.b32 %r5, [%rd4]; st.shared.b32 [%r4], %r5; BARRIER; sub.s32 %r6, 63, %r1; shl.b32 %r6, %r6, 2;"
REVERSE += "add.s32 %r6, %r2, %r6; ld.shared.b32 %r7, [%r6]; st.global.b32 [%rd5], %r7;"


def run(body: str, source: torch.Tensor, target: torch.Tensor, blocks: int = 1, number: int = 0) -> torch.Tensor:
    memory = Memory()
    memory.add("source", source)
    memory.add("target", target)
    words = [source.data_ptr(), target.data_ptr(), number]
    launch(translate(KERNEL.replace("BODY", body)), memory, blocks, 256, words)
    return target


def numbers(count: int = 64) -> torch.Tensor:
    return torch.randn(count)


def test_a_copy_copies():
    x = numbers()
    assert torch.equal(run(COPY.replace("OFFSET", "0"), x, torch.zeros(64)), x)


@pytest.mark.parametrize("offset", [-4, 4, 4000])
def test_a_load_outside_its_tensor(offset):
    with pytest.raises(Fault, match=r"kernel, block 0: .*(load|address).*\(ld.global.b32 %r5"):
        run(COPY.replace("OFFSET", str(offset)), numbers(), torch.zeros(64))


def test_a_load_between_the_elements_of_a_view():
    with pytest.raises(Fault, match="between the elements of the tensor"):
        run(COPY.replace("OFFSET", "0"), numbers(128)[::2], torch.zeros(64))


def test_a_guarded_load_touches_nothing():
    body = "setp.lt.u32 %p1, %r1, 32; mov.b32 %r5, 0; @%p1 ld.global.b32 %r5, [%rd4]; st.global.b32 [%rd5], %r5;"
    x = numbers(32)
    assert torch.equal(run(body, x, torch.ones(64)), torch.cat([x, torch.zeros(32)]))


def test_a_vector_must_be_aligned():
    body = "add.s64 %rd6, %rd1, 4; ld.global.v2.b32 {%r5, %r6}, [%rd6]; st.global.b32 [%rd5], %r5;"
    with pytest.raises(Fault, match="load of 8 bytes at 4 of source is not aligned"):
        run(body, numbers(), torch.zeros(64))


def test_shared_memory_and_a_barrier():
    x = numbers()
    assert torch.equal(run(REVERSE.replace("BARRIER", "bar.sync 0"), x, torch.zeros(64)), x.flip(0))


def test_a_missing_barrier():
    with pytest.raises(Fault, match="shared memory is read while another warp writes it"):
        run(REVERSE.replace("BARRIER", "bar.warp.sync -1"), numbers(), torch.zeros(64))


@pytest.mark.parametrize(
    "stores",
    [
        "shr.u32 %r5, %r1, 5; st.shared.b32 [%r2], %r5;",
        "setp.lt.u32 %p1, %r1, 32; mov.b32 %r5, 1; @%p1 st.shared.b32 [%r2], %r5; @!%p1 st.shared.b32 [%r2], %r1;",
    ],
    ids=["one instruction", "two instructions"],
)
def test_two_warps_write_one_place(stores):
    with pytest.raises(Fault, match="shared memory is written while another warp or block uses it"):
        run(stores, numbers(), torch.zeros(64))


def test_two_warps_may_write_equal_values():
    body = "st.shared.b32 [%r2], %r9; bar.sync 0; ld.shared.b32 %r5, [%r2]; st.global.b32 [%rd5], %r5;"
    result = run(body, numbers(), torch.zeros(64, dtype=torch.int32), number=7)
    assert result.tolist() == [7] * 64


def test_one_of_two_reading_warps_writes():
    body = """st.shared.b32 [%r4], %r1; bar.sync 0; ld.shared.b32 %r5, [%r2];
    setp.ge.u32 %p1, %r1, 32; @%p1 st.shared.b32 [%r2], %r9;"""
    with pytest.raises(Fault, match="shared memory is written while another warp or block uses it"):
        run(body, numbers(), torch.zeros(64))


def test_two_blocks_write_one_place():
    with pytest.raises(Fault, match="target is written while another warp or block uses it"):
        run(COPY.replace("OFFSET", "0"), numbers(), torch.zeros(64), blocks=2)


def test_a_register_that_nothing_wrote():
    with pytest.raises(Fault, match="register %r5 is read before it is written"):
        run("st.global.b32 [%rd5], %r5;", numbers(), torch.zeros(64))


def test_threads_part_and_meet_again():
    body = """setp.lt.u32 %p1, %r1, %r9; @%p1 bra $L1;
    mov.b32 %r5, 0f40000000; bra.uni $L2;
$L1:
    mov.b32 %r5, 0f3F800000;
$L2:
    bar.sync 0; st.global.b32 [%rd5], %r5;"""
    expected = torch.where(torch.arange(64) < 10, 1.0, 2.0)
    assert torch.equal(run(body, numbers(), torch.zeros(64), number=10), expected)


def test_a_barrier_that_some_do_not_reach():
    body = "setp.lt.u32 %p1, %r1, %r9; @%p1 bra $L1; bar.sync 0;\n$L1:\n    st.global.b32 [%rd5], %r1;"
    with pytest.raises(Fault, match="not all threads of the block reach a barrier"):
        run(body, numbers(), torch.zeros(64), number=10)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", [i ^ 1 for i in range(64)]),
        ("shfl.sync.up.b32 %r5, %r1, 3, 0, -1;", [i if i % 32 < 3 else i - 3 for i in range(64)]),
        ("shfl.sync.idx.b32 %r5, %r1, 5, 31, -1;", [i // 32 * 32 + 5 for i in range(64)]),
        ("redux.sync.max.s32 %r5, %r1, -1;", [i // 32 * 32 + 31 for i in range(64)]),
        ("bfe.u32 %r5, %r1, 2, 3;", [i >> 2 & 7 for i in range(64)]),
        ("sub.s32 %r6, %r1, 40; div.s32 %r5, %r6, 7;", [int((i - 40) / 7) for i in range(64)]),
        ("sub.s32 %r6, %r1, 40; shr.s32 %r5, %r6, 1;", [(i - 40) >> 1 for i in range(64)]),
        ("prmt.b32 %r5, %r1, 0, 0x4440U;", list(range(64))),
        ("mov.b64 %rd6, {%r1, %r9}; mov.b64 {%r6, %r5}, %rd6;", [10] * 64),
        ("cvt.rn.f32.s32 %r6, %r1; cvt.rzi.s32.f32 %r5, %r6;", list(range(64))),
    ],
)
def test_an_instruction(body, expected):
    result = run(f"{body} st.global.b32 [%rd5], %r5;", numbers(), torch.zeros(64, dtype=torch.int32), number=10)
    assert result.tolist() == expected


def test_rounding_to_16_bits_is_to_the_nearest():
    body = "ld.global.b32 %r5, [%rd4]; cvt.rn.bf16.f32 %rs1, %r5; cvt.f32.bf16 %r6, %rs1; st.global.b32 [%rd5], %r6;"
    x = numbers()
    assert torch.equal(run(body, x, torch.zeros(64)), x.bfloat16().float())


def test_matrices_come_back_from_shared_memory():
    body = """and.b32 %r5, %r1, 31; and.b32 %r6, %r1, 32; shl.b32 %r6, %r6, 3; shl.b32 %r7, %r5, 4;
    and.b32 %r7, %r7, 127; add.s32 %r7, %r7, %r2; shr.u32 %r6, %r6, 1; add.s32 %r7, %r7, %r6;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r1};
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r7]; st.global.b32 [%rd5], %r8;"""
    result = run(body, numbers(), torch.zeros(64, dtype=torch.int32))
    assert np.array_equal(result.numpy(), np.arange(64))


def test_an_instruction_it_does_not_know():
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence"):
        translate(KERNEL.replace("BODY", "wgmma.fence.sync.aligned;"))
