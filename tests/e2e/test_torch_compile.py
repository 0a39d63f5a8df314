"""Slow tests: Inductor and symbolic shapes."""

import pytest
import torch
from backends import on_every_target
from conv_lstm_problems import small_conv_lstm
from test_compile import GRAPHS, results
from test_gradients import SMALL

# From PyTorch's tracing.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh(compiler):
    torch._dynamo.reset()


@on_every_target("selective_scan", kernels_only=True)
def test_inductor_compiles_a_selective_scan(target):
    problem = SMALL["selective_scan"](target.device, torch.float32)

    def run(values):
        wide = {k: v * 1.5 if k in ("u", "B") else v for k, v in values.items()}
        return problem.function(**wide, **problem.options, backend=target.backend)

    compiled = torch.compile(run, fullgraph=True)
    torch.testing.assert_close(results(compiled, problem.leaves()), results(run, problem.leaves()))


@on_every_target("conv_lstm", kernels_only=True)
def test_inductor_and_export_take_a_conv_lstm(target):
    problem = small_conv_lstm(target.device, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, values):
            wide = {k: v * 1.5 if k == "x" else v for k, v in values.items()}
            return problem.function(**wide, backend=target.backend)

    compiled = torch.compile(Module(), fullgraph=True)
    torch.testing.assert_close(results(compiled, problem.leaves()), results(Module(), problem.leaves()))
    program = torch.export.export(Module(), (problem.tensors,))
    torch.testing.assert_close(program.module()(problem.tensors), Module()(problem.tensors))


@on_every_target("conv_lstm", kernels_only=True)
def test_dynamic_shapes_of_a_conv_lstm(target):
    problem = small_conv_lstm(target.device, torch.float32)
    weights = {k: v for k, v in problem.tensors.items() if k not in ("x", "h", "c")}

    def run(values):
        return problem.function(**values, stride=2, backend=target.backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=GRAPHS)
    for shape in ((3, 2, 3, 7, 9), (4, 5, 3, 6, 8), (2, 3, 3, 10, 5)):
        leaves = [
            {k: v.clone().requires_grad_() for k, v in weights.items()}
            | {"x": torch.ones(shape, device=target.device, requires_grad=True)}
            for _ in range(2)
        ]
        torch.testing.assert_close(results(compiled, leaves[0]), results(run, leaves[1]))
