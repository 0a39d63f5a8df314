"""Every refusal of a public function begins with its name: calls drawn from the signatures."""

import inspect
import itertools
import re
import typing
import warnings

import conv_lstm_problems
import numpy
import pytest
import torch
from problems import MAIN
from ssd_problems import STATES
from test_gradients import SMALL
from torch import Tensor

import wmkernels
from wmkernels.registry import OPS

FUNCTIONS = [(op, function) for op, spec in OPS.items() for function in spec.functions]
RENAMED = {"u": "x", "delta": "dt", "delta_bias": "dt_bias", "delta_softplus": "dt_softplus"}


def good_call(op, function):
    """Arguments that run, of every op's own example, with the optional tensors it leaves out."""
    examples = conv_lstm_problems.SMALL if op == "conv_lstm" else SMALL
    arguments = arguments_of(examples.get(function, examples[op])("cpu", torch.float32), function)
    if function == "selective_state_update":
        arguments["state_batch_indices"] = torch.tensor([0, 1])
    else:
        x = next(arguments[name] for name in MAIN if name in arguments)
        shape = x.shape[:-3] if op == "conv_lstm" else (x.shape[0], *x.shape[3 if "q" in arguments else 2 :])
        shape = x.shape[:2] if op in ("place_memory", "ssd_scan") else shape
        shape = shape[:1] if function == "ssd_step" else shape
        arguments["reset"] = torch.zeros(shape, dtype=torch.bool)
    return arguments


def arguments_of(problem, function):
    """By the names of the public function."""
    arguments = {name: x if x is None else x.detach() for name, x in problem.tensors.items()} | problem.options
    if function == "conv_lstm_step" and arguments.pop("batch_first", None) is not None:
        first = 0 if problem.options["batch_first"] is False else (slice(None), 0)
        arguments |= {name: x if x is None else x[first] for name, x in arguments.items() if name in ("x", "reset")}
        del arguments["keep_gates"]
    if function.startswith("conv_lstm"):
        h, c = arguments.pop("h", None), arguments.pop("c", None)
        arguments["state"] = None if h is None else (h, c)
    if function == "gated_delta_rule_step":
        for name in ("return_last_state", "channel_last", "cu_seqlens", "initial_state"):
            arguments.pop(name, None)
        first = (slice(None), 0) if problem.options.get("channel_last") else (..., 0)
        arguments |= {name: x[first] for name, x in arguments.items() if torch.is_tensor(x)}
        state, (batch, heads, d_v) = problem.tensors.get("initial_state"), arguments["v"].shape
        if state is None:
            state = torch.zeros(batch, heads, arguments["k"].shape[-1], d_v, dtype=torch.float64).to(arguments["gate"])
        arguments = {"state": state.detach()[:batch], **arguments}
    if function in ("ssd_scan", "ssd_step"):
        state, *others = (arguments.pop(name, None) for name in STATES)
        if function == "ssd_step":
            arguments = {name: x for name, x in arguments.items() if name not in ("return_last_state", "cu_seqlens")}
            for name in ("x", "dt", "A", "B", "C", "z", "angle", "trapezoid", "reset"):
                if arguments.get(name) is not None and (name != "A" or arguments[name].dim() > 1):
                    arguments[name] = arguments[name][:, 0]
            x, B = arguments["x"], arguments["B"]
            if state is None:
                state = torch.zeros(*x.shape, B.shape[-1], dtype=torch.float64).to(arguments["dt"])
            state, *others = (v if v is None else v[: x.shape[0]] for v in (state, *others))
        if arguments.get("angle") is not None or arguments.get("trapezoid") is not None:
            state = wmkernels.SSDState(state, *others)
        arguments = {"state" if function == "ssd_step" else "initial_state": state, **arguments}
    if function == "causal_conv1d_step":
        for name in ("return_last_state", "cu_seqlens"):
            arguments.pop(name, None)
        first = (slice(None), 0) if problem.options.get("channel_last") else (..., 0)
        arguments |= {name: arguments[name][first] for name in ("x", "reset") if arguments.get(name) is not None}
        state, x, past = arguments.pop("initial_state"), arguments["x"], arguments["weight"].shape[1] - 1
        if state is None:
            shape = (past, x.shape[1]) if problem.options.get("channel_last") else (x.shape[1], past)
            state = torch.zeros(x.shape[0], *shape, dtype=x.dtype)
        arguments = {"state": state[: x.shape[0]], **arguments}
    if function == "selective_state_update":
        arguments.pop("reset", None)
        arguments = {RENAMED.get(name, name): value for name, value in arguments.items()}
    return arguments


