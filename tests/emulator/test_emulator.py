"""The CUDA emulator finds each planted error."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emulator.build import build, find_compiler  # noqa: E402
from emulator.client import Emulator, EmulatorError  # noqa: E402

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

PLANTS = (
    "nothing",
    "missing barrier",
    "global out of bounds",
    "shared out of bounds",
    "uninitialised",
    "early exit",
    "two barriers",
    "absent lane",
    "foreign lane",
    "missing wait",
    "misaligned",
    "gap",
    "endless",
    "narrow offset",
    "too much shared",
)
PLANT = {name: number for number, name in enumerate(PLANTS)}
SEEDS = range(8)
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux constant, in mmap from Python 3.13


@pytest.fixture(scope="module", params=["", "-DCUDA_EMULATOR_UCONTEXT"], ids=["switch", "ucontext"])
def sample_kernels(request):
    emulator = Emulator(
        build("sample_kernels", [ROOT / "emulator" / "sample_kernels.cu"], [request.param] if request.param else [])
    )
    yield emulator
    emulator.close()


def reverse(sample_kernels, numbers, plant="nothing", seed=0):
    result = numbers.clone()
    words = [result, result.numel(), result.stride(0), int(result.dtype == torch.float64), PLANT[plant]]
    sample_kernels.call("sample_reverse", words, seed=seed)
    return result


def reversed_runs(numbers):
    return numbers.view(-1, 64).flip(1).reshape(-1)


def block_sums(sample_kernels, numbers, plant="nothing", seed=0):
    sums = torch.empty(numbers.numel() // 64)
    turn = torch.zeros(1, dtype=torch.int32)
    words = [numbers, numbers.numel(), sums, turn, PLANT[plant]]
    return sums, sample_kernels.call("sample_sum", words, seed=seed, read_only=[numbers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_returns_the_same_under_every_order_of_the_threads(sample_kernels, dtype, seed):
    numbers = torch.randn(192, dtype=dtype)
    assert torch.equal(reverse(sample_kernels, numbers, seed=seed), reversed_runs(numbers))


def test_a_missing_barrier_shows_within_a_few_orders_of_the_threads(sample_kernels):
    numbers = torch.randn(192)
    wrong = [
        s
        for s in SEEDS
        if not torch.equal(reverse(sample_kernels, numbers, "missing barrier", s), reversed_runs(numbers))
    ]
    assert len(wrong) >= len(SEEDS) - 1
    assert reverse(sample_kernels, numbers, "missing barrier", wrong[0]).isnan().any()  # shared memory starts as NaN


def test_a_missing_barrier_between_warps_shows(sample_kernels):
    numbers = torch.arange(640.0)
    expected = numbers.view(-1, 64).sum(1).cumsum(0)
    wrong = [
        s for s in SEEDS if not torch.equal(block_sums(sample_kernels, numbers, "missing barrier", s)[0], expected)
    ]
    assert wrong


def test_static_and_dynamic_shared_memory_share_one_limit(sample_kernels):
    with pytest.raises(
        EmulatorError, match=f"{99 * 1024 + 128} bytes of shared memory, a block has at most {99 * 1024}"
    ):
        block_sums(sample_kernels, torch.arange(64.0), "too much shared")


def test_lanes_do_not_run_in_lockstep(sample_kernels):
    numbers = torch.randn(32)
    for seed in SEEDS:
        right, wrong = numbers.clone(), numbers.clone()
        sample_kernels.call("sample_rotate", [right, PLANT["nothing"]], seed=seed)
        sample_kernels.call("sample_rotate", [wrong, PLANT["missing barrier"]], seed=seed)
        assert torch.equal(right, numbers.roll(-1))
        assert not torch.equal(wrong, numbers.roll(-1))


@pytest.mark.parametrize("plant", ["global out of bounds", "shared out of bounds"])
def test_an_access_out_of_bounds_is_reported_with_its_place(sample_kernels, plant):
    with pytest.raises(EmulatorError, match=r"(?s)heap-buffer-overflow.*reverse_kernel.*sample_kernels\.cu:\d+"):
        reverse(sample_kernels, torch.randn(64), plant)


def test_a_write_between_the_elements_of_a_strided_tensor_is_reported(sample_kernels):
    numbers = torch.randn(128)[::2]
    assert torch.equal(reverse(sample_kernels, numbers), reversed_runs(numbers))
    spread = torch.zeros(128)[::2]
    with pytest.raises(EmulatorError, match="between the elements of tensor 0"):
        sample_kernels.call("sample_reverse", [spread, 64, 2, 0, PLANT["gap"]])


def test_shared_memory_that_nobody_wrote_reads_as_nan(sample_kernels):
    result = reverse(sample_kernels, torch.randn(64), "uninitialised")
    assert result.isnan().nonzero().tolist() == [[64 - 1 - 7]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("plant", "message"), [("early exit", "ended"), ("two barriers", "others of the block wait")])
def test_a_barrier_that_not_all_threads_reach_is_reported(sample_kernels, plant, message, seed):
    with pytest.raises(EmulatorError, match=message):
        reverse(sample_kernels, torch.randn(64), plant, seed)


@pytest.mark.parametrize(("plant", "message"), [("absent lane", "ended"), ("foreign lane", "not in its mask")])
def test_a_shuffle_with_lanes_that_do_not_take_part_is_reported(sample_kernels, plant, message):
    for seed in SEEDS:
        with pytest.raises(EmulatorError, match=f"__shfl_xor_sync.*{message}|{message}.*__shfl_xor_sync"):
            block_sums(sample_kernels, torch.randn(128), plant, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_may_wait_for_each_other_whatever_their_order(sample_kernels, seed):
    numbers = torch.arange(640.0)
    sums, ran = block_sums(sample_kernels, numbers, seed=seed)
    assert torch.equal(sums, numbers.view(-1, 64).sum(1).cumsum(0))
    assert (ran.kernels, ran.blocks) == (("sum_kernel",), 10)


def test_a_wait_without_end_is_reported(sample_kernels):
    with pytest.raises(EmulatorError, match=r"no thread can go on(.|\n)*1 threads wait in a spin-wait"):
        block_sums(sample_kernels, torch.randn(256), "endless")


def test_an_asynchronous_copy_is_not_there_before_its_wait(sample_kernels):
    numbers, result = torch.randn(128), torch.zeros(128)
    sample_kernels.call("sample_copy", [numbers, result, PLANT["nothing"]])
    assert torch.equal(result, numbers)
    sample_kernels.call("sample_copy", [numbers, result, PLANT["missing wait"]])
    assert result.isnan().all()
    with pytest.raises(EmulatorError, match="not aligned"):
        sample_kernels.call("sample_copy", [torch.randn(132)[:128], result, PLANT["misaligned"]])
    with pytest.raises(EmulatorError, match="alignment"):
        sample_kernels.call("sample_copy", [numbers, torch.zeros(129)[1:], PLANT["nothing"]])


def test_offsets_beyond_32_bits_work_without_the_memory_and_narrow_ones_are_found(sample_kernels):
    stride = 2**31 + 3
    spread = sparse((3,), (stride,))
    spread.copy_(torch.tensor([1.0, 2.0, 3.0]))
    sample_kernels.call("sample_scale", [spread, 3, stride, PLANT["nothing"]])
    assert spread.tolist() == [2, 4, 6]
    with pytest.raises(EmulatorError):
        sample_kernels.call("sample_scale", [spread, 3, stride, PLANT["narrow offset"]])


def sparse(shape, strides, dtype=torch.float32):
    """Strides of gigabytes; only touched pages use memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = mmap.mmap(-1, elements * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def test_an_input_that_a_kernel_writes_is_reported(sample_kernels):
    numbers = torch.randn(64)
    with pytest.raises(EmulatorError, match="wrote into an input"):
        sample_kernels.call("sample_reverse", [numbers, 64, 1, 0, 0], read_only=[numbers])


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives_return_what_the_hardware_would(sample_kernels, seed):
    numbers = torch.randint(-100, 100, (32,), dtype=torch.int32)
    answers = torch.zeros(13, 32, dtype=torch.int32)
    sample_kernels.call("sample_collectives", [numbers, answers], seed=seed)
    lane = torch.arange(32)
    positive = numbers > 0
    ballot = int((positive.long() << lane).sum())
    low, high = numbers[:16], numbers[16:]
    expected = [
        numbers[5].expand(32),
        numbers[lane // 16 * 16 + 3],
        numbers[torch.where(lane < 2, lane, lane - 2)],
        numbers[torch.where(lane % 8 > 4, lane, lane + 3)],
        numbers[lane ^ 9],
        torch.tensor(ballot - (ballot >> 31 << 32)).expand(32),
        torch.cat([(half > 90).any().expand(16) for half in (low, high)]),
        torch.ones(32),
        numbers.sum().expand(32),
        torch.cat([half.max().expand(16) for half in (low, high)]),
        positive.sum().expand(32),
        torch.zeros(32),
        torch.ones(32),
    ]
    for row, found in zip(expected, answers, strict=True):
        assert torch.equal(row.to(torch.int32), found)


def test_the_size_of_the_chip_is_what_the_test_says(sample_kernels):
    assert sample_kernels.call("sample_multiprocessors", [], multiprocessors=17).value == 17


def test_a_call_after_a_report_starts_afresh(sample_kernels):
    with pytest.raises(EmulatorError, match="no function sample_missing"):
        sample_kernels.call("sample_missing", [])
    numbers = torch.randn(64)
    assert torch.equal(reverse(sample_kernels, numbers), reversed_runs(numbers))
