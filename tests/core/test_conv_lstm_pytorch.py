"""conv_lstm in PyTorch's transforms; bad input."""

import multiprocessing

import pytest
import torch
from backends import on_every_target
from conv_lstm_problems import SMALL, small_conv_lstm
from problems import DTYPES
from test_compile import GRAPHS, results
from test_concurrency import torch_threads
from test_registration import TRACING, WITHOUT_AUTOGRAD
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import wmkernels

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_call = pytest.mark.parametrize("op", list(SMALL))
every_target = on_every_target("conv_lstm")
every_kernel = on_every_target("conv_lstm", kernels_only=True)


@pytest.fixture(autouse=True)
def fresh(compiler):
    torch._dynamo.reset()


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "keep"), [("contiguous", 2), ("permuted", 1)])
@pytest.mark.parametrize("use", ["inference", "forward", "backward"])
def test_the_ops_keep_what_they_promise(target, dtype, layout, keep, use):
    inputs = dict(small_conv_lstm(target.device, dtype).tensors)
    if layout == "permuted":
        inputs = {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in inputs.items()}
    reset = torch.rand(3, 2, device=target.device) < 0.3
    names = ("x", "weight_ih", "weight_hh", "bias", "peephole", "h", "c")
    given = [inputs[name] for name in names]
    if keep == 1:
        given[3:], reset = [None] * 4, None
    options = (1, 1, 1, 1, 0, 1, 1, 1)  # stride, padding, dilation
    forward = torch.ops.wmkernels.conv_lstm_forward.default
    if use == "inference":
        torch.library.opcheck(forward, (*given, reset, *options, 0, target.backend), test_utils=TRACING)
        return
    if use == "forward":
        wanting = [None if x is None else x.clone().requires_grad_() for x in given]
        torch.library.opcheck(forward, (*wanting, reset, *options, keep, target.backend), test_utils=TRACING)
        return
    out, h, c, cells, gates = forward(*given, reset, *options, keep, target.backend)
    assert (gates.numel() > 0) == (keep == 2)
    backward = torch.ops.wmkernels.conv_lstm_backward.default
    cotangents = (torch.randn_like(out), torch.randn_like(h) if keep == 2 else None, torch.randn_like(c))
    arguments = (*cotangents, *given, reset, out, cells, gates, *options, target.backend)
    torch.library.opcheck(backward, arguments, test_utils=TRACING)
    wanting = (*cotangents, given[0].clone().requires_grad_(), *arguments[4:])
    torch.library.opcheck(backward, wanting, test_utils=WITHOUT_AUTOGRAD)


GIVEN = {"everything": ("",), "what is needed": ("x", "w")}  # names begin so


@every_target
@pytest.mark.parametrize("given", GIVEN)
def test_fullgraph_forward_and_backward_of_a_step(target, given):
    assert_compiles(SMALL["conv_lstm_step"](target.device, torch.float32), target, GIVEN[given])


@every_kernel
@pytest.mark.parametrize("given", GIVEN)
def test_fullgraph_forward_and_backward(target, given):
    assert_compiles(small_conv_lstm(target.device, torch.bfloat16), target, GIVEN[given])


def assert_compiles(problem, target, given):

    def run(values):
        return problem.function(**values, stride=2, backend=target.backend)

    values = {k: v for k, v in problem.tensors.items() if k.startswith(given)}
    problem.tensors = {k: v[..., :2, :3] if k in ("h", "c") else v for k, v in values.items()}
    compiled = torch.compile(run, fullgraph=True, backend=GRAPHS)
    torch.testing.assert_close(results(compiled, problem.leaves()), results(run, problem.leaves()))
    with torch.no_grad():
        torch.testing.assert_close(compiled(problem.tensors), run(problem.tensors))


