"""torch.compile with fullgraph: results, gradients and changing shapes."""

import pytest
import torch
from backends import on_every_target, targets
from test_gradients import SMALL, every_op
from torch._dynamo.testing import CompileCounterWithBackend

import wmkernels
from wmkernels import nn
from wmkernels.nn.memory_module import takes_elapsed

# Tracing an autograd.Function warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# PyTorch's own operators alone are compiled for the ops above; a triangular system adds nothing but seconds.
every_op_and_target = pytest.mark.parametrize(
    ("op", "target"),
    [(op, x) for op in SMALL for x in targets("selective_scan", kernels_only=op == "gated_delta_rule")],
    ids=lambda x: x if isinstance(x, str) else "-".join(x[: 1 + (x == ("chunked", "cuda"))]),
)
# Tests graphs and fakes without Inductor.
GRAPHS = "aot_eager"


@pytest.fixture(autouse=True)
def fresh(compiler):
    torch._dynamo.reset()


def results(run, leaves):
    outputs = run(leaves)
    grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), [*leaves.values()])
    return [*outputs, *grads]


@every_op_and_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fullgraph_forward_and_backward(op, target, dtype):
    problem = SMALL[op](target.device, dtype)

    def run(values):
        return problem.function(**values, **problem.options, backend=target.backend)

    compiled = torch.compile(run, fullgraph=True, backend=GRAPHS)
    torch.testing.assert_close(results(compiled, problem.leaves()), results(run, problem.leaves()))


@every_op_and_target
def test_inference_under_no_grad(op, target):
    problem = SMALL[op](target.device, torch.float32)

    def run(values):
        return problem.function(**values, **problem.options, backend=target.backend)

    compiled = torch.compile(run, fullgraph=True, backend=GRAPHS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(problem.tensors), run(problem.tensors), rtol=0, atol=0)


@on_every_target("selective_scan", kernels_only=True)
@pytest.mark.parametrize(
    "op", ["selective_scan", "linear_scan", "gated_delta_rule", "place_memory", "ssd_scan", "causal_conv1d"]
)
def test_dynamic_shapes_with_backward(op, target):
    make = SMALL[op]
    problem = make(target.device, torch.float32)
    graphs = CompileCounterWithBackend(GRAPHS)

    def run(values):
        return problem.function(**values, **problem.options, backend=target.backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=graphs)
    # Dynamo gives equal sizes one symbol.
    for time, batch in ((9, 5), (5, 2), (130, 4), (64, 3)):
        if op != "linear_scan":
            other = make(target.device, torch.float32, batch=batch, time=time)
        else:
            other = make(target.device, torch.float32)
            stretch = {k: v.repeat(1, 1, time) for k, v in other.tensors.items() if v.dim() == 3}
            other.tensors = other.tensors | stretch
        torch.testing.assert_close(results(compiled, other.leaves()), results(run, other.leaves()))
    assert graphs.frame_count == 1, f"compiled {graphs.frame_count} times for four shapes"


@on_every_target("selective_scan", kernels_only=True)
def test_resets_and_packing_compile(target):
    problem = SMALL["selective_scan"](target.device, torch.float32)
    x = {k: v[:1] if v.dim() == 3 else v for k, v in problem.tensors.items() if v is not None}
    x["initial_state"] = problem.tensors["initial_state"]
    reset = torch.tensor([[False, False, True, False]], device=target.device)
    bounds = torch.tensor([0, 1, 4], device=target.device)

    def run(values):
        return wmkernels.selective_scan(
            **values, reset=reset, cu_seqlens=bounds, return_last_state=True, backend=target.backend
        )

    leaves = [{k: v.clone().requires_grad_() for k, v in x.items()} for _ in range(2)]
    compiled = torch.compile(run, fullgraph=True, backend=GRAPHS)
    torch.testing.assert_close(results(compiled, leaves[0]), results(run, leaves[1]))


@on_every_target("selective_step", kernels_only=True)
def test_the_in_place_update_compiles(target):
    x = dict(SMALL["selective_step"](target.device, torch.float32).tensors)
    state = x.pop("state")
    x["x"], x["dt"], x["dt_bias"] = x.pop("u"), x.pop("delta"), x.pop("delta_bias")

    def run(state):
        out = wmkernels.selective_state_update(state, **x)
        return out + wmkernels.selective_state_update(state, **x)

    mine, theirs = state.clone(), state.clone()
    compiled = torch.compile(run, fullgraph=True, backend=GRAPHS)
    torch.testing.assert_close(compiled(mine), run(theirs))
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine, state)


