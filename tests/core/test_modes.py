"""What a call runs under: forward mode, tracers, counters and other modes; devices without memory."""

import io
import math

import pytest
import torch
from conv_lstm_problems import small_conv_lstm, small_conv_lstm_step
from test_gradients import SMALL as SCANS
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import wmkernels
from wmkernels import dispatch, nn

pytestmark = [
    pytest.mark.skipif(dispatch.load_native() is None, reason="no extension, so no kernel to be chosen"),
    # PyTorch's own use of it, in jvp, included
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # Checks compare sizes, which are the same in every call of a trace.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SMALL = SCANS | {"conv_lstm": small_conv_lstm, "conv_lstm_step": small_conv_lstm_step}
every_op = pytest.mark.parametrize("op", list(SMALL))
# for backward
KEEPS = ("selective_scan", "gated_delta_rule", "conv_lstm", "conv_lstm_step", "place_memory", "ssd_scan")
MODULES = {
    "Mamba": (lambda: nn.Mamba(6, 4), (2, 5, 6)),
    "RotaryMamba": (lambda: nn.RotaryMamba(6, 4, selective_angle=True, selective_speed=True), (2, 5, 6)),
    "Mamba2": (lambda: nn.Mamba2(6, 4, headdim=3, ngroups=2), (2, 5, 6)),
    "Mamba3": (lambda: nn.Mamba3(6, 4, headdim=3), (2, 5, 6)),
    "GatedDeltaNet": (lambda: nn.GatedDeltaNet(6, 2, 4), (2, 5, 6)),
    "CausalConv1d": (lambda: nn.CausalConv1d(6), (2, 5, 6)),
    "ConvLSTM": (lambda: nn.ConvLSTM(3, 2, 3, num_layers=2, peephole=(4, 5), batch_first=True), (2, 5, 3, 4, 5)),
    "ConvLSTMCell": (lambda: nn.ConvLSTMCell(3, 2, 3, peephole=True), (2, 5, 3, 4, 5)),
}


def small(op, dtype=torch.float64):
    """(function of tensors, their names, tensors) with the backend chosen by dispatch."""
    problem = SMALL[op]("cpu", dtype)
    names = [k for k, v in problem.tensors.items() if v is not None]

    def run(*values, backend=None):
        return problem.call(backend, dict(zip(names, values, strict=True)))

    return run, names, [problem.tensors[name] for name in names]


def update_arguments(dtype=torch.float32):
    x = SMALL["selective_step"]("cpu", dtype).tensors
    return [x[name] for name in ("state", "u", "delta", "A", "B", "C")]


def is_map(name):
    return name.startswith("ConvLSTM")


def module_call(name, kind):
    """(module, function of the module and inputs, inputs): ``forward`` over a sequence or one ``step``."""
    make, shape = MODULES[name]
    x = torch.randn(shape)
    if kind == "step" or name == "ConvLSTMCell":
        x = x[:, 0]
    return make(), lambda module, x: getattr(module, kind)(x, None)[0], x


every_module = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in MODULES for kind in ("forward", "step")]
)


@every_op
def test_the_derivative_in_forward_mode_is_that_of_the_reference(op):
    run, names, values = small(op)
    for index in range(len(names)):
        tangent = torch.randn_like(values[index])

        def of_one(x, index=index, backend=None):
            return run(*values[:index], x, *values[index + 1 :], backend=backend)

        _, expected = jvp(lambda x: of_one(x, backend="reference"), (values[index],), (tangent,))
        outputs, found = jvp(of_one, (values[index],), (tangent,))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(outputs, run(*values))
        with forward_ad.dual_level():
            duals = of_one(forward_ad.make_dual(values[index], tangent))
            tangents = [forward_ad.unpack_dual(x).tangent for x in duals]
            zeros = [x if t is None else t for x, t in zip(map(torch.zeros_like, outputs), tangents, strict=True)]
            torch.testing.assert_close(zeros, [*expected])


