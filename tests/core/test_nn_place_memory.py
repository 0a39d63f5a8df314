"""nn.PlaceMemory: laws of a map that stays where it is, and that each turns red on an error planted for it."""

import numpy as np
import pytest
import torch
from backends import on_every_target

from wmkernels.nn import PlaceMemory, lattice
from wmkernels.nn import place_memory as module

PERIOD = 7
GRID = torch.tensor([[i, j] for i in range(-1, 2) for j in range(-1, 2)])
MOVES = torch.tensor([[i, j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
FLOATS = (torch.float32, torch.float64)
EPS = torch.finfo(torch.float32).eps
every_target = on_every_target("place_memory")


def memory_of(target=None, channels=4, frequencies=None, **options):
    options |= {} if target is None else {"backend": target.backend, "device": target.device}
    return PlaceMemory(channels, GRID, lattice(PERIOD) if frequencies is None else frequencies, **options)


def cells(position):
    """Indices into a flat world of the places in view."""
    at = (position[..., None, :] + GRID) % PERIOD
    return at[..., 0] * PERIOD + at[..., 1]


def check_returns(memory, steps=200):
    """What comes back into view is read as it was last written, and what was never seen as zero."""
    generator = torch.Generator().manual_seed(0)
    world = torch.randn(PERIOD**2, 4, generator=generator)
    moved = torch.randint(-1, 2, (1, steps, 2), generator=generator)
    after = cells(moved[0].cumsum(0))
    written = cells(moved[0].cumsum(0) - moved[0])
    read, state = memory(world[written][None].to(memory.keys.device), moved.float().to(memory.keys.device))
    held = torch.zeros_like(world)
    for t in range(steps):
        held[written[t]] = world[written[t]]
        assert (read[0, t].cpu() - held[after[t]]).abs().max() < 1e-4
    assert (held == world).all()
    torch.testing.assert_close(memory.read(state, GRID), read[:, -1])


def check_that_others_stay(memory, writes=1024):
    """Read-outs of places that are not written move by at most 8 eps sqrt(writes + rows) times the largest value."""
    generator = torch.Generator().manual_seed(1)
    state = memory.write(memory.init_state(1), [[3, 3]], torch.ones(1, 1, 4))
    before = memory.read(state, [[3, 3]])
    moved = torch.randint(-1, 2, (1, writes, 2), generator=generator).float()
    moved[:, 1::2] = -moved[:, : writes - 1 : 2]  # the view reaches to 2
    moved[:, writes // 2 * 2 :] = 0
    values = torch.randn(1, writes, len(GRID), 4, generator=generator)
    _, state = memory(values, moved, state)
    change = (memory.read(state, [[3, 3]]) - before).abs().max().item()
    rows = state["map"].shape[2]
    bound = 8 * EPS * (writes + rows) ** 0.5 * values.abs().max().item()
    assert change <= bound, f"moved by {change}, at most {bound}"


def check_that_a_shut_gate_keeps_the_state(memory):
    values, moved = torch.randn(2, 30, len(GRID), 4), torch.randn(2, 30, 2)
    gate = torch.rand(2, 30, len(GRID), memory.groups)
    _, state = memory(values, moved, gate=gate)
    _, after = memory(values, moved, state, gate=torch.zeros_like(gate))
    assert torch.equal(after["map"].view(torch.int32), state["map"].view(torch.int32))
    assert not torch.equal(after["angle"], state["angle"])


@every_target
def test_a_place_reads_back_what_was_last_written_wherever_the_observer_went(target):
    check_returns(memory_of(target))


@every_target
def test_writes_elsewhere_leave_a_place_as_it_was(target):
    memory = memory_of(target)
    check_that_others_stay(memory)
    check_that_others_stay(memory, 16)


@pytest.mark.parametrize("period", [PERIOD, 25])
def test_few_writes_elsewhere_leave_a_place_as_it_was(period):
    memory = memory_of(frequencies=lattice(period))
    for writes in range(1, 31):
        check_that_others_stay(memory, writes)


@every_target
@pytest.mark.parametrize("write", ["delta", "sum"])
def test_a_shut_gate_keeps_the_state_bit_for_bit(target, write):
    check_that_a_shut_gate_keeps_the_state(memory_of(target, velocities=[[0, 0], [0, 1]], write=write))


def test_a_planted_wrong_turn_is_found(monkeypatch):
    right = PlaceMemory._turn

    def wrong(self, *arguments):
        turn = right(self, *arguments).clone()
        turn[:, 9, :, 3] += 0.1  # one frequency of one step
        return turn

    monkeypatch.setattr(PlaceMemory, "_turn", wrong)
    with pytest.raises(AssertionError):
        check_returns(memory_of())


def test_a_planted_skipped_write_is_found(monkeypatch):
    right = module.place_memory

    def skips(values, phase, keys, inverse, gate, **options):
        gate = torch.ones(*values.shape[:3], 1)
        gate[:, 0] = 0
        return right(values, phase, keys, inverse, gate, **options)

    monkeypatch.setattr(module, "place_memory", skips)
    with pytest.raises(AssertionError):
        check_returns(memory_of())


def test_a_planted_aliased_lattice_is_found():
    aliased = memory_of(frequencies=lattice(5))  # (3, 3) is (-2, -2) there
    with pytest.raises(AssertionError, match="moved by"):
        check_that_others_stay(aliased)
    with pytest.raises(AssertionError):
        check_returns(aliased)


def test_a_planted_write_behind_a_shut_gate_is_found(monkeypatch):
    right = module.place_memory
    monkeypatch.setattr(module, "place_memory", lambda *x, **options: right(*x[:4], x[4] + 1e-6, **options))
    with pytest.raises(AssertionError):
        check_that_a_shut_gate_keeps_the_state(memory_of())


def test_a_complete_lattice_has_orthogonal_keys():
    for period in (1, 2, 3, 4, 7, [3, 4]):
        frequencies = lattice(period)
        size = [period] * 2 if isinstance(period, int) else period
        places = torch.cartesian_prod(*(torch.arange(side) for side in size))
        memory = PlaceMemory(1, places, frequencies, dtype=torch.float64)
        gram = memory.keys @ memory.keys.mT
        torch.testing.assert_close(gram, torch.eye(len(places), dtype=torch.float64), rtol=0, atol=1e-12)
        norms = (frequencies**2).sum(1)
        assert (norms.diff() > -1e-9).all() or not isinstance(period, int)
    assert torch.equal(lattice(7, 5), lattice(7)[:5])


WIDE = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)).double()
DEPENDENT = {
    "more places than rows": (lattice(5, 7), WIDE),
    "few frequencies": (lattice(25, 40), WIDE),
    "nearly coinciding": (lattice(7), torch.cat([WIDE, WIDE[:1] + 1e-4])),
    "coinciding": (lattice(3), WIDE),
}


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("case", list(DEPENDENT))
def test_views_of_dependent_keys_are_read_in_float32_as_in_float64(case, ridge):
    frequencies, offsets = DEPENDENT[case]
    values, moved = torch.randn(1, 200, len(offsets), 4), torch.randint(-1, 2, (1, 200, 2)).float()
    narrow, wide = (PlaceMemory(4, offsets, frequencies, ridge=ridge, dtype=t) for t in (torch.float32, torch.float64))
    read, state = narrow(values, moved)
    expected, other = wide(values.double(), moved)
    torch.testing.assert_close(read.double(), expected, rtol=0, atol=1e-3)
    read = narrow.read(narrow.write(state, offsets, values[:, 0]), offsets)
    expected = wide.read(wide.write(other, offsets, values[:, 0].double()), offsets)
    torch.testing.assert_close(read.double(), expected, rtol=0, atol=1e-3)


def test_the_ridge_of_independent_keys_is_the_one_given():
    memory = memory_of(ridge=0.25, dtype=torch.float64)
    torch.testing.assert_close(memory.inverse, 0.8 * torch.eye(9, dtype=torch.float64))


def test_reading_and_writing_anywhere():
    memory = memory_of(velocities=[[0, 0], [1, 0]])
    _, state = memory(torch.randn(2, 5, 9, 4), torch.randn(2, 5, 2).round())
    values = torch.randn(2, 3, 4)
    far = torch.tensor([[[2, 3], [-3, 0], [0, 0]], [[1, 1], [3, 3], [0, 2]]])  # another view per batch element
    other = [[0, 3]]
    after = memory.write(state, far, values)
    torch.testing.assert_close(memory.read(after, far), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(memory.read(after, other), memory.read(state, other), rtol=0, atol=1e-5)
    half = memory.write(state, far, values, torch.full((2, 3), 0.5))
    torch.testing.assert_close(memory.read(half, far), (memory.read(state, far) + values) / 2, rtol=0, atol=1e-5)
    for index in range(2):
        one = {name: x[index : index + 1] for name, x in after.items()}
        torch.testing.assert_close(memory.read(one, far[index]), values[index : index + 1], rtol=0, atol=1e-5)


def test_groups_drift_by_their_velocities_and_by_the_time_that_passed():
    memory = memory_of(channels=2, velocities=[[0, 0], [0, 1]])
    state = memory.write(memory.init_state(1), [[0, 0]], torch.ones(1, 1, 2))
    empty, shut = torch.zeros(1, 3, 9, 2), torch.zeros(1, 3, 9)
    _, later = memory(empty, None, state, gate=shut)
    expected = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(memory.read(later, [[0, 0], [0, 3]]), expected, rtol=0, atol=1e-5)
    _, at_once = memory.step(empty[:, 0], None, state, gate=shut[:, 0], elapsed=torch.tensor([3.0]))
    torch.testing.assert_close(at_once["angle"], later["angle"])
    assert torch.equal(at_once["map"], later["map"])


def test_weights_of_one_move_are_that_move_and_mixtures_have_bounded_gradients():
    memory = memory_of(moves=MOVES)
    values, chosen = torch.randn(2, 8, 9, 4), torch.randint(9, (2, 8))
    one_hot = torch.nn.functional.one_hot(chosen, 9).float()
    read, state = memory(values, weights=one_hot)
    expected, other = memory(values, MOVES[chosen].float())
    torch.testing.assert_close(read, expected)
    weights = torch.full((2, 8, 9), 1 / 9, requires_grad=True)  # some of the mean directions vanish
    memory(values, weights=weights)[0].square().sum().backward()
    assert weights.grad.isfinite().all()
    assert weights.grad.abs().max() > 0
    torch.testing.assert_close(memory.read(state, GRID), memory.read(other, GRID))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_of_16_bits_keeps_frequencies_and_angles(dtype):
    memory, narrow = memory_of(), memory_of().to(dtype)
    assert narrow.frequencies.dtype == torch.float64
    assert narrow.init_state(1)["angle"].dtype == torch.float64
    values, moved = torch.randn(2, 20, 9, 4).to(dtype), torch.randint(-1, 2, (2, 20, 2)).float()
    read, state = narrow(values, moved)
    expected, same = memory(values.float(), moved)
    assert (read.dtype, state["map"].dtype) == (dtype, torch.float32)
    assert torch.equal(read, expected.to(dtype))
    assert torch.equal(state["map"], same["map"])
    assert memory.double().init_state(1)["map"].dtype == torch.float64


def test_the_angle_is_exact_after_a_million_steps():
    memory = memory_of()
    state = {**memory.init_state(1), "map": torch.randn(1, 1, 50, 4)}
    steps = 2**20
    there = memory.init_state(1)
    _, total = memory.step(torch.zeros(1, 9, 4), torch.full((1, 2), float(steps)), there)
    moved = torch.ones(1, 2**13, 2)
    for _ in range(steps // 2**13):
        turn = memory._turn(torch.zeros(1, 2**13, 9, 4), moved, None, None)
        state["angle"] = (state["angle"] + turn.sum(1)).remainder(module.TURN)
    difference = (state["angle"] - total["angle"]).remainder(module.TURN)
    assert torch.minimum(difference, module.TURN - difference).max() < 1e-7


def test_reading_ahead_is_the_read_of_a_move_that_is_not_made():
    memory = memory_of()
    values = torch.randn(2, 6, 9, 4)
    moved, ahead = (torch.randint(-1, 2, (2, 6, 2)).float() for _ in range(2))
    reset, gate = torch.rand(2, 6) < 0.3, torch.rand(2, 6, 9)
    read, state = memory(values, moved, reset=reset, gate=gate, ahead=ahead)
    _, expected = memory(values, moved, reset=reset, gate=gate)
    torch.testing.assert_close(state, expected)
    before = memory.init_state(2)
    for t in range(6):
        guessed, _ = memory.step(values[:, t], ahead[:, t], before, reset[:, t], gate=gate[:, t])
        _, before = memory.step(values[:, t], moved[:, t], before, reset[:, t], gate=gate[:, t])
        torch.testing.assert_close(read[:, t], guessed)
    there = memory.move(state, ahead[:, 0])
    torch.testing.assert_close(memory.read(there, GRID), memory.read(state, GRID + ahead[:, :1]))
    assert torch.equal(there["map"], state["map"])


@pytest.mark.parametrize("within", [False, True])
def test_a_memory_made_on_meta_is_filled_where_it_is_materialised(within):
    if within:
        with torch.device("meta"):
            hollow = PlaceMemory(4, GRID.tolist(), lattice(PERIOD), moves=MOVES.tolist())
    else:
        hollow = memory_of(device="meta", moves=MOVES)
    assert {x.device.type for x in hollow.buffers()} == {"meta"}
    filled, expected = hollow.to_empty(device="cpu"), memory_of(moves=MOVES)
    for (name, buffer), (other, value) in zip(filled.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, value)


def test_reading_writing_and_moving_compile_into_one_graph():
    memory = memory_of(velocities=[[0, 0], [0, 1]])

    def run(state, offsets, values, moved):
        state = memory.move(memory.write(state, offsets, values), moved, 2.0)
        return memory.read(state, offsets), memory.read(state, [[0, 1]])

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    given = memory.init_state(2), GRID[:3].double(), torch.randn(2, 3, 4), torch.ones(2, 2)
    torch.testing.assert_close(compiled(*given), run(*given))


def test_a_float64_call_of_a_float32_module_is_that_of_a_float64_module():
    narrow, wide = (memory_of(channels=2, velocities=[[0, 0.5]], frequencies=lattice(25, 200), dtype=t) for t in FLOATS)
    values, moved = torch.randn(1, 20, 9, 2, dtype=torch.float64), torch.randn(1, 20, 2)
    for ahead in (None, torch.randn(1, 20, 2)):
        for found, expected in zip(*(m(values, moved, ahead=ahead) for m in (narrow, wide)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


REFUSED = {
    "channels": (lambda: memory_of(channels=3, velocities=[[0, 0], [0, 1]]), "channels is 3, expected a multiple"),
    "offsets": (lambda: PlaceMemory(4, [0, 1], lattice(7)), r"offsets has shape \(2,\), expected \(rows, dims=2\)"),
    "frequencies": (lambda: memory_of(frequencies=[[float("nan"), 0]]), "frequencies holds values that are not finite"),
    "ridge": (lambda: memory_of(ridge=-1.0), "ridge is -1.0, expected at least 0"),
    "lattice": (lambda: lattice(7, 26), "count is 26, expected 1 to 25"),
    "period": (lambda: lattice(0), "period is 0, expected 1 to"),
    "places": (lambda: memory_of()(torch.zeros(1, 2, 8, 4)), r"values has shape \(1, 2, 8, 4\), expected .*places=9"),
    "both": (
        lambda: memory_of(moves=MOVES)(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 2), weights=torch.zeros(1, 2, 9)),
        "displacement and weights are both given",
    ),
    "moves": (lambda: memory_of()(torch.zeros(1, 2, 9, 4), weights=torch.zeros(1, 2, 9)), "weights were given"),
    "dims": (lambda: memory_of()(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 3)), "displacement has shape"),
    "gate": (lambda: memory_of()(torch.zeros(1, 2, 9, 4), gate=torch.zeros(1, 2, 8)), "gate has shape"),
    "elapsed": (lambda: memory_of()(torch.zeros(1, 2, 9, 4), elapsed=torch.zeros(1)), "elapsed has shape"),
    "state": (lambda: memory_of()(torch.zeros(1, 2, 9, 4), state=memory_of().init_state(2)), r"state\['map'\]"),
    "written": (lambda: memory_of().write(memory_of().init_state(1), [[0, 0]], torch.zeros(1, 2, 4)), "values has"),
    "no period": (lambda: lattice([]), r"period is \[\], expected a whole number per dimension"),
    "lattice dims": (lambda: lattice(5, dims=0), "lattice: dims is 0, expected 1 to"),
    "batch size": (lambda: memory_of().init_state(-1), "batch_size is -1, expected 0 to"),
    "moved": (
        lambda: memory_of().move(memory_of().init_state(2), torch.ones(2)),
        r"expected \(batch=2, dims=2\)",
    ),
    "moved far": (
        lambda: memory_of().move(memory_of().init_state(1), torch.ones(1, 2), float("inf")),
        "elapsed is inf, expected a finite number",
    ),
    "offsets of another batch": (
        lambda: memory_of().write(memory_of().init_state(1), torch.zeros(3, 1, 2), torch.zeros(3, 1, 4)),
        r"offsets has shape \(3, 1, 2\), expected \(rows, dims=2\) or \(batch=1, rows, dims=2\)",
    ),
    "views of a batch": (lambda: PlaceMemory(4, torch.zeros(2, 9, 2), lattice(7)), r"offsets has shape \(2, 9, 2\)"),
    "map's shape": (
        lambda: memory_of().read({"map": torch.zeros(()), "angle": torch.zeros(1)}, GRID),
        r"state\['map'\]",
    ),
    "scalar gate": (lambda: memory_of().step(torch.zeros(1, 9, 4), gate=torch.tensor(1.0)), r"gate has shape \(\)"),
    "ahead": (lambda: memory_of()(torch.zeros(1, 2, 9, 4), ahead=torch.zeros(1, 2, 3)), "ahead has shape"),
    "device": (
        lambda: memory_of()(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 2, device="meta")),
        "displacement is on meta, expected cpu",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_input_is_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


REFUSED_KINDS = {
    "period": (lambda: lattice(2.5), "period is 2.5, expected a whole number"),
    "periods": (lambda: lattice([2.5, 3]), "period is 2.5, expected a whole number"),
    "flag": (lambda: lattice(True), "period is True, expected a whole number"),
    "batch size": (lambda: memory_of().init_state(2.5), "batch_size is 2.5, expected a whole number"),
    "word": (lambda: PlaceMemory(4, "abc", lattice(7)), "offsets is 'abc', expected numbers"),
    "ragged": (lambda: PlaceMemory(4, [[0, 1], [2]], lattice(7)), "offsets is .*, expected numbers"),
    "complex": (lambda: PlaceMemory(4, GRID * 1j, lattice(7)), "offsets has dtype complex64, expected real numbers"),
    "meta": (lambda: PlaceMemory(4, GRID.to("meta"), lattice(7)), "offsets is a Tensor, expected numbers"),
    "state": (lambda: memory_of().read([torch.zeros(1)], GRID), "state is a list, expected a dict"),
    "keys": (lambda: memory_of().move({"angle": torch.zeros(1)}, torch.zeros(1, 2)), "state is the keys"),
    "none": (lambda: memory_of().write(None, GRID, torch.zeros(1, 9, 4)), "state is a NoneType, expected a dict"),
    "reset": (lambda: memory_of().step(torch.zeros(1, 9, 4), reset=[True]), "reset is a list, expected a torch.Tensor"),
    "values": (lambda: memory_of().step(None), "values is a NoneType, expected a torch.Tensor"),
    "displacement": (
        lambda: memory_of()(torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 2, dtype=torch.complex64)),
        "displacement has dtype complex64",
    ),
    "moved": (
        lambda: memory_of().move(memory_of().init_state(1), torch.zeros(1, 2), torch.ones(1)),
        "elapsed is a Tensor, expected a number",
    ),
    "weights": (
        lambda: memory_of(moves=MOVES)(torch.zeros(1, 2, 9, 4), weights=torch.ones(1, 2, 9, dtype=torch.long)),
        "weights has dtype int64",
    ),
    "elapsed": (
        lambda: memory_of()(torch.zeros(1, 2, 9, 4), elapsed=torch.ones(1, 2, dtype=torch.long)),
        "elapsed has dtype int64",
    ),
    "written": (
        lambda: memory_of().write(memory_of().init_state(1), [[0, 0]], torch.zeros(1, 1, 4, dtype=torch.long)),
        "values has dtype int64",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED_KINDS))
def test_the_wrong_kind_is_refused_by_name(case):
    call, message = REFUSED_KINDS[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_a_period_may_be_a_whole_number_of_numpy():
    for period in (np.int64(5), (np.int32(5), 5)):
        assert torch.equal(lattice(period), lattice(5))
