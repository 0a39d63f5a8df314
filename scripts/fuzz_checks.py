"""What fuzz.py checks of random calls.

A check takes a recorder and a seed. Imported by the worker, whose path has the tests.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import random
import typing
from collections.abc import Callable
from typing import Any
from unittest import mock

import backends
import hypothesis
import special_values
import test_laws
import test_refusals
import torch
from causal_conv_problems import causal_convs
from conv_lstm_problems import conv_lstms
from delta_rule_problems import delta_rules
from hypothesis import strategies as st
from place_memory_problems import place_memories
from problems import Problem, assert_as_accurate_as_the_reference, laid_out, linear_scans, scans, steps
from ssd_problems import ssd_scans
from test_concurrency import torch_threads
from test_kernels_match_reference import instruction_set
from torch.utils import _pytree as pytree

import wmkernels
from wmkernels import chunked, dispatch

EXAMPLES = 25  # per round: Hypothesis begins each with small ones
SUMMED_PER_THREAD = ("weight_ih", "weight_hh", "bias", "peephole")  # gradients of the ConvLSTM
PRODUCTS_IN_PYTORCH = ("conv_lstm", "gated_delta_rule", "ssd_scan")  # chunked: PyTorch divides them among threads
PROBLEMS = {
    "selective_scan": scans,
    "selective_step": steps,
    "linear_scan": linear_scans,
    "gated_delta_rule": delta_rules,
    "place_memory": place_memories,
    "conv_lstm": conv_lstms,
    "ssd_scan": ssd_scans,
    "causal_conv1d": causal_convs,
}
Check = Callable[["Recorder", int], None]


class Recorder:
    """Reports cases to the parent as lines of JSON, before they run."""

    def __init__(self) -> None:
        self.cases: set[int] = set()
        self.number = 0
        self.last = ""

    def case(self, description: str) -> None:
        self.number += 1
        self.last = description
        self.cases.add(hash(description))
        print(json.dumps({"running": description[:2000]}), flush=True)


def checks() -> dict[str, Check]:
    """By name, each with the number of examples of a round bound late."""
    found: dict[str, Check] = {}
    for op in PROBLEMS:
        for backend, device in backends.targets(op, without=("reference",)):
            if device == "cpu":
                levels = backends.instruction_sets() if backend == "cpu" else [""]
                for level in levels:
                    name = f"{op} {backend} {level}".strip()
                    found[name] = functools.partial(check_values, op, backend, level)
            if device == "cpu":
                found[f"special values of {op} {backend}"] = functools.partial(check_special_values, op, backend)
    for op, function in test_refusals.FUNCTIONS:
        found[f"bad calls of {function}"] = functools.partial(check_bad_calls, op, function)
    found["selective_state_update"] = check_state_update
    return found | laws()


def check_values(op: str, backend: str, level: str, recorder: Recorder, seed: int) -> None:
    """A kernel is as accurate as the reference, deterministic over threads, and leaves its inputs alone."""

    def check(problem: Problem) -> None:
        recorder.case(f"{problem} on {backend} {level}")
        before = {name: x.clone() for name, x in problem.tensors.items() if x is not None}
        assert_as_accurate_as_the_reference(problem, backend)
        one = problem.solve(backend)
        with torch_threads(3 if torch.get_num_threads() == 1 else 1):
            other = problem.solve(backend)
        for name, value in one.items():
            summed = op == "conv_lstm" and name.endswith(SUMMED_PER_THREAD)
            summed = summed or (backend == "chunked" and op in PRODUCTS_IN_PYTORCH)
            assert summed or same_bits(value, other[name]), f"{name} depends on the number of threads"
        for name, value in before.items():
            assert same_bits(problem.tensors[name], value), f"{name}, an input, was changed"

    with instruction_set(level) if level else contextlib.nullcontext():
        examples(PROBLEMS[op](), check, seed)


def check_state_update(recorder: Recorder, seed: int) -> None:
    """The update in place equals a step of the rows it names; other rows keep their bits."""

    def check(drawn: tuple[Problem, int, bool, str]) -> None:
        problem, extra, indexed, layout = drawn
        tensors = dict(problem.tensors)
        tensors.pop("reset")
        softplus, rows = problem.options["delta_softplus"], tensors["state"].shape[0]
        generator = torch.Generator().manual_seed(problem.seed)
        recorder.case(f"selective_state_update of {problem}, indexed={indexed}, {extra} more rows, state {layout}")
        state, indices = tensors["state"].contiguous(), None
        if indexed:
            more = torch.randn((extra, *state.shape[1:]), generator=generator, dtype=torch.float64).to(state.dtype)
            indices = torch.randperm(rows + extra, generator=generator)[:rows].to(torch.int32)
            indices[torch.rand(rows, generator=generator) < 0.2] = -1
            state = torch.cat((state, more))
        named = indices is None or indices >= 0
        taken = torch.arange(rows) if indices is None else indices.clamp(min=0).long()
        # The step keeps state and accumulation in float32, as the update does before it rounds to the state's dtype.
        expected, new = wmkernels.selective_step(
            **{**tensors, "state": state[taken]}, delta_softplus=softplus, backend="reference"
        )
        held = laid_out(state, layout, problem.seed)
        before = held.clone()
        positional = [tensors[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        out = wmkernels.selective_state_update(held, *positional, softplus, indices)
        kept = torch.ones(len(held), dtype=torch.bool)
        kept[taken[named] if indices is not None else taken] = False
        assert same_bits(held[kept], before[kept]), "a row that was not named changed"
        if indices is not None:
            assert (out[~named] == 0).all(), "a negative index gave an output"
            expected, new, out = expected[named], new[named], out[named]
        close(out, expected, "the output")
        close(held[taken[named] if indices is not None else taken], new.to(held.dtype), "the new state")

    drawn = st.tuples(steps(), st.integers(0, 3), st.booleans(), st.sampled_from(["contiguous", "permuted", "strided"]))
    examples(drawn, check, seed)


def check_special_values(op: str, backend: str, recorder: Recorder, seed: int) -> None:
    """A number that is infinite, NaN, huge or tiny anywhere in an argument: results are finite where they should be.

    A huge number leaves little of the others in the sums it takes part in, so values are not compared.
    """

    def check(drawn: tuple[Problem, int]) -> None:
        problem, number = drawn
        rng = random.Random(number)
        # zeros around a map times an infinite weight are NaN, or left out
        names = [name for name in problem.leaves() if not name.startswith("weight")]
        name = rng.choice(names)
        x = problem.tensors[name].clone()
        place, value = (
            tuple(rng.randrange(size) for size in x.shape),
            rng.choice(special_values.special_values(x.dtype)),
        )
        x[place] = value
        recorder.case(f"{name}{list(place)} = {value:g} in {problem} on {backend}")
        # a kernel cannot know that nobody asked for a gradient: zero times infinity
        special = dataclasses.replace(problem, tensors={**problem.tensors, name: x}, unused_output=None)
        exact, same_dtype, found = special.fp64_reference(), special.solve("reference"), special.solve(backend)
        for result, expected in exact.items():
            edge = special_values.EDGE * torch.finfo(found[result].dtype).max
            finite = (expected.abs() < edge) & (same_dtype[result].abs() < edge)
            wrong = finite & ~found[result].isfinite()
            assert not wrong.any(), (
                f"{result}{wrong.nonzero()[0].tolist()} is not finite, expected {expected[wrong][0]}"
            )

    # differences of the tiled path overflow where sums do not
    problems = conv_lstms(max_size=7) if op == "conv_lstm" else PROBLEMS[op]()
    examples(st.tuples(problems, st.integers(0, 2**16)), check, seed)


def check_bad_calls(op: str, function: str, recorder: Recorder, seed: int) -> None:
    """A call is refused in its own words, or gives what the reference gives of it: shapes and dtypes."""
    call = getattr(wmkernels, function)
    hints = typing.get_type_hints(call)
    names = list(inspect.signature(call).parameters)

    def outcome(arguments: dict[str, Any]) -> Any:
        def differentiable(x: Any) -> Any:
            return x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        try:
            outputs = call(**{name: differentiable(value) for name, value in arguments.items()})
        except Exception as error:
            assert str(error).startswith(f"{function}: "), f"{type(error).__name__}: {error}"
            return None
        leaves = [x for x in pytree.tree_leaves(outputs) if x is not None]
        torch.autograd.backward([x.sum() for x in leaves if x.requires_grad])
        return [(tuple(x.shape), x.dtype) for x in leaves]

    def check(drawn: tuple[Problem, int, int]) -> None:
        problem, changes, number = drawn
        rng = random.Random(number)
        arguments = test_refusals.arguments_of(problem, function)
        changed = rng.sample(names, changes)
        for name in changed:
            good = arguments.get(name)
            if isinstance(good, torch.Tensor) and rng.random() < 0.5:
                arguments[name] = misshapen(good, rng)
            else:
                arguments[name] = rng.choice([value for value, _ in test_refusals.bad_values(hints[name], good)])
        shown = ", ".join(f"{name}={test_refusals.described(arguments[name])}" for name in changed)
        recorder.case(f"{function} with {shown}, of {problem}")
        found = outcome(arguments)
        if found is not None and "backend" in hints:
            expected = outcome({**arguments, "backend": "reference"})
            assert found == expected, f"gave {found}, the reference {expected}"

    examples(st.tuples(PROBLEMS[op](), st.integers(1, 2), st.integers(0, 2**16)), check, seed)


def misshapen(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A few changes of shape, strides and dtype."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        dim = rng.randrange(x.dim()) if x.dim() else None
        ways = [lambda x: x[None], lambda x: x.to(rng.choice([torch.float64, torch.float16, torch.int32, torch.bool]))]
        if dim is not None:
            ways += [
                lambda x, dim=dim: x.narrow(dim, 0, rng.randint(0, x.shape[dim])),
                lambda x, dim=dim: torch.cat((x, x), dim),
                lambda x, dim=dim: x.transpose(dim, rng.randrange(x.dim())),
                lambda x, dim=dim: x.narrow(dim, 0, min(1, x.shape[dim])),
                lambda x, dim=dim: x.sum(dim),
                lambda x, dim=dim: x.movedim(dim, 0).unsqueeze(-1),
                lambda x: x.expand(rng.randint(1, 3), *x.shape),
                lambda x: x.flatten(),
            ]
        x = rng.choice(ways)(x)
    return x


def close(found: Any, expected: Any, what: str) -> None:
    if expected.numel() == 0:
        return
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    scale = expected.abs().max().item()
    error = (found.double() - expected.double()).abs().max().item()
    assert error <= 64 * eps * scale + 1e-30, f"{what} differs by {error:.3g} of {scale:.3g}"


def laws() -> dict[str, Check]:
    """Of tests/core/test_laws.py, on the backend of each case."""
    found: dict[str, Check] = {}
    for (memory, target), name in zip(test_laws.CASES, test_laws.IDS, strict=True):
        if target.device == "cpu" and target.backend != "reference":
            found[f"laws of {name}"] = functools.partial(check_laws, memory, target)
    return found


def check_laws(memory: Any, target: Any, recorder: Recorder, seed: int) -> None:
    def bound(body: Any, name: str, poison: dict[str, float]) -> Callable[[Any], None]:
        def check(data: Any) -> None:
            recorder.case(f"{name} of {memory.name} on {target.backend}, seed {seed}, case {recorder.number}")
            body(memory=memory, target=target, data=data, **poison)

        return check

    for name, test in vars(test_laws).items():
        if not name.startswith("test_") or not hasattr(test, "hypothesis"):
            continue
        body = test.hypothesis.inner_test
        parameters = set(inspect.signature(body).parameters) - {"memory", "target", "data"}
        if parameters - {"poison"} or ("packed" in name and not memory.packed):
            continue
        poison = {"poison": random.Random(seed).choice([float("nan"), float("inf")])} if parameters else {}
        with (
            mock.patch.object(dispatch, "REQUESTED", target.backend),
            mock.patch.object(chunked, "steps_per_chunk", lambda _: 3),
        ):
            examples(st.data(), bound(body, name, poison), seed, max(2, EXAMPLES // 6))


def examples(strategy: Any, check: Callable[[Any], None], seed: int, number: int = EXAMPLES) -> None:
    """Runs and, on a failure, shrinks random examples."""
    hypothesis.seed(seed)(
        hypothesis.settings(
            max_examples=number,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )(hypothesis.given(strategy)(check))
    )()


def same_bits(one: Any, other: Any) -> bool:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    kind = whole[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))