@every_op
def test_a_kernel_by_name_refuses_forward_mode(op):
    run, _, values = small(op)
    error = r"forward-mode differentiation.*compiled kernels.*backend=\"reference\""
    with pytest.raises(RuntimeError, match=f"^{op}: {error}"):
        jvp(lambda x: run(x, *values[1:], backend="cpu"), (values[0],), (values[0],))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values[0], values[0])
        with pytest.raises(RuntimeError, match=error):
            run(dual, *values[1:], backend="cpu")
        # Without a tangent nothing is lost.
        torch.testing.assert_close(run(*values, backend="cpu"), run(*values))
    jvp(lambda x: x + sum(y.sum() for y in run(*values, backend="cpu")), (values[0],), (values[0],))


def test_the_ops_themselves_refuse_forward_mode():
    gates = torch.rand(2, 3, 5)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"linear_scan_forward: forward-mode"):
        dual = forward_ad.make_dual(gates, gates)
        torch.ops.wmkernels.linear_scan_forward(gates, dual, None, None, False, False, "cpu")


def test_the_in_place_update_refuses_forward_mode():
    values = update_arguments()
    for index in range(len(values)):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="in place, without forward-mode"):
            dual = forward_ad.make_dual(values[index], torch.ones_like(values[index]))
            wmkernels.selective_state_update(*values[:index], dual, *values[index + 1 :])


@every_op
def test_jacobians_by_forward_mode(op):
    run, _, values = small(op)

    def loss(x):
        return run(x, *values[1:])[0].square().sum()

    def reference(x):
        return run(x, *values[1:], backend="reference")[0].square().sum()

    torch.testing.assert_close(jacfwd(loss)(values[0]), torch.func.grad(reference)(values[0]))
    direction = torch.randn_like(values[0])
    slopes = vmap(lambda x: jvp(loss, (x,), (direction,))[1])(torch.stack([values[0], 0.5 * values[0]]))
    torch.testing.assert_close(slopes[0], jvp(reference, (values[0],), (direction,))[1])
    if op == "linear_scan":
        torch.testing.assert_close(hessian(loss)(values[0]), hessian(reference)(values[0]))


@every_module
def test_modules_in_forward_mode(name, kind):
    module, call, x = module_call(name, kind)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(module, forward_ad.make_dual(x, tangent))).tangent
    module.backend = "reference"
    torch.testing.assert_close(found, jvp(lambda x: call(module, x), (x,), (tangent,))[1], rtol=1e-4, atol=1e-5)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def by_mode(kind):
    def seen(run, values):
        with kind() as mode, torch.no_grad():
            run(*values)
        return mode.seen

    return seen


def by_profiler(run, values):
    with torch.profiler.profile() as profile, torch.no_grad():
        run(*values)
    return [event.key for event in profile.key_averages()]


def by_trace(run, values):
    with torch.no_grad():
        return [node.kind() for node in torch.jit.trace(run, values, check_trace=False).graph.nodes()]


def by_fx(**options):
    def seen(run, values):
        with torch.no_grad():
            return [str(node.target) for node in make_fx(run, **options)(*values).graph.nodes]

    return seen


def by_flops(run, values):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(*values)
    return [str(op) for op in counter.get_flop_counts()["Global"]]


WATCHERS = {
    "TorchDispatchMode": by_mode(Dispatched),
    "TorchFunctionMode": by_mode(Called),
    "profiler": by_profiler,
    "torch.jit.trace": by_trace,
    "make_fx": by_fx(),
    "make_fx before dispatch": by_fx(pre_dispatch=True),
    "make_fx of fakes": by_fx(tracing_mode="fake"),
    "FlopCounterMode": by_flops,
}


@pytest.mark.parametrize("watcher", list(WATCHERS))
@pytest.mark.parametrize("op", [*SMALL, "selective_state_update"])
def test_every_mode_sees_every_call(op, watcher):
    if op == "selective_state_update":
        run, values = lambda *x: wmkernels.selective_state_update(*x), update_arguments()
    else:
        run, _, values = small(op, torch.float32)
    seen = WATCHERS[watcher](run, tuple(values))
    expected = op.removesuffix("_step") if "lstm" in op else op
    # A function mode is given the op's handle, which prints as its address.
    assert any(f"wmkernels{mark}{expected}" in name for name in seen for mark in (".", "::")) or (
        watcher == "TorchFunctionMode" and any("wmkernels" in name for name in seen)
    ), seen


