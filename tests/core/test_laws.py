"""Laws of every memory on every backend; tests/recurrences.py registers memories.

1. The parallel pass equals the rollout.
2. A split sequence equals the whole: outputs and gradients.
3. reset[t] starts a new sequence at t: no values or gradients cross it.
4. Packed sequences equal separate ones.
5. Batch elements are independent.
6. The state is a tuple of tensors that can be detached, saved and loaded; results share no memory with arguments.
"""

import io
import itertools

import pytest
import recurrences_conv_lstm  # noqa: F401 (memories register themselves)
import recurrences_nn  # noqa: F401
import recurrences_place_memory  # noqa: F401
import recurrences_worldmodel  # noqa: F401
import torch
from backends import targets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recurrences import RECURRENCES, Example
from tolerances import SAME_KERNEL

from wmkernels import chunked, dispatch


def targets_of(memory):
    found = [x for x in targets(memory.op, memory.kernels_only) if x.backend != "chunked" or memory.is_op]
    return list({x.device: x for x in found}.values()) if memory.is_composed else found


CASES = [(memory, target) for memory in RECURRENCES for target in targets_of(memory)]
IDS = [f"{memory.name}-{target.backend}" for memory, target in CASES]
every_memory = pytest.mark.parametrize(("memory", "target"), CASES, ids=IDS)
packable = [(case, name) for case, name in zip(CASES, IDS, strict=True) if case[0].packed]
every_packable_memory = pytest.mark.parametrize(
    ("memory", "target"), [case for case, _ in packable], ids=[name for _, name in packable]
)


@pytest.fixture(autouse=True)
def asked_for(target, monkeypatch):
    monkeypatch.setattr(dispatch, "REQUESTED", target.backend)
    monkeypatch.setattr(chunked, "steps_per_chunk", lambda _: 3)


def draw_example(data, memory, target, batch=None, time=None):
    batch = data.draw(st.integers(1, 3), "batch") if batch is None else batch
    time = data.draw(st.integers(1, memory.longest), "time") if time is None else time
    dtype = data.draw(st.sampled_from(list(memory.dtypes)), "dtype")
    return memory.make(data.draw(memory.configurations()), batch, time, dtype, target.device), dtype


def draw_reset(data, example):
    batch, time = next(iter(example.inputs.values())).shape[:2]
    share = data.draw(st.sampled_from([None, 0.1, 0.3, 1.0]), "share of resets")
    if share is None:
        return None
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    device = next(iter(example.inputs.values())).device
    return (torch.rand((batch, time), generator=generator) < share).to(device)


def random_like(tensors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(x.device) for x in tensors]


def leaves_of(example):
    inputs = {k: v.detach().clone().requires_grad_() for k, v in example.inputs.items()}
    parameters = {k: v.detach().clone().requires_grad_() for k, v in example.parameters.items()}
    return Example(
        example.configuration,
        inputs,
        parameters,
        tuple(x.detach().clone().requires_grad_() for x in example.state),
        example.module,
    )


def results(example, run, with_state=True):
    """Outputs, last state and gradients by name."""
    leaves = leaves_of(example)
    output, state = run(leaves)
    cotangents = random_like((output, *state), seed=1)
    # Empty outputs and a state's counts have no gradient.
    used = [(x, g) for x, g in zip((output, *state), cotangents, strict=True) if x.requires_grad]
    assert output.requires_grad or not output.numel()
    wanted = {**leaves.inputs, **leaves.parameters}
    if with_state:
        wanted |= {f"state {i}": x for i, x in enumerate(leaves.state)}
    outputs, cotangents = zip(*used, strict=True)
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    found = {"output": output.detach()} | {f"last state {i}": x.detach() for i, x in enumerate(state)}
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def assert_same(one, other, dtype):
    assert one.keys() == other.keys()
    for name, expected in other.items():
        assert one[name].shape == expected.shape, name
        assert one[name].dtype == expected.dtype, name
        if expected.numel():
            scale = max(1.0, expected.abs().max().item())
            difference = (one[name] - expected).abs().max().item()
            assert difference <= SAME_KERNEL[dtype] * scale, f"{name} differs by {difference}"


def piece(named, start, end):
    return {name: x[:, start:end] for name, x in named.items()}


def rows(reset, start, end):
    return None if reset is None else reset[:, start:end]