@every_kernel
def test_compiled_func_grad_works_or_raises_and_a_second_derivative_raises(target):
    problem = small_conv_lstm(target.device, torch.float32)

    def loss(x):
        return sum(y.square().sum() for y in problem.function(**x, backend=target.backend))

    try:
        found = torch.compile(grad(loss), fullgraph=True, backend=GRAPHS)(problem.tensors)
    except Exception as error:
        assert "func" in str(error) or "grad" in str(error), error
    else:
        torch.testing.assert_close(found, grad(loss)(problem.tensors))
    compiled = torch.compile(loss, fullgraph=True, backend=GRAPHS)
    leaves = problem.leaves()
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(compiled(leaves), [leaves["x"]], create_graph=True)
        (compiled(leaves) + first.square().sum()).backward()


@every_call
@every_target
def test_func_grad_is_autograd(op, target):
    problem = SMALL[op](target.device)
    leaves = problem.leaves()
    expected = torch.autograd.grad(
        sum(x.square().sum() for x in problem.call(target.backend, leaves)), [*leaves.values()]
    )
    found = grad(lambda x: sum(y.square().sum() for y in problem.call(target.backend, x)))(problem.tensors)
    torch.testing.assert_close([*found.values()], list(expected))


@every_call
@every_target
def test_vmap_over_every_input_alone_and_all_together(op, target):
    problem = SMALL[op](target.device)
    tensors = problem.tensors
    many = {k: torch.stack([v, 0.5 * v], -1) for k, v in tensors.items()}
    for chosen in [[name] for name in tensors] + [list(tensors)]:
        dims = {k: -1 if k in chosen else None for k in tensors}
        values = {k: many[k] if k in chosen else tensors[k] for k in tensors}
        found = vmap(lambda x: problem.call(target.backend, x), in_dims=(dims,))(values)
        samples = [{k: many[k][..., i] if k in chosen else tensors[k] for k in tensors} for i in range(2)]
        expected = [
            torch.stack(parts) for parts in zip(*(problem.call(target.backend, s) for s in samples), strict=True)
        ]
        torch.testing.assert_close(list(found), expected)


@every_target
def test_gradients_of_every_sample_and_every_reset(target):
    problem = small_conv_lstm(target.device)
    many = {k: torch.stack([v, 0.5 * v]) for k, v in problem.tensors.items()}
    resets = torch.tensor([[[0, 1], [0, 0], [1, 0]], [[0, 0], [1, 1], [0, 0]]], device=target.device).bool()

    def loss(values, reset):
        return sum(x.square().sum() for x in problem.call(target.backend, {**values, "reset": reset}))

    found = vmap(grad(loss))(many, resets)
    for index in range(2):
        expected = grad(loss)({k: v[index] for k, v in many.items()}, resets[index])
        torch.testing.assert_close({k: v[index] for k, v in found.items()}, expected)


@every_target
def test_jacrev_is_the_jacobian(target):
    problem = small_conv_lstm(target.device, time=2)
    tensors = {k: v[..., :2, :2] if k in ("x", "h", "c") else v for k, v in problem.tensors.items()}

    def run(bias):
        return problem.call(target.backend, {**tensors, "bias": bias})[0]

    expected = torch.autograd.functional.jacobian(run, tensors["bias"])
    torch.testing.assert_close(jacrev(run)(tensors["bias"]), expected)


@every_kernel
def test_second_derivatives_raise_under_func(target):
    problem = small_conv_lstm(target.device)

    def loss(x):
        return problem.call(target.backend, {**problem.tensors, "x": x})[0].square().sum()

    with pytest.raises(RuntimeError, match="the gradient of its gradient is not implemented"):
        grad(lambda x: grad(loss)(x).square().sum())(problem.tensors["x"])


@every_target
def test_activation_checkpointing_and_gradients_of_any_layout(target):
    problem = small_conv_lstm(target.device)
    names = list(problem.leaves())

    def run(*values):
        return problem.call(target.backend, dict(zip(names, values, strict=True)))

    leaves = [*problem.leaves().values()]
    outputs = run(*leaves)
    cotangents = [torch.randn_like(x) for x in outputs]
    plain = torch.autograd.grad(outputs, leaves, cotangents)
    again = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves, cotangents)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    turned = [g.permute(*reversed(range(g.dim()))).contiguous().permute(*reversed(range(g.dim()))) for g in cotangents]
    torch.testing.assert_close(torch.autograd.grad(run(*leaves), leaves, turned), plain)
    ones = torch.autograd.grad(run(*leaves), leaves, [torch.ones_like(x) for x in outputs])
    torch.testing.assert_close(torch.autograd.grad(sum(x.sum() for x in run(*leaves)), leaves), ones)