@every_op
@on_every_target("selective_scan", kernels_only=True)
def test_compiled_func_grad_works_or_raises(op, target):
    problem = SMALL[op](target.device, torch.float32)

    def gradient(values):
        def loss(x):
            return sum(y.square().sum() for y in problem.function(**x, **problem.options, backend=target.backend))

        return torch.func.grad(loss)(values)

    tensors = {k: v for k, v in problem.tensors.items() if v is not None}
    expected = gradient(tensors)
    try:
        found = torch.compile(gradient, fullgraph=True, backend=GRAPHS)(tensors)
    except Exception as error:
        assert "func" in str(error) or "grad" in str(error), error
    else:
        torch.testing.assert_close(found, expected)


@every_op
@on_every_target("selective_scan", kernels_only=True)
def test_a_compiled_second_derivative_raises(op, target):
    problem = SMALL[op](target.device, torch.float32)

    def run(values):
        return problem.function(**values, **problem.options, backend=target.backend)[0].square().sum()

    compiled = torch.compile(run, fullgraph=True, backend=GRAPHS)
    leaves = problem.leaves()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(compiled(leaves), [next(iter(leaves.values()))], create_graph=True)
        (compiled(leaves) + grad.square().sum()).backward()


@every_op
@on_every_target("selective_scan", kernels_only=True)
def test_export(op, target):
    problem = SMALL[op](target.device, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, values):
            return problem.function(**values, **problem.options, backend=target.backend)

    tensors = {k: v for k, v in problem.tensors.items() if v is not None}
    program = torch.export.export(Module(), (tensors,))
    torch.testing.assert_close(program.module()(tensors), Module()(tensors))


@pytest.mark.parametrize("kind", [nn.ConvLSTM, nn.ConvLSTMCell])
def test_peepholes_per_position_compile_for_changing_shapes(kind):
    module = kind(3, 2, 3, peephole=(4, 5))
    # Checks that break the graph do so in Dynamo alone, which backend "eager" tests.
    compiled = torch.compile(
        lambda x, state, reset: module(x, state, reset)[0], fullgraph=True, dynamic=True, backend="eager"
    )
    for batch, time in ((5, 7), (2, 9)):
        leading = (batch,) if kind is nn.ConvLSTMCell else (time, batch)
        x, reset = torch.randn(*leading, 3, 4, 5), torch.rand(leading) < 0.3
        state = module.init_state(batch, (4, 5))
        torch.testing.assert_close(compiled(x, state, reset), module(x, state, reset)[0])


def test_an_update_of_heads_compiles_for_changing_shapes():
    compiled = torch.compile(wmkernels.selective_state_update, fullgraph=True, dynamic=True, backend="eager")
    for batch, heads, transposed in ((5, 2, False), (3, 4, True)):
        state = torch.randn(batch, heads, 3, 4)
        if transposed:  # heads cannot be merged into channels by a view
            state = state.transpose(1, 2).contiguous().transpose(1, 2)
        x, dt, A = torch.randn(batch, heads, 3), torch.rand(batch, heads, 3), -torch.rand(heads, 3, 4)
        B = torch.randn(batch, 4)
        mine, theirs = state.clone(), state.clone()
        out = compiled(mine, x, dt, A, B, B)
        torch.testing.assert_close(out, wmkernels.selective_state_update(theirs, x, dt, A, B, B))
        torch.testing.assert_close(mine, theirs)
        assert not torch.equal(mine, state)


class Wrapper(torch.nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.memory, self.init_state, self.step = memory, memory.init_state, memory.step

    def forward(self, *arguments, **named):
        return self.memory(*arguments, **named)


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper, lambda memory: Wrapper(torch.compile(memory))])
def test_a_wrapped_memory_takes_elapsed_time_if_it_does_unwrapped(wrap):
    memory = nn.Mamba(4, 2)
    inputs, elapsed = torch.randn(1, 3, 4, 4), torch.rand(1, 3) * 5
    expected, _ = nn.BlockScan(memory, (1, 2), (1, 4))(inputs, elapsed=elapsed)
    with torch.compiler.set_stance("force_eager"):
        outputs, _ = nn.BlockScan(wrap(memory), (1, 2), (1, 4))(inputs, elapsed=elapsed)
        torch.testing.assert_close(outputs, expected)
        assert not takes_elapsed(wrap(nn.CausalConv1d(4)))
        nn.BlockScan(wrap(nn.CausalConv1d(4)), (1, 2), (1, 4))(inputs, elapsed=elapsed)