@every_op
@pytest.mark.parametrize("trains", [False, True])
def test_a_saved_trace_computes_and_trains(op, trains):
    run, _, values = small(op, torch.float32)
    examples = tuple(x.clone().requires_grad_(trains) for x in values)
    held = io.BytesIO()
    torch.jit.save(torch.jit.trace(run, examples, check_trace=False), held)
    held.seek(0)
    loaded = torch.jit.load(held)
    others = [0.5 * x for x in values]
    torch.testing.assert_close(loaded(*others), run(*others))
    leaves = [x.clone().requires_grad_() for x in values]
    loss = sum(x.square().sum() for x in loaded(*leaves))
    if not trains and op in KEEPS:
        with pytest.raises(RuntimeError, match="exported or traced without gradients"):
            loss.backward()
        return
    found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(sum(x.square().sum() for x in run(*leaves)), leaves))


@pytest.mark.parametrize("op", KEEPS)
def test_a_program_exported_without_gradients_says_so_when_trained(op, compiler):
    run, _, values = small(op, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *values):
            return run(*values)

    with torch.no_grad():
        program = torch.export.export(Module(), tuple(values)).module()
    leaves = [x.clone().requires_grad_() for x in values]
    outputs = program(*leaves)
    torch.testing.assert_close(outputs, run(*leaves))
    with pytest.raises(RuntimeError, match=r"exported or traced without gradients.*export or trace it with gradients"):
        sum(x.sum() for x in outputs).backward()


class Arithmetic(TorchDispatchMode):
    """Counts pointwise operations per element and the terms of sums."""

    POINTWISE = ("add", "sub", "mul", "exp", "softplus", "silu", "softplus_backward", "silu_backward")

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.POINTWISE:
            self.flops += out.numel()
        elif name == "sum":
            self.flops += args[0].numel()
        return out


def counted(mode, run):
    with mode:
        run()
    return mode.flops if isinstance(mode, Arithmetic) else mode.get_total_flops()


def flops(op, backend, mode):
    """(forward, backward)."""
    run, _, values = small(op, torch.float32)
    leaves = [x.clone().requires_grad_() for x in values]
    outputs = []
    forward = counted(mode(), lambda: outputs.extend(run(*leaves, backend=backend)))
    grads = [torch.ones_like(x) for x in outputs]
    return forward, counted(mode(), lambda: torch.autograd.backward(outputs, grads))


def counter():
    return FlopCounterMode(display=False)


@pytest.mark.parametrize(
    "op", ["selective_scan", "selective_step", "linear_scan", "gated_delta_rule", "ssd_scan", "causal_conv1d"]
)
def test_counted_operations_of_scans_are_the_references(op):
    expected_forward, expected_backward = flops(op, "reference", Arithmetic)
    forward, backward = flops(op, None, counter)
    if op == "ssd_scan":  # whose gates are computed before the op
        expected_forward -= SMALL[op]("cpu").tensors["dt"].numel()
    assert forward == expected_forward
    if op == "linear_scan":
        # Autograd fills the gradient of every step's slice with zeros and adds them all.
        assert backward == 3 / 2 * forward
    elif op == "gated_delta_rule":
        # Autograd also adds every step's slice to zeros, much beside a state of 6 numbers.
        assert backward == pytest.approx(expected_backward, rel=0.2)
    elif op == "ssd_scan":
        # The kernel computes the states again, and the outputs for z.
        again = 5 * SMALL[op]("cpu").tensors["B"].shape[3] * SMALL[op]("cpu").tensors["x"].numel()
        assert backward == pytest.approx(expected_backward + again, rel=0.15)
    elif op == "causal_conv1d":
        # The kernel sums silu's argument again; autograd adds every step's window and weight gradient to the others.
        x, weight = (SMALL[op]("cpu").tensors[name] for name in ("x", "weight"))
        again = forward - x.numel()
        added = x.numel() * (weight.shape[1] - 1) + x.shape[2] * weight.numel()
        assert backward - again == pytest.approx(expected_backward - added, rel=0.15)
    else:
        # The kernel computes the states again, autograd reads them.
        assert backward == pytest.approx(expected_backward + 5 / 7 * forward, rel=0.15)