def _in_a_child(queue):
    torch.set_num_threads(1)
    leaves = small_conv_lstm("cpu", torch.float32).leaves()
    out = small_conv_lstm("cpu").function(**leaves, backend="cpu")[0]
    out.sum().backward()
    queue.put(leaves["x"].grad.isfinite().all().item())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_with_one_thread_does_not_hang():
    with torch_threads(2):
        small_conv_lstm("cpu", torch.float32).call("cpu")  # starts the thread pool
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60)
    finally:
        child.join(10)
        child.kill()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


# x (3, 2, 3, 4, 5), weight_ih (8, 3, 3, 2), weight_hh (8, 2, 3, 3), h and c (2, 2, 4, 5).
ERRORS = {
    "x no tensor": ({"x": 1.0}, TypeError, "x is a float, expected a torch.Tensor"),
    "x of integers": ({"x": zeros(3, 2, 3, 4, 5, dtype=torch.int64)}, TypeError, "x has dtype int64, expected float32"),
    "x without time": (
        {"x": zeros(2, 3, 4, 5)},
        ValueError,
        "x has shape (2, 3, 4, 5), expected (time, batch, channels, height, width)",
    ),
    "channels": (
        {"x": zeros(3, 2, 4, 4, 5)},
        ValueError,
        "x has 4 channels (shape (3, 2, 4, 4, 5), read as (time, batch, channels, height, width)), expected 3 to match "
        "weight_ih",
    ),
    "channels at the end": ({"x": zeros(3, 2, 4, 5, 3)}, ValueError, "its channels seem to come last"),
    "weight_ih of another dtype": (
        {"weight_ih": zeros(8, 3, 3, 2, dtype=torch.float64)},
        TypeError,
        "weight_ih has dtype float64, expected float32 beside x of torch.float32",
    ),
    "weight_hh of another dtype": (
        {"weight_hh": zeros(8, 2, 3, 3, dtype=torch.float64)},
        TypeError,
        "weight_hh has dtype float64, expected float32 beside x of torch.float32",
    ),
    "weight_ih of two dimensions": (
        {"weight_ih": zeros(8, 3)},
        ValueError,
        "weight_ih has shape (8, 3), expected (4 * hidden, input, height, width)",
    ),
    "weight_ih of another hidden size": (
        {"weight_ih": zeros(12, 3, 3, 3)},
        ValueError,
        "weight_ih has shape (12, 3, 3, 3), expected (4 * hidden=8, input, height, width) to match weight_hh",
    ),
    "weight_hh without its four gates": (
        {"weight_hh": zeros(8, 3, 3, 3)},
        ValueError,
        "weight_hh has shape (8, 3, 3, 3), expected (4 * hidden=12, hidden=3, height, width)",
    ),
    "even hidden kernel": (
        {"weight_hh": zeros(8, 2, 3, 4)},
        ValueError,
        "weight_hh has a kernel of (3, 4), expected odd sizes",
    ),
    "bias": ({"bias": zeros(2)}, ValueError, "bias has shape (2,), expected (4 * hidden=8) to match weight_hh"),
    "bias of another dtype": (
        {"bias": zeros(8, dtype=torch.float64)},
        TypeError,
        "bias has dtype float64, expected float32 beside x of torch.float32",
    ),
    "peephole": (
        {"peephole": zeros(3, 2, 5, 4)},
        ValueError,
        "peephole has shape (3, 2, 5, 4), expected (3, hidden=2) or (3, hidden=2, height=4, width=5)",
    ),
    "peephole of four gates": ({"peephole": zeros(4, 2)}, ValueError, "peephole has shape (4, 2), expected (3, hidden"),
    "state of another map": (
        {"h": zeros(2, 2, 4, 6)},
        ValueError,
        "the state's h has shape (2, 2, 4, 6), expected (batch=2, hidden=2, height=4, width=5) to match x and",
    ),
    "c of another dtype": (
        {"c": zeros(2, 2, 4, 5, dtype=torch.float64)},
        TypeError,
        "the state's c has dtype float64, expected float32 beside x of torch.float32",
    ),
    "reset turned round": (
        {"reset": zeros(2, 3, dtype=torch.bool)},
        ValueError,
        "reset has shape (2, 3), expected (time=3, batch=2) to match x: batch and time are swapped; batch_first=True",
    ),
    "reset of numbers": ({"reset": zeros(3, 2)}, TypeError, "reset has dtype float32, expected bool"),
    "reset": ({"reset": zeros(3, dtype=torch.bool)}, ValueError, "reset has shape (3,), expected (time=3, batch=2)"),
    "stride": ({"stride": 0}, ValueError, "stride is 0, expected at least 1"),
    "stride of three": ({"stride": (1, 1, 1)}, TypeError, "stride is (1, 1, 1), expected a whole number or a pair"),
    "dilation": ({"dilation": 1.5}, TypeError, "dilation is 1.5, expected a whole number or a pair of them"),
    "padding": ({"padding": -1}, ValueError, "padding is -1, expected at least 0"),
    "padding in words": (
        {"padding": "full"},
        ValueError,
        "padding is 'full', expected 'same', 'valid', a whole number",
    ),
    "a map that vanishes": (
        {"padding": "valid", "dilation": 2},
        ValueError,
        "x has height and width (4, 5), of which the input convolution, with a kernel of (3, 2), stride=1",
    ),
    "another device": ({"weight_ih": torch.zeros(8, 3, 3, 2, device="meta")}, ValueError, "weight_ih is on meta"),
}


