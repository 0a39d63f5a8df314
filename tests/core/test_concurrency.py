"""Results are independent of threads and processes."""

import contextlib
import multiprocessing
import threading

import pytest
import torch
from backends import on_every_target
from causal_conv_problems import big_causal_conv
from conv_lstm_problems import small_conv_lstm
from delta_rule_problems import big_delta_rule
from problems import Problem, few_channels
from ssd_problems import big_mamba3, big_ssd
from test_gradients import SMALL, every_op
from tolerances import SAME_KERNEL

import wmkernels


@contextlib.contextmanager
def torch_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def big_scan(device="cpu", dtype=torch.float32, batch=2, channels=70, time=300, state=9):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, kind=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).to(device)

    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "u": normal(batch, channels, time),
        "delta": normal(batch, channels, time),
        "A": -normal(channels, state, kind=parameter).abs(),
        "B": normal(batch, 2, state, time),
        "C": normal(batch, 2, state, time),
        "D": normal(channels, kind=parameter),
        "z": normal(batch, channels, time),
        "delta_bias": normal(channels, kind=parameter),
        "initial_state": normal(batch, channels, state, kind=parameter),
        "reset": torch.rand((batch, time), generator=generator).to(device) < 0.02,
    }
    return Problem(wmkernels.selective_scan, tensors, {"delta_softplus": True, "return_last_state": True})


def packed_scan(device="cpu"):
    problem = big_scan(device, batch=1)
    problem.tensors["cu_seqlens"] = torch.tensor([0, 3, 3, 120, 121, 300], device=device)
    problem.tensors["initial_state"] = None
    return problem


def constant_scan(device="cpu"):
    problem = big_scan(device)
    problem.tensors["B"], problem.tensors["C"] = (problem.tensors["B"][0, 0, :, :1].T.expand(70, 9) for _ in range(2))
    return problem


def big_linear_scan(device="cpu", channels=33, time=3000, reverse=False):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "gates": torch.rand((2, channels, time), generator=generator).to(device),
        "tokens": torch.randn((2, channels, time), generator=generator).to(device),
    }
    return Problem(wmkernels.linear_scan, tensors, {"return_last_state": True, "reverse": reverse})


PROBLEMS = {
    "scan": big_scan,
    "scan in bfloat16": lambda device: big_scan(device, torch.bfloat16),
    "scan of few channels": lambda device: few_channels(torch.float32, 5000, device),
    "packed scan of few channels": lambda device: few_channels(torch.float32, 5000, device, packed=True),
    "scan of few channels and many states": lambda device: few_channels(torch.float32, 2500, device, state=64),
    "packed scan of few channels and many states": lambda device: few_channels(
        torch.float64, 2500, device, packed=True, channels=7, state=32
    ),
    "packed scan": packed_scan,
    "scan with constant B and C": constant_scan,
    "linear scan": big_linear_scan,
    "linear scan of few channels": lambda device: big_linear_scan(device, 1, 20_000),
    "gated delta rule": big_delta_rule,
    "packed gated delta rule": lambda device: big_delta_rule(device, packed=True),
    "SSD scan": big_ssd,
    "packed SSD scan": lambda device: big_ssd(device, packed=True),
    "Mamba-3's scan": big_mamba3,
    "causal convolution": big_causal_conv,
    "packed causal convolution": lambda device: big_causal_conv(device, packed=True, channel_last=True),
    "reverse linear scan": lambda device: big_linear_scan(device, reverse=True),
}
every_problem = pytest.mark.parametrize("name", list(PROBLEMS))


def big_conv_lstm(device="cpu", hidden=17):
    problem = small_conv_lstm(device, torch.float32)
    shapes = {
        "x": (3, 3, 7, 8, 12),
        "weight_ih": (4 * hidden, 7, 3, 3),
        "weight_hh": (4 * hidden, hidden, 3, 3),
        "bias": (4 * hidden,),
        "peephole": (3, hidden),
        "h": (3, hidden, 8, 12),
        "c": (3, hidden, 8, 12),
    }
    generator = torch.Generator().manual_seed(0)
    problem.tensors = {k: 0.3 * torch.randn(v, generator=generator).to(device) for k, v in shapes.items()}
    return problem


def assert_bitwise(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@every_problem
@on_every_target("selective_scan", kernels_only=True)
def test_run_after_run(name, target):
    problem = PROBLEMS[name](target.device)
    first = problem.solve(target.backend)
    for _ in range(3):
        assert_bitwise(problem.solve(target.backend), first)


@every_problem
def test_any_number_of_threads(name):
    problem = PROBLEMS[name]("cpu")
    with torch_threads(1):
        first = problem.solve("cpu")
    for count in (2, 3, 5, 16):
        with torch_threads(count):
            assert_bitwise(problem.solve("cpu"), first)


def test_any_number_of_threads_of_a_conv_lstm():
    """Gradients of weights, bias and peephole are sums of a partial per thread."""
    problem = big_conv_lstm()
    found = {}
    for count in (1, 2, 3, 5):
        with torch_threads(count):
            found[count] = problem.solve("cpu")
            assert_bitwise(problem.solve("cpu"), found[count])
    for name, first in found[1].items():
        for other in (found[count][name] for count in (2, 3, 5)):
            if name.endswith(("weight_ih", "weight_hh", "bias", "peephole")):
                scale = first.abs().max().item()
                assert (other - first).abs().max().item() <= SAME_KERNEL[torch.float32] * scale, name
            else:
                assert torch.equal(other, first), name


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_whatever_the_layout(op, dtype):
    """Layout never changes the order of sums."""
    problem = SMALL[op]("cpu", dtype)
    plain = problem.solve("cpu")
    permuted = problem.mapped(
        lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    )
    assert_bitwise(permuted.solve("cpu"), plain)


@on_every_target("selective_scan", kernels_only=True)
def test_several_python_threads_at_once(target):
    problems = [PROBLEMS[name](target.device) for name in ("scan", "packed scan", "linear scan")] * 2
    expected = [problem.solve(target.backend) for problem in problems]
    found = [None] * len(problems)
    barrier = threading.Barrier(len(problems))

    def work(index):
        barrier.wait()
        for _ in range(5):
            found[index] = problems[index].solve(target.backend)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    for one, other in zip(found, expected, strict=True):
        assert_bitwise(one, other)


def numbers(results):
    return {name: value.numpy().tobytes() for name, value in results.items()}


def _solve_in_child(connection):
    torch.set_num_threads(1)
    connection.send(numbers(big_scan().solve("cpu")))
    connection.close()


def test_a_forked_worker_with_one_thread():
    with torch_threads(2):
        expected = numbers(big_scan().solve("cpu"))
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_solve_in_child, args=(theirs,))
    with torch.autograd.set_multithreading_enabled(False):
        child.start()
    theirs.close()
    try:
        assert ours.poll(60), "the forked process hangs"
        assert ours.recv() == expected
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()


class Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = big_scan(batch=1, time=20 + index).tensors
        return wmkernels.selective_scan(**x, delta_softplus=True, backend="cpu")[..., -1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_data_loader_with_workers():
    with torch_threads(2):
        expected = [Scans()[index] for index in range(4)]
        loader = torch.utils.data.DataLoader(Scans(), batch_size=None, num_workers=2, timeout=60)
        for item, own in zip(loader, expected, strict=True):
            assert torch.equal(item, own)
