"""Every op on 0, -0, subnormal and huge numbers, infinities and NaN, forward and backward.

One argument holds the special values, one per batch element or per channel. Against the float64 reference and the
reference in the same dtype:

- where both are finite, so is the result, and as close as for ordinary numbers;
- where neither is finite, the result is not, except where the reference multiplies zero by infinity and a kernel does
  not: the step's gradient beside an infinite A, and what the delta rule's decay passes on where no state is before it;
- an infinity of an infinite argument has the sign of both.

Left out: where the two references differ, and numbers within EDGE of overflow, since products overflow in another
order.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from conv_lstm_problems import conv_lstm
from place_memory_problems import inverse_of, phases, view_keys
from problems import Problem
from tolerances import SPECIAL_ULPS

import wmkernels

EDGE = 1e-4
VARIANTS = {
    "selective_scan": ["", "options", "reset", "reset options", "constant reset"],
    "selective_step": ["", "options", "reset options"],
    "linear_scan": [
        "",
        "initial reset",
        "reverse reset",
        "initial reverse",
        "channel_last",
        "channel_last reverse reset",
    ],
    "conv_lstm": ["", "state", "options reset", "tiled"],
    "gated_delta_rule": ["", "initial reset"],
    "place_memory": ["", "options", "delta options reset"],
    "ssd_scan": ["", "options", "options reset"],
    "causal_conv1d": ["", "options", "options reset"],
}
EACH = slice(None)
PER_BATCH, PER_CHANNEL = (EACH, 1, -3), (1, EACH, -3)
# Indices of special values in each argument, by argument, or by a word of the variant and argument; elsewhere they are
# the first numbers.
PLACES = {
    "selective_scan": {
        **{name: [PER_BATCH, PER_CHANNEL] for name in ("u", "delta", "z", "initial_state")},
        **{name: [PER_BATCH] for name in "BC"},
        **{name: [(EACH, 1)] for name in ("A", "constant B", "constant C")},
    },
    "selective_step": {
        "state": [PER_BATCH, PER_CHANNEL],
        **{name: [(EACH, 1), (1, EACH)] for name in ("u", "delta", "z")},
        **{name: [(EACH, 1)] for name in "ABC"},
    },
    "linear_scan": {
        **{name: [PER_BATCH, PER_CHANNEL] for name in ("gates", "tokens")},
        **{f"channel_last {name}": [(EACH, 3, 1), (1, 3, EACH)] for name in ("gates", "tokens")},
        "initial_state": [(EACH, 1), (1, EACH)],
    },
    "conv_lstm": {"x": [(EACH, 1, 0, 1, 1)], **{name: [(EACH, 0, 1, 1)] for name in "hc"}},
    "gated_delta_rule": {
        **{name: [(EACH, 1, 1, -3), (1, 1, EACH, -3)] for name in "qkv"},
        **{name: [PER_BATCH] for name in ("gate", "beta")},
        "initial_state": [(EACH, 1, 1, 1), (1, 1, EACH, 1), (1, 1, 1)],
    },
    "place_memory": {
        "values": [(EACH, -3, 1, 1), (1, -3, 1)],
        **{name: [(EACH, -3, 1, 1)] for name in ("phase", "gate")},
        "initial_state": [(EACH, 1, 1, 1), (1, 1, 1)],
        "initial_phase": [(EACH, 1, 1)],
        **{name: [(0,)] for name in ("keys", "inverse")},
    },
    "ssd_scan": {
        **{name: [(EACH, -3, 1, 1), (1, -3, EACH, 1)] for name in ("x", "z")},
        "dt": [(EACH, -3, 1), (1, -3, EACH)],
        **{name: [(EACH, -3, 0, 1)] for name in "BC"},
        **{name: [(EACH,)] for name in ("A", "D", "dt_bias")},
        "initial_state": [(EACH, 1, 1, 1), (1, EACH, 1, 1)],
    },
    "causal_conv1d": {
        **{name: [PER_BATCH, PER_CHANNEL] for name in ("x", "initial_state")},
        "weight": [(EACH, 1)],
        "bias": [(EACH,)],
    },
}


def special_values(dtype, name="", op=""):
    number = torch.finfo(dtype)
    tiny, huge = number.tiny / 16, number.max**0.7
    # A and z reach results through an exponential only, z of an SSD scan through products of matrices as well; of other
    # arguments, products overflow in another order
    greatest = name == "A" or (name == "z" and op != "ssd_scan")
    finite = [0.0, tiny, huge, number.max if greatest else huge / 2, 100.0]
    return [*finite, *(-x for x in finite), math.inf, -math.inf, math.nan]


def ordinary(op, dtype, variant):
    """With a batch element and a channel per special value."""
    generator, count = torch.Generator().manual_seed(2), len(special_values(dtype))

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    options = {}
    if op == "selective_scan":
        tensors = {"u": normal(count, count, 6), "delta": normal(count, count, 6).abs(), "A": -normal(count, 3).abs()}
        varies = "constant" not in variant
        tensors |= {name: normal(count, 3, 6) if varies else normal(count, 3) for name in "BC"}
        if "options" in variant:
            tensors |= {"D": normal(count), "z": normal(count, count, 6), "delta_bias": normal(count)}
            tensors["initial_state"] = normal(count, count, 3)
        options = {"delta_softplus": "options" in variant, "return_last_state": True}
    elif op == "selective_step":
        tensors = {"state": normal(count, count, 3), "u": normal(count, count), "delta": normal(count, count).abs()}
        tensors |= {"A": -normal(count, 3).abs(), "B": normal(count, 3), "C": normal(count, 3)}
        if "options" in variant:
            tensors |= {"D": normal(count), "z": normal(count, count), "delta_bias": normal(count)}
        options = {"delta_softplus": "options" in variant}
    elif op == "linear_scan":
        shape = (count, 6, count) if "channel_last" in variant else (count, count, 6)
        tensors = {"gates": normal(*shape).tanh(), "tokens": normal(*shape)}
        if "initial" in variant:
            tensors["initial_state"] = normal(count, count)
        options = {
            "reverse": "reverse" in variant,
            "channel_last": "channel_last" in variant,
            "return_last_state": True,
        }
    elif op == "gated_delta_rule":
        tensors = {"q": normal(count, 2, count, 6), "k": F.normalize(normal(count, 2, count, 6), dim=2)}
        tensors |= {"v": normal(count, 2, count, 6), "gate": -normal(count, 2, 6).abs()}
        tensors["beta"] = normal(count, 2, 6).sigmoid()
        if "initial" in variant:
            tensors["initial_state"] = normal(count, 2, count, count)
        options = {"return_last_state": True}
    elif op == "ssd_scan":
        tensors = {"x": normal(count, 6, count, 3), "dt": normal(count, 6, count).abs(), "A": -normal(count).abs()}
        tensors |= {name: normal(count, 6, 1, 3) for name in "BC"}
        if "options" in variant:
            tensors |= {"D": normal(count), "z": normal(count, 6, count, 3), "dt_bias": normal(count)}
            tensors["initial_state"] = normal(count, count, 3, 3)
        options = {"dt_softplus": "options" in variant, "return_last_state": True}
    elif op == "causal_conv1d":
        tensors = {"x": normal(count, count, 6), "weight": normal(count, 4)}
        if "options" in variant:
            tensors |= {"bias": normal(count), "initial_state": normal(count, count, 3)}
            options = {"activation": "silu"}
        options["return_last_state"] = True
    elif op == "place_memory":
        keys = view_keys(3, 4, True, generator)
        tensors = {"values": normal(count, 6, 3, 2 * count), "phase": phases([count, 6, 2], 4, generator).to(dtype)}
        tensors["keys"] = keys.to(dtype)
        if "delta" in variant:
            tensors["inverse"] = inverse_of(keys).to(dtype)
        if "options" in variant:
            tensors |= {"gate": normal(count, 6, 3, 2).sigmoid(), "initial_state": normal(count, 2, 8, count)}
            tensors["initial_phase"] = phases([count, 2], 4, generator).to(dtype)
        options = {"return_last_state": True}
    else:
        # "tiled" selects Winograd's transforms
        size, hidden = (8 if "tiled" in variant else 4), 3
        tensors = {"x": normal(count, 2, 2, size, size), "weight_ih": normal(4 * hidden, 2, 3, 3, scale=0.3)}
        tensors["weight_hh"] = normal(4 * hidden, hidden, 3, 3, scale=0.3)
        if "options" in variant:
            tensors |= {"bias": normal(4 * hidden), "peephole": normal(3, hidden)}
        if "options" in variant or "state" in variant:
            state = (count, hidden, size, size)
            tensors |= {"h": normal(*state), "c": normal(*state)}
        options = {"batch_first": True}
    if "reset" in variant:
        tensors["reset"] = torch.zeros(
            (count, tensors["x"].shape[1]) if op == "conv_lstm" else (count, 6), dtype=torch.bool
        )
        tensors["reset"][:, 1 if op == "conv_lstm" else 3] = True
        if op == "place_memory":
            tensors["reset"][::2, 0] = True
        if op == "selective_step":
            tensors["reset"] = torch.ones(count, dtype=torch.bool)
    function = conv_lstm if op == "conv_lstm" else getattr(wmkernels, op)
    layouts, activations = (("contiguous",) * 3, 2) if op == "conv_lstm" else (("contiguous",) * 2, 1)
    return Problem(function, tensors, options, chunk=4, grad_layouts=layouts, activations=activations)


def places(op, name, variant):
    keys = [f"{word} {name}" for word in variant.split()] + [name]
    return next((PLACES[op][key] for key in keys if key in PLACES[op]), [()])


def with_special_values(problem, name, where):
    op = problem.function.__name__
    values = torch.tensor(special_values(problem.dtype, name, op), dtype=torch.float64).to(problem.dtype)
    x = problem.tensors[name].clone()
    filled = x[where].flatten()
    filled[: len(values)] = values[: len(filled)]
    x[where] = filled.view(x[where].shape)
    return dataclasses.replace(problem, tensors={**problem.tensors, name: x})


def kind(x):
    """0: finite, 1: inf, 2: -inf, 3: NaN."""
    return x.isposinf() + 2 * x.isneginf() + 3 * x.isnan()


def of_zero_times_infinity(problem, argument, name):
    """Where a result need not be infinite or NaN."""
    none = torch.tensor(False)
    if argument == "A" and "of delta" in name:
        return ~none
    decayed = name.removeprefix("gradient of ")
    if problem.function is not wmkernels.gated_delta_rule or decayed not in ("q", "k", "gate"):
        return none
    tensors = problem.tensors
    stateless = torch.zeros_like(tensors["gate"][:, 0], dtype=torch.bool) | tensors.get("reset", none)
    if "initial_state" not in tensors:
        stateless[:, 0] = True
    return stateless[:, None] if decayed == "gate" else stateless[:, None, None]  # (batch, 1, 1, time)


def beside(problem, name, expected):
    """The largest number that one of a result may come from by cancellation: a delta rule subtracts what it holds."""
    if problem.function not in (wmkernels.gated_delta_rule, wmkernels.place_memory):
        return 0
    largest = expected.where(expected.isfinite(), 0).abs()
    if name.removeprefix("gradient of ") in ("keys", "inverse"):
        return largest.max()
    return largest.flatten(1).amax(1).view(-1, *[1] * (expected.dim() - 1))  # (batch, 1, ...)


def faults(problem, argument, backend, scales):
    """What breaks a rule of this file."""
    exact, same_dtype, found = problem.fp64_reference(), problem.solve("reference"), problem.solve(backend)
    largest, eps = torch.finfo(problem.dtype).max, torch.finfo(problem.dtype).eps
    infinite = problem.tensors[argument].isinf().any()
    for name, expected in exact.items():
        result, other = found[name].double(), same_dtype[name].double()
        edges = [x.isfinite() & (x.abs() > EDGE * largest) for x in (result, expected, other)]
        here, right = kind(result), kind(expected.to(found[name].dtype))
        counts = (kind(other) == right) & ~(edges[0] | edges[1] | edges[2])
        # 2^t has a relative error of |t| half-ulps
        exponents = expected.abs().clamp(min=1).log2()
        size = scales[name] + expected.abs() * (1 + exponents) + beside(problem, name, expected)
        allowed = SPECIAL_ULPS * eps * size + 4 * (other - expected).abs()
        broken = {
            "is not finite": (right == 0) & (here != 0),
            "is finite": (right != 0) & (here == 0) & ~of_zero_times_infinity(problem, argument, name),
            "has the other sign": (right + here == 3) & (right * here == 2) & infinite,
            "is off": (right == 0) & (here == 0) & ~((result - expected).abs() <= allowed),
        }
        for what, where in broken.items():
            if (where & counts).any():
                at = (where & counts).nonzero()[0].tolist()
                yield f"{name}{at} {what}: {result[tuple(at)]:g}, expected {expected[tuple(at)]:g}"


def check(op, dtype, variant, backend):
    problem, found = ordinary(op, dtype, variant), []
    scales = {name: x.abs().max() for name, x in problem.fp64_reference().items()}
    for name, x in problem.tensors.items():
        for where in places(op, name, variant) if x.is_floating_point() else ():
            special = with_special_values(problem, name, where)
            found += [f"{name}: {fault}" for fault in faults(special, name, backend, scales)]
    assert not found, f"{op} {variant}, {dtype}: " + "\n".join(found)


def overflowing_gates(time, reverse):
    """(gates, tokens, reset): in the second half the state is zero, and products of gates overflow."""
    half, generator = time // 2, torch.Generator().manual_seed(0)
    gates, tokens = torch.full((1, 2, time), 0.5), torch.randn((1, 2, time), generator=generator)
    gates[..., half:], tokens[..., half:] = 1e30, 0.0
    reset = torch.zeros((1, time), dtype=torch.bool)
    reset[:, half] = True
    return gates, tokens, reset


def check_overflowing_gates(backend, time, reverse):
    """The first half as if it were alone, and zeros."""
    gates, tokens, reset = overflowing_gates(time, reverse)
    results = []
    for steps in (slice(0, time), slice(0, time // 2)):
        leaves = [x[..., steps].clone().requires_grad_() for x in (gates, tokens)]
        out = wmkernels.linear_scan(*leaves, reset=reset[:, steps], reverse=reverse, backend=backend)
        results.append([out, *torch.autograd.grad(out[..., : time // 2].square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, F.pad(expected, (0, time - time // 2)))


def cases():
    return [(op, variant) for op, variants in VARIANTS.items() for variant in variants]
