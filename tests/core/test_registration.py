"""torch.library's opcheck."""

import pytest
import torch
from backends import on_every_target
from problems import DTYPES

TRACING = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
WITHOUT_AUTOGRAD = ("test_schema", "test_autograd_registration", "test_faketensor")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "permuted", "channel_last"])


def tensor(shape, dtype, device, layout="contiguous", grad=True):
    values = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    if layout == "permuted":
        order = [*range(1, len(shape)), 0]
        values = values.permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    elif layout == "channel_last" and len(shape) > 2:
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    return values.requires_grad_(grad)


def scan_inputs(dtype, device, layout, constant_B=False, packed=False, extras=True, grad=True):
    batch, channels, state, time = (1 if packed else 2), 4, 3, 7
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def make(*shape, kind=dtype):
        return tensor(shape, kind, device, layout, grad)

    return [
        make(batch, channels, time),
        make(batch, channels, time),
        make(channels, state, kind=parameter),
        make(channels, state, kind=parameter) if constant_B else make(batch, 2, state, time),
        make(batch, 2, state, time),
        make(channels, kind=parameter) if extras else None,
        make(batch, channels, time) if extras else None,
        make(channels, kind=parameter) if extras else None,
        make(2 if packed else batch, channels, state, kind=parameter) if extras else None,
        torch.rand(batch, time, device=device) < 0.3 if extras else None,
        # Chunks of 4 fill every slot of the saved states; others stay unwritten.
        torch.tensor([0, 5, time], device=device) if packed else None,
    ]


@on_every_target("selective_scan", kernels_only=True)
@every_dtype
@every_layout
def test_selective_scan(target, dtype, layout):
    options = (True, layout == "channel_last", 4, target.backend)
    op = torch.ops.wmkernels.selective_scan_forward.default
    plain = layout == "contiguous"
    inputs = scan_inputs(dtype, target.device, layout, constant_B=layout == "permuted", packed=plain, extras=True)
    torch.library.opcheck(op, (*inputs, *options), test_utils=TRACING)
    inputs = [None if x is None else x.detach() for x in inputs]
    out, last, states = op(*inputs, *options)
    backward = torch.ops.wmkernels.selective_scan_backward.default
    gradients = (torch.randn_like(out), torch.randn_like(last))
    torch.library.opcheck(backward, (*gradients, *inputs, states, *options), test_utils=TRACING)
    with_grad = [x if x is None or not x.is_floating_point() else x.requires_grad_() for x in inputs]
    torch.library.opcheck(backward, (*gradients, *with_grad, states, *options), test_utils=WITHOUT_AUTOGRAD)


@on_every_target("selective_scan", kernels_only=True)
def test_selective_scan_without_the_optional_inputs(target):
    inputs = scan_inputs(torch.float32, target.device, "contiguous", extras=False)
    op = torch.ops.wmkernels.selective_scan_forward.default
    for chunk in (0, 4):
        detached = [None if x is None else x.detach() for x in inputs]
        torch.library.opcheck(op, (*detached, False, False, chunk, target.backend), test_utils=TRACING)
    torch.library.opcheck(op, (*inputs, False, False, 4, target.backend), test_utils=TRACING)
    out, _, states = op(*detached, False, False, 4, target.backend)
    torch.library.opcheck(
        torch.ops.wmkernels.selective_scan_backward.default,
        (torch.randn_like(out), None, *detached, states, False, False, 4, target.backend),
        test_utils=TRACING,
    )


def step_inputs(dtype, device, layout, grad=True):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(2, 4, 3), (2, 4), (2, 4), (4, 3), (2, 2, 3), (2, 2, 3), (4,), (2, 4), (4,)]
    kinds = [parameter, dtype, dtype, parameter, dtype, dtype, parameter, dtype, parameter]
    return [tensor(shape, kind, device, layout, grad) for shape, kind in zip(shapes, kinds, strict=True)]


@on_every_target("selective_step", kernels_only=True)
@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_selective_step(target, dtype, layout):
    inputs = step_inputs(dtype, target.device, layout)
    reset = torch.tensor([True, False], device=target.device)
    op = torch.ops.wmkernels.selective_step_forward.default
    torch.library.opcheck(op, (*inputs, reset, True, target.backend), test_utils=TRACING)


@on_every_target("selective_step")
@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_selective_state_update(target, dtype, layout):
    inputs = step_inputs(dtype, target.device, layout, grad=False)
    indices = torch.tensor([1, -1], device=target.device)
    op = torch.ops.wmkernels.selective_state_update_.default
    for state in (inputs[0], inputs[0].to(dtype)):
        arguments = (state.clone(), *inputs[1:], indices, True, target.backend)
        torch.library.opcheck(op, arguments, test_utils=TRACING)


