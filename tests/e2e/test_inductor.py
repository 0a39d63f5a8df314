"""Inductor, the compiler of torch.compile, compiles calls of the ops and what surrounds them."""

import pytest
import torch
from backends import everywhere
from conv_lstm_problems import small_conv_lstm
from test_compile import results
from test_gradients import SMALL

# PyTorch's own tracing of an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@everywhere("selective_scan", kernels_only=True)
def test_inductor_compiles_a_selective_scan(place):
    problem = SMALL["selective_scan"](place.device, torch.float32)

    def run(values):
        wide = {k: v * 1.5 if k in ("u", "B") else v for k, v in values.items()}
        return problem.function(**wide, **problem.options, backend=place.backend)

    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(results(compiled, problem.leaves()), results(run, problem.leaves()))


@everywhere("conv_lstm", kernels_only=True)
def test_inductor_and_export_take_a_conv_lstm(place):
    problem = small_conv_lstm(place.device, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, values):
            wide = {k: v * 1.5 if k == "x" else v for k, v in values.items()}
            return problem.function(**wide, backend=place.backend)

    compiled = torch.compile(Module(), fullgraph=True)
    torch.testing.assert_close(results(compiled, problem.leaves()), results(Module(), problem.leaves()))
    program = torch.export.export(Module(), (problem.tensors,))
    torch.testing.assert_close(program.module()(problem.tensors), Module()(problem.tensors))