@every_target
@pytest.mark.parametrize("case", list(ERRORS))
def test_bad_input_says_what_was_expected(target, case):
    changes, error, message = ERRORS[case]
    tensors = small_conv_lstm(target.device, torch.float32).tensors
    moved = {
        k: v.to(target.device) if getattr(v, "device", None) == torch.device("cpu") else v for k, v in changes.items()
    }
    with pytest.raises(error) as caught:
        small_conv_lstm(target.device).function(**{**tensors, **moved}, backend=target.backend)
    assert str(caught.value).startswith(f"conv_lstm: {message}") or (
        case in ("channels at the end", "another device") and message in str(caught.value)
    )


@every_target
def test_a_state_is_a_pair_and_a_step_names_itself(target):
    tensors = small_conv_lstm(target.device, torch.float32).tensors
    weights = {k: v for k, v in tensors.items() if k.startswith("weight")}
    for state, held in ((tensors["h"], "a Tensor"), ((tensors["h"],), "1 values"), ("hc", "a str")):
        with pytest.raises(TypeError, match=rf"conv_lstm: state is {held}, expected a pair \(h, c\)"):
            wmkernels.conv_lstm(tensors["x"], **weights, state=state, backend=target.backend)
    with pytest.raises(ValueError, match=r"conv_lstm_step: x has shape \(3, 2, 3, 4, 5\), expected \(batch, channels,"):
        wmkernels.conv_lstm_step(tensors["x"], None, **weights, backend=target.backend)
    reset = torch.zeros(3, dtype=torch.bool, device=target.device)
    with pytest.raises(ValueError, match=r"conv_lstm_step: reset has shape \(3,\), expected \(batch=2\) to match x"):
        wmkernels.conv_lstm_step(tensors["x"][0], None, **weights, reset=reset, backend=target.backend)
    turned = tensors["x"].transpose(0, 1)
    reset = torch.zeros(3, 2, dtype=torch.bool, device=target.device)
    with pytest.raises(ValueError, match=r"expected \(batch=2, time=3\).*batch_first=False takes x and reset"):
        wmkernels.conv_lstm(turned, **weights, reset=reset, batch_first=True, backend=target.backend)


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_a_backend_that_cannot_run_says_why(backend):
    with pytest.raises(ValueError, match=f"conv_lstm: backend '{backend}' cannot run this call") as error:
        small_conv_lstm("cpu").call(backend)
    assert "  reference: can run it" in str(error.value).splitlines()
    assert "  cpu: can run it" in str(error.value).splitlines()