@every_memory
@given(data=st.data())
def test_1_the_parallel_pass_is_the_rollout(memory, target, data):
    example, dtype = draw_example(data, memory, target)
    reset = draw_reset(data, example)
    from_nothing = data.draw(st.booleans(), "no state")

    def parallel(x):
        return memory.parallel(x, x.inputs, x.parameters, None if from_nothing else x.state, reset)

    def rollout(x):
        state, outputs = None if from_nothing else x.state, []
        for t in range(next(iter(x.inputs.values())).shape[1]):
            now = {name: value[:, t] for name, value in x.inputs.items()}
            output, state = memory.step(x, now, x.parameters, state, None if reset is None else reset[:, t])
            outputs.append(output)
        return torch.stack(outputs, 1), state

    # The rollout rounds a constant B to the activations' dtype.
    assume(dtype != torch.bfloat16 or not dict(example.configuration).get("constant_B"))
    assert_same(results(example, parallel), results(example, rollout), dtype)


@every_memory
@given(data=st.data())
def test_2_a_sequence_cut_anywhere_is_the_whole(memory, target, data):
    example, dtype = draw_example(data, memory, target)
    time = next(iter(example.inputs.values())).shape[1]
    reset = draw_reset(data, example)
    cuts = sorted(data.draw(st.lists(st.integers(0, time), max_size=3), "cuts"))

    def whole(x):
        return memory.parallel(x, x.inputs, x.parameters, x.state, reset)

    def in_pieces(x):
        state, outputs = x.state, []
        for start, end in zip([0, *cuts], [*cuts, time], strict=True):
            output, state = memory.parallel(
                x, piece(x.inputs, start, end), x.parameters, state, rows(reset, start, end)
            )
            outputs.append(output)
        return torch.cat(outputs, 1), state

    assert_same(results(example, in_pieces), results(example, whole), dtype)


@every_memory
@given(data=st.data())
def test_3_a_reset_starts_a_new_sequence(memory, target, data):
    example, dtype = draw_example(data, memory, target, batch=1)
    time = next(iter(example.inputs.values())).shape[1]
    starts = sorted(data.draw(st.sets(st.integers(0, time - 1), min_size=1, max_size=4), "resets"))
    reset = torch.zeros((1, time), dtype=torch.bool, device=target.device)
    reset[:, starts] = True

    def with_resets(x):
        return memory.parallel(x, x.inputs, x.parameters, x.state, reset)

    def new_sequences(x):
        state, outputs, bounds = x.state, [], [*starts, time]
        first = bounds[0]
        if first:
            outputs.append(memory.parallel(x, piece(x.inputs, 0, first), x.parameters, state, None)[0])
        for start, end in itertools.pairwise(bounds):
            output, state = memory.parallel(x, piece(x.inputs, start, end), x.parameters, None, None)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    assert_same(results(example, with_resets), results(example, new_sequences), dtype)


@every_memory
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@given(data=st.data())
def test_3_not_even_nan_crosses_a_reset(memory, target, poison, data):
    example, _ = draw_example(data, memory, target, batch=2)
    time = next(iter(example.inputs.values())).shape[1]
    at = data.draw(st.integers(0, time - 1), "reset")
    reset = torch.zeros((2, time), dtype=torch.bool, device=target.device)
    reset[:, at] = True

    def run(before, after, gradient_after):
        """Fills values before and after the reset, and cotangents after it; batch element 1 stays clean."""
        x = leaves_of(example)
        with torch.no_grad():
            for value in x.inputs.values():
                value[0, :at] = before if before is not None else value[0, :at]
                value[0, at:] = after if after is not None else value[0, at:]
            for value in x.state:
                value[0] = before if before is not None else value[0]
        output, state = memory.parallel(x, x.inputs, x.parameters, x.state, reset)
        cotangents = random_like((output, *state))
        for cotangent in cotangents:
            if cotangent is cotangents[0]:
                cotangent[0, at:] = gradient_after if gradient_after is not None else cotangent[0, at:]
            elif gradient_after is not None:
                cotangent[0] = gradient_after
        used = [(x, g) for x, g in zip((output, *state), cotangents, strict=True) if x.requires_grad]
        grads = torch.autograd.grad(
            [x for x, _ in used], [*x.inputs.values(), *x.state], [g for _, g in used], allow_unused=True
        )
        grads = [
            torch.zeros_like(v) if g is None else g for v, g in zip([*x.inputs.values(), *x.state], grads, strict=True)
        ]
        count = len(x.inputs)
        return output, state, grads[:count], grads[count:]

    clean_output, clean_state, clean_inputs, clean_initial = run(None, None, None)
    output, state, grads, _ = run(poison, None, None)
    torch.testing.assert_close(output[:, at:], clean_output[:, at:], rtol=0, atol=0)
    torch.testing.assert_close(output[1], clean_output[1], rtol=0, atol=0)
    torch.testing.assert_close(state, clean_state, rtol=0, atol=0)
    for grad, clean in zip(grads, clean_inputs, strict=True):
        torch.testing.assert_close(grad[:, at:], clean[:, at:], rtol=0, atol=0)
        torch.testing.assert_close(grad[1], clean[1], rtol=0, atol=0)
    for after, gradient_after in ((poison, None), (None, poison)):
        output, _, grads, initial = run(None, after, gradient_after)
        torch.testing.assert_close(output[:, :at], clean_output[:, :at], rtol=0, atol=0)
        for grad, clean in zip(grads, clean_inputs, strict=True):
            torch.testing.assert_close(grad[:, :at], clean[:, :at], rtol=0, atol=0)
            torch.testing.assert_close(grad[1], clean[1], rtol=0, atol=0)
        torch.testing.assert_close(initial, clean_initial, rtol=0, atol=0)


