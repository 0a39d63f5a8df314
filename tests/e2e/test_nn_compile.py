"""Separate from the core tests: the first compilation per process is slow."""

import pytest
import torch
from backends import on_every_target
from recurrences_nn import random_state, resets

from wmkernels.nn import BlockScan, CausalConv1d, LocalAttention, Mamba, MemoryAttention

SCANS = on_every_target("selective_scan")


def check_compiled(module, inputs, bounds=None):
    """Outputs, state and gradients in one graph."""
    reset = resets(*inputs.shape[:2], inputs.device)
    rows = len(inputs) if bounds is None else len(bounds) - 1
    state = {name: value.requires_grad_() for name, value in random_state(module, rows).items()}

    def run(call):
        outputs, last = call(inputs, state, reset, cu_seqlens=bounds)
        loss = outputs.square().sum() + sum(value.sin().sum() for value in last.values())
        return outputs, last, torch.autograd.grad(loss, [*state.values(), *module.parameters()])

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(module))


@SCANS
def test_it_compiles_in_one_graph(target):
    module = Mamba(8, d_state=4, backend=target.backend, device=target.device)
    check_compiled(module, torch.randn(2, 10, 8, device=target.device))


@on_every_target("selective_scan", kernels_only=True)
def test_packed_sequences_compile_in_one_graph(target):
    module = Mamba(8, d_state=4, backend=target.backend, device=target.device)
    bounds = torch.tensor([0, 4, 4, 10], device=target.device)
    check_compiled(module, torch.randn(1, 10, 8, device=target.device), bounds)


def test_the_packed_convolution_compiles_in_one_graph():
    check_compiled(CausalConv1d(8), torch.randn(1, 10, 8), torch.tensor([0, 4, 4, 10]))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (BlockScan(CausalConv1d(4), 2, (2, 3)), (6, 4)),
        (LocalAttention(4, 3, 2, (1, 2)), (2, 4)),
        (MemoryAttention(4, 2, 3, 1), (4,)),
    ],
)
def test_memories_of_tokens_compile_in_one_graph(module, shape):
    reset = resets(2, 3)
    inputs = torch.randn(2, 3, *shape, requires_grad=True)

    def run(call):
        outputs, last = call(inputs, None, reset)
        return outputs, last, torch.autograd.grad(outputs.square().sum(), [inputs, *module.parameters()])

    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(module, fullgraph=True, backend="aot_eager")), run(module))


@SCANS
def test_a_step_compiles_in_one_graph(target):
    module = Mamba(8, d_state=4, backend=target.backend, device=target.device)
    inputs, state = torch.randn(2, 8, device=target.device), random_state(module, 2)
    reset = torch.tensor([True, False], device=target.device)
    torch._dynamo.reset()
    compiled = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs, state, reset), module.step(inputs, state, reset))