def bad_tensors(good):
    """(value, whether it is surely refused) for a tensor argument."""
    good = good.detach() if isinstance(good, Tensor) else torch.zeros(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
        jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
        quantised = torch.quantize_per_tensor(torch.ones(good.shape), 0.1, 0, torch.quint8)
        compressed = torch.ones(2, 2).to_sparse_csr()
    for value in (1, 1.5, "x", b"x", [1.0], (good,), {}, object(), numpy.ones(good.shape), good.numpy, float):
        yield value, True
    yield from ((value, True) for value in (good.to_sparse(), compressed, nested, jagged, quantised))
    yield good.to(torch.complex64), True
    yield good.to("meta"), True
    yield good.to(torch.int16), True
    yield good.to(torch.uint8), True
    yield good[None], True
    yield torch.zeros((), dtype=good.dtype), True
    yield torch.zeros(0, dtype=good.dtype), True
    yield good.double() if good.is_floating_point() else good.float(), False
    yield good.new_zeros([size + 1 for size in good.shape]), False
    yield good.new_zeros([0 for _ in good.shape]), False
    yield good.mT if good.dim() > 1 else good[:1], False


FLAGS = (None, 0, 1, "yes", 1.0, [True], (), numpy.bool_(True), torch.tensor(True))
BACKENDS = (1, False, ["cpu"], ("cpu",), b"cpu", "", "CPU", "tpu", torch.float32, {}, numpy.str_("cpu"))
PAIRS = ((), (1, 2.5), (1, None), (None, None), [1, 2, 3], [[1], [1]], (torch.zeros(1),), (torch.zeros(1), None))
OTHERS = (1.5, "x", b"x", {}, -1, 2**31, 2**63, 2**200, True, float("nan"), object(), numpy.ones(2), torch.tensor(1))


def described(value):
    if not isinstance(value, Tensor):
        return repr(value)
    shape = "" if value.is_nested else f" {tuple(value.shape)}"
    return f"{value.layout} {value.dtype}{shape} on {value.device}"


def bad_values(annotation, good):
    options = typing.get_args(annotation) or (annotation,)
    if Tensor in options:
        yield from bad_tensors(good)
        if type(None) not in options:
            yield None, True
    elif bool in options:
        yield from ((value, True) for value in FLAGS)
    elif str in options:
        yield from ((value, True) for value in BACKENDS)
    else:
        yield from ((value, False) for value in PAIRS + OTHERS)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "function"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])
def test_every_refusal_begins_with_the_name(op, function, backend):
    call, arguments = getattr(wmkernels, function), good_call(op, function)
    hints, faults, refused = typing.get_type_hints(call), [], 0
    if "backend" in hints:
        arguments["backend"] = backend
    with torch.no_grad():
        call(**{name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()})
        for name in inspect.signature(call).parameters:
            for value, surely in bad_values(hints[name], arguments.get(name)):
                try:
                    call(**{**arguments, name: value})
                except Exception as error:
                    refused += 1
                    if not str(error).startswith(f"{function}: "):
                        faults.append(f"{name}, {described(value)}: {type(error).__name__}: {error}")
                else:
                    if surely:
                        faults.append(f"{name}, {described(value)}, was accepted")
    assert not faults, "\n".join(faults)
    assert refused > 20 * len(arguments)


def with_gradients(op, function, change):
    """Gradients where a saved-tensor hook makes ``change(number, tensor)`` of the saved tensors."""
    torch.manual_seed(0)
    arguments, leaves, count = good_call(op, function), [], itertools.count()
    for name, value in arguments.items():
        pair = value if isinstance(value, tuple) else (value,)
        made = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in pair if isinstance(x, Tensor))
        leaves += [x for x in made if x.requires_grad]
        arguments[name] = (made if isinstance(value, tuple) else made[0]) if made else value
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: change(next(count), x))
    arguments["backend"] = "cpu"
    with hooks:
        outputs = getattr(wmkernels, function)(**arguments)
    flat = [x for x in torch.utils._pytree.tree_leaves(outputs) if x.requires_grad]
    return torch.autograd.grad([x.sum() for x in flat], leaves, allow_unused=True), next(count)


# PyTorch's own operators come before the op of ssd_scan, and their saved tensors are not checked.
DIFFERENTIABLE = [(op, name) for op, name in FUNCTIONS if name != "selective_state_update" and op != "ssd_scan"]
CHANGES = {
    "shape": lambda x: x.new_zeros([size + 1 for size in x.shape]),
    "fewer": lambda x: x[:0],
    "dtype": lambda x: x.double() if x.is_floating_point() else x.float(),
    "device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize(("op", "function"), DIFFERENTIABLE, ids=[name for _, name in DIFFERENTIABLE])
def test_what_a_hook_makes_of_a_saved_tensor_is_refused_or_read_right(op, function):
    expected, saved = with_gradients(op, function, lambda number, x: x)
    assert saved >= 4
    strided, _ = with_gradients(op, function, lambda number, x: x.mT.contiguous().mT if x.dim() > 1 else x)
    torch.testing.assert_close(strided, expected)
    for number in range(saved):
        for how, change in CHANGES.items():
            seen = []

            def changed(index, x, chosen=number, change=change, seen=seen):
                if index == chosen and x.numel():
                    seen.append(x)
                    return change(x)
                return x

            try:
                with_gradients(op, function, changed)
            except RuntimeError as error:
                assert re.match(rf"{op}\w*: \w+, saved for the backward pass, came back as ", str(error)), how
            else:
                assert not seen, how


def freed(like, offset):
    """As ``like``, its storage freed, as sharded parameters are between two uses."""
    tensor = torch.zeros(like.numel() + offset, dtype=like.dtype)[offset:].view(like.shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def message_of(function, arguments):
    """Not in the test's own frame: printing a freed tensor crashes PyTorch."""
    try:
        with torch.no_grad():
            getattr(wmkernels, function)(**arguments)
    except Exception as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("op", "function"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])
@pytest.mark.parametrize("offset", [0, 3])
def test_freed_memory_is_an_error_and_not_an_absent_tensor(op, function, offset):
    arguments, faults = good_call(op, function), []
    if function == "selective_state_update":
        del arguments["state_batch_indices"]
    else:
        arguments["backend"] = "cpu"
    for name, value in arguments.items():
        for index, x in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(x, Tensor):
                changed = freed(x, offset)
                if isinstance(value, tuple):
                    changed = (*value[:index], changed, *value[index + 1 :])
                message = message_of(function, {**arguments, name: changed})
                changed = None
                # PyTorch's own error where a view of the argument is taken before.
                if not re.match(rf"{op}: the memory of \w+ was freed|setStorage: .* storage of size 0", message):
                    faults.append(f"{name}: {message}")
    assert not faults, "\n".join(faults)