@every_packable_memory
@given(data=st.data())
def test_4_packed_sequences_are_the_same_one_by_one(memory, target, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5), "lengths")
    example, dtype = draw_example(data, memory, target, batch=1, time=sum(lengths))
    state = tuple(torch.cat([x] * len(lengths)) for x in example.state)
    example.state = tuple(random_like(state))
    reset = draw_reset(data, example) if sum(lengths) else None

    def packed(x):
        return memory.parallel(x, x.inputs, x.parameters, x.state, reset, lengths)

    def one_by_one(x):
        outputs, states, start = [], [], 0
        for index, length in enumerate(lengths):
            end = start + length
            own = tuple(s[index : index + 1] for s in x.state)
            output, after = memory.parallel(x, piece(x.inputs, start, end), x.parameters, own, rows(reset, start, end))
            outputs.append(output)
            states.append(after)
            start = end
        return torch.cat(outputs, 1), tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    assert_same(results(example, packed), results(example, one_by_one), dtype)


@every_memory
@given(data=st.data())
def test_5_batch_elements_are_independent(memory, target, data):
    example, dtype = draw_example(data, memory, target, batch=3)
    reset = draw_reset(data, example)

    def together(x):
        return memory.parallel(x, x.inputs, x.parameters, x.state, reset)

    def alone(x):
        outcomes = []
        for i in range(3):
            own = {name: value[i : i + 1] for name, value in x.inputs.items()}
            state = tuple(s[i : i + 1] for s in x.state)
            outcomes.append(memory.parallel(x, own, x.parameters, state, None if reset is None else reset[i : i + 1]))
        outputs, states = zip(*outcomes, strict=True)
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    assert_same(results(example, together), results(example, alone), dtype)


@every_memory
@given(data=st.data())
def test_6_the_state_can_be_detached_saved_and_loaded(memory, target, data):
    example, _ = draw_example(data, memory, target, time=6)
    x = leaves_of(example)
    _, state = memory.parallel(x, piece(x.inputs, 0, 3), x.parameters, None, None)
    assert isinstance(state, tuple)
    assert all(type(part) is torch.Tensor for part in state)
    assert all(part.shape == given.shape for part, given in zip(state, example.state, strict=True))
    file = io.BytesIO()
    torch.save(tuple(part.detach() for part in state), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    rest = piece(x.inputs, 3, 6)
    straight, _ = memory.parallel(x, rest, x.parameters, state, None)
    resumed, _ = memory.parallel(x, rest, x.parameters, loaded, None)
    assert torch.equal(straight, resumed)


@every_memory
@settings(max_examples=2)
@given(data=st.data())
def test_6_results_share_no_memory_with_arguments(memory, target, data):
    for time in (0, 1):
        example, _ = draw_example(data, memory, target, batch=2, time=time)
        x = leaves_of(example)
        calls = [memory.parallel(x, x.inputs, x.parameters, x.state, None)]
        if memory.packed:
            nothing = {name: value[:1, :0] for name, value in x.inputs.items()}
            calls.append(memory.parallel(x, nothing, x.parameters, x.state, None, [0, 0]))
        if time:
            now = {name: value[:, 0] for name, value in x.inputs.items()}
            calls.append(memory.step(x, now, x.parameters, x.state, None))
        arguments = [*x.inputs.values(), *x.parameters.values(), *x.state]
        taken = {value.untyped_storage().data_ptr() for value in arguments if value.numel()}
        for output, state in calls:
            for result in (output, *state):
                assert not result.numel() or result.untyped_storage().data_ptr() not in taken