@pytest.mark.parametrize("op", ["conv_lstm", "conv_lstm_step"])
def test_counted_operations_of_a_conv_lstm_are_the_references(op):
    assert flops(op, None, counter) == flops(op, "reference", counter) == flops(op, "chunked", counter)


@pytest.mark.parametrize("keep_gates", [False, True])
def test_counted_operations_without_a_state(keep_gates):
    tensors = small_conv_lstm("cpu", torch.float32).tensors
    found = []
    for backend in (None, "reference"):
        x, *weights = (tensors[name].clone().requires_grad_() for name in ("x", "weight_ih", "weight_hh"))
        outputs, _ = wmkernels.conv_lstm(x, *weights, keep_gates=keep_gates, backend=backend)
        with counter() as count:
            outputs.sum().backward()
        found.append(count.get_total_flops())
    time, batch, _, height, width = tensors["x"].shape
    forward = 2 * time * batch * height * width * sum(math.prod(w.shape) for w in weights)
    assert found[0] == found[1] + (0 if keep_gates else forward)  # gates not kept are computed again


@pytest.mark.parametrize("backend", [None, *dispatch.BACKENDS])
@every_op
def test_meta_tensors_give_shapes_and_gradients(op, backend):
    run, _, values = small(op, torch.float32)
    outputs = run(*(x.to("meta").requires_grad_() for x in values), backend=backend)
    expected = run(*values)
    assert [(x.shape, x.dtype, x.device.type) for x in outputs] == [(x.shape, x.dtype, "meta") for x in expected]
    leaves = [x.to("meta").requires_grad_() for x in values]
    sum(x.sum() for x in run(*leaves, backend=backend)).backward()
    assert [x.grad.shape for x in leaves] == [x.shape for x in values]


def test_meta_tensors_pack_and_update():
    x = {k: v.to("meta") for k, v in SCANS["selective_scan"]("cpu", torch.float32, batch=1).tensors.items()}
    bounds = torch.tensor([0, 1, 4], device="meta")
    x["initial_state"] = x["initial_state"].expand(2, -1, -1)
    out, last = wmkernels.selective_scan(**x, cu_seqlens=bounds, return_last_state=True)
    assert (out.shape, last.shape) == (x["u"].shape, x["initial_state"].shape)
    values = [x.to("meta") for x in update_arguments()]
    assert wmkernels.selective_state_update(*values).shape == values[1].shape


@every_module
def test_modules_on_meta(name, kind):
    module, call, x = module_call(name, kind)
    expected = call(module, x)
    module, x = module.to("meta"), x.to("meta")
    out = call(module, x)
    assert (out.shape, out.device.type) == (expected.shape, "meta")
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@every_module
@pytest.mark.parametrize("exporter", ["TorchScript", "torch.export"])
def test_an_onnx_export_holds_pytorchs_operators_alone(name, kind, exporter, monkeypatch, compiler):
    module, call, x = module_call(name, kind)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return call(self.inner, x)

    def operators():
        if exporter == "TorchScript":
            nodes = torch.jit.trace(Module(), x, check_trace=False).inlined_graph.nodes()
            return [node.kind().split("::")[0] for node in nodes]
        return [str(node.target).split(".")[0] for node in torch.export.export(Module(), (x,)).graph.nodes]

    assert "wmkernels" in operators()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    torch._dynamo.reset()
    assert "wmkernels" not in operators()


def test_a_kernel_by_name_refuses_an_onnx_export(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    gates = torch.rand(2, 3, 5)
    torch.testing.assert_close(wmkernels.linear_scan(gates, gates, backend="cpu"), wmkernels.linear_scan(gates, gates))
    with pytest.raises(RuntimeError, match=r'linear_scan: an ONNX export is not.*backend="reference"'):
        torch.jit.trace(lambda x: wmkernels.linear_scan(x, x, backend="cpu"), gates, check_trace=False)