@on_every_target("linear_scan", kernels_only=True)
@every_dtype
@every_layout
def test_linear_scan(target, dtype, layout):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    gates, tokens = (tensor((2, 3, 7), dtype, target.device, layout) for _ in range(2))
    first = tensor((2, 3), state, target.device, layout)
    reset = torch.rand(2, 7, device=target.device) < 0.3
    options = (layout == "permuted", layout == "channel_last", target.backend)
    op = torch.ops.wmkernels.linear_scan_forward.default
    torch.library.opcheck(op, (gates, tokens, first, reset, *options), test_utils=TRACING)
    torch.library.opcheck(op, (gates, tokens, None, None, *options), test_utils=TRACING)
    gates, tokens, first = (x.detach() for x in (gates, tokens, first))
    out, last = op(gates, tokens, first, reset, *options)
    backward = torch.ops.wmkernels.linear_scan_backward.default
    arguments = (torch.randn_like(out), torch.randn_like(last), gates, out, first, reset, *options)
    torch.library.opcheck(backward, arguments, test_utils=TRACING)
    wanting = (*arguments[:2], gates.requires_grad_(), *arguments[3:])
    torch.library.opcheck(backward, wanting, test_utils=WITHOUT_AUTOGRAD)


@on_every_target("gated_delta_rule", kernels_only=True)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "permuted"), (torch.float64, "channel_last")],
    ids=str,
)
def test_gated_delta_rule(target, dtype, layout):
    held = torch.float64 if dtype == torch.float64 else torch.float32
    packed, time = layout == "contiguous", 6
    shapes = {"q": (3, time), "k": (3, time), "v": (5, time), "gate": (time,), "beta": (time,)}
    batch = 1 if packed else 2
    inputs = [
        tensor((batch, 2, *shape), dtype if len(shape) > 1 else held, target.device, layout)
        for shape in shapes.values()
    ]
    inputs.append(tensor((2, 2, 3, 5), held, target.device, layout))
    inputs.append(torch.rand(batch, time, device=target.device) < 0.3)
    inputs.append(torch.tensor([0, 4, time], device=target.device) if packed else None)
    options = (0.5, layout == "channel_last", 4, target.backend)
    op = torch.ops.wmkernels.gated_delta_rule_forward.default
    torch.library.opcheck(op, (*inputs, *options), test_utils=TRACING)
    if packed:
        bare = [x.detach() for x in inputs[:5]]
        torch.library.opcheck(op, (*bare, None, None, None, 0.5, False, 0, target.backend), test_utils=TRACING)
    detached = [None if x is None else x.detach() for x in inputs]
    out, last, *kept = op(*detached, *options)
    backward = torch.ops.wmkernels.gated_delta_rule_backward.default
    arguments = (torch.randn_like(out), torch.randn_like(last), *detached, *kept, *options)
    torch.library.opcheck(backward, arguments, test_utils=TRACING)
    wanting = (*arguments[:2], detached[0].requires_grad_(), *arguments[3:])
    torch.library.opcheck(backward, wanting, test_utils=WITHOUT_AUTOGRAD)


@on_every_target("causal_conv1d", kernels_only=True)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.bfloat16, "permuted"), (torch.float64, "channel_last")],
    ids=str,
)
def test_causal_conv1d(target, dtype, layout):
    held = torch.float64 if dtype == torch.float64 else torch.float32
    packed, time = layout == "contiguous", 6
    batch = 1 if packed else 2
    inputs = [
        tensor((batch, 3, time), dtype, target.device, layout),
        tensor((3, 4), held, target.device, "contiguous"),
        tensor((3,), held, target.device, "contiguous"),
        tensor((2, 3, 3), held, target.device, layout),
        torch.rand(batch, time, device=target.device) < 0.3,
        torch.tensor([0, 4, time], device=target.device) if packed else None,
    ]
    options = (True, layout == "channel_last", target.backend)
    op = torch.ops.wmkernels.causal_conv1d_forward.default
    torch.library.opcheck(op, (*inputs, *options), test_utils=TRACING)
    bare = [x.detach() for x in inputs[:2]]
    torch.library.opcheck(op, (*bare, None, None, None, None, False, False, target.backend), test_utils=TRACING)
    detached = [None if x is None else x.detach() for x in inputs]
    out, last = op(*detached, *options)
    backward = torch.ops.wmkernels.causal_conv1d_backward.default
    arguments = (torch.randn_like(out), torch.randn_like(last), *detached, *options)
    torch.library.opcheck(backward, arguments, test_utils=TRACING)
    wanting = (*arguments[:2], detached[0].requires_grad_(), *arguments[3:])
    torch.library.opcheck(backward, wanting, test_utils=WITHOUT_AUTOGRAD)
