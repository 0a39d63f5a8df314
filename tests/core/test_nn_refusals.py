"""Every refusal of a module begins with its name: constructors, calls and conversions drawn from the signatures."""

import inspect
import math
import re
import typing

import pytest
import torch
from test_refusals import FLAGS, bad_tensors, described

import wmkernels
from wmkernels.nn import convert

OTHERS = (None, -1, 0, 1.5, "", "x", b"x", {}, [], (1, 2, 3), [1], True, 2**31, 2**63, math.nan, math.inf, object())
MODULES = {
    "Mamba": {"d_model": 8},
    "RotaryMamba": {"d_model": 8},
    "Mamba2": {"d_model": 8, "headdim": 4},
    "Mamba3": {"d_model": 8, "headdim": 4},
    "CausalConv1d": {"channels": 4},
    "LocalAttention": {"d_model": 8, "heads": 2},
    "MemoryAttention": {"d_model": 8},
    "ConvLSTM": {"input_size": 2, "hidden_size": 2, "kernel_size": 3},
    "ConvLSTMCell": {"input_size": 2, "hidden_size": 2, "kernel_size": 3},
}


def faults_of(name, calls):
    """(faults, refusals) of ``calls``: (what is wrong, whether it is surely refused, function).

    Projections are ``nn.Linear``, which adapters may replace: inputs of another dtype than theirs are their error.
    """
    faults, refused = [], 0
    for what, surely, call in calls:
        try:
            with torch.no_grad():
                call()
        except Exception as error:
            refused += 1
            if not re.match(rf"({name}|conv_lstm(_step)?): |expected m1 and m2 to have the same dtype", str(error)):
                faults.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if surely:
                faults.append(f"{what} was accepted")
    return faults, refused


def is_surely_wrong(annotation, value):
    kinds = typing.get_args(annotation) or (annotation,)
    if bool in kinds:
        return type(value) is not bool and len(kinds) == 1
    if type(None) in kinds and value is None:
        return False
    if torch.dtype in kinds or torch.device in kinds:
        return value != "meta"
    if str in kinds:
        return not isinstance(value, str)
    return not isinstance(value, int | float | tuple | list) or isinstance(value, bool) or value in (math.nan, math.inf)


@pytest.mark.parametrize("name", MODULES)
def test_every_refusal_of_a_constructor_begins_with_the_name(name):
    kind, good = getattr(wmkernels.nn, name), {**MODULES[name], "device": "meta"}
    kind(**good)
    hints = {}
    for parent in reversed(kind.__mro__):
        if "__init__" in vars(parent) and parent.__module__.startswith("wmkernels"):
            hints |= typing.get_type_hints(inspect.unwrap(parent.__init__))
    for without in ("return", "arguments"):
        hints.pop(without, None)
    calls = [
        (
            f"{argument}, {value!r}",
            is_surely_wrong(annotation, value),
            lambda argument=argument, value=value: kind(**{**good, argument: value}),
        )
        for argument, annotation in hints.items()
        for value in (*OTHERS, *FLAGS, torch.ones(2), torch.int32)
    ]
    calls += [("an unknown argument", True, lambda: kind(**good, unknown=1)), ("no argument", True, kind)]
    faults, refused = faults_of(name, calls)
    assert not faults, "\n".join(faults)
    assert refused > 10 * len(hints)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("method", ["forward", "step"])
def test_every_refusal_of_a_call_begins_with_the_name(name, method):
    module = getattr(wmkernels.nn, name)(**MODULES[name])
    state = module.init_state(2, (4, 4)) if name.startswith("Conv") and "LSTM" in name else module.init_state(2)
    shapes = {
        "Mamba": (2, 3, 8),
        "RotaryMamba": (2, 3, 8),
        "Mamba2": (2, 3, 8),
        "Mamba3": (2, 3, 8),
        "CausalConv1d": (2, 3, 4),
        "LocalAttention": (2, 3, 1, 8),
        "MemoryAttention": (2, 3, 8),
        "ConvLSTM": (3, 2, 2, 4, 4),
    }
    shape = shapes.get(name, (2, 2, 4, 4))
    if method == "step" and name in shapes:
        shape = shape[1:] if name == "ConvLSTM" else (shape[0], *shape[2:])
    call = getattr(module, method)
    parameters = inspect.signature(call).parameters
    first = next(iter(parameters))
    good = {first: torch.randn(shape), "state": state}
    call(**good)
    calls = []
    for argument, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if argument == "state":
            values = [(value, True) for value in (1, "x", [], {}, (None,), torch.ones(2), {"x": torch.ones(1)})]
        elif argument in ("single_step", "time_first"):
            values = [(value, True) for value in FLAGS]
        else:
            values = [*bad_tensors(good.get(argument))]
        calls += [
            (
                f"{argument}, {described(value)}",
                surely,
                lambda argument=argument, value=value: call(**{**good, argument: value}),
            )
            for value, surely in values
        ]
    faults, refused = faults_of(name, calls)
    assert not faults, "\n".join(faults)
    assert refused > 20


@pytest.mark.parametrize("function", ["conv_lstm_from_cell_list", "conv_lstm_from_openstl", "conv_lstm_from_keras"])
def test_every_refusal_of_a_conversion_begins_with_the_name(function):
    call, values = (
        getattr(convert, function),
        [*OTHERS, torch.ones(2), {1: 2}, {"cell_list.0.conv.weight": 3}, [[1], ["x"]]],
    )
    values += [{"cell_list.0.conv_x.0.weight": 3, "cell_list.0.conv_h.0.weight": None}, [None, None], [object()] * 3]
    options = {"recurrent_activation": "sigmoid"} if function.endswith("keras") else {}
    faults, _ = faults_of(
        function, [(repr(value), True, lambda value=value: call(value, **options)) for value in values]
    )
    assert not faults, "\n".join(faults)
