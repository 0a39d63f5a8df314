"""nn.PlaceMemory: laws of a map that stays where it is."""

import torch

from wmkernels.nn import PlaceMemory, lattice

PERIOD = 7
GRID = [[i, j] for i in range(-1, 2) for j in range(-1, 2)]


def test_a_place_reads_back_what_was_last_written_wherever_the_observer_went():
    memory = PlaceMemory(4, GRID, lattice(PERIOD))
    moved = torch.randint(-1, 2, (2, 300, 2))
    position = moved.cumsum(1) - moved  # of the view written at each step
    world = torch.randn(2, PERIOD, PERIOD, 4)

    def view(position):
        at = (position[..., None, :] + torch.tensor(GRID)) % PERIOD
        return world[torch.arange(2).view(2, *[1] * (at.dim() - 2)), at[..., 0], at[..., 1]], at

    values, at = view(position)
    read, state = memory(values, moved.float())
    later, _ = view(moved.cumsum(1))
    seen = torch.zeros(2, PERIOD, PERIOD, dtype=torch.bool)
    for t in range(300):
        rows = torch.arange(2)[:, None]
        seen[rows, at[:, t, :, 0], at[:, t, :, 1]] = True
        next_at = (moved[:, : t + 1].sum(1)[:, None] + torch.tensor(GRID)) % PERIOD
        known = seen[rows, next_at[..., 0], next_at[..., 1]]
        assert (read[:, t] - later[:, t])[known].abs().max() < 1e-5
        assert read[:, t][~known].abs().amax() < 1e-5 if (~known).any() else True
    assert seen.all()
    torch.testing.assert_close(memory.read(state, GRID), read[:, -1])


def test_reading_ahead_is_the_read_of_a_move_that_is_not_made():
    memory = PlaceMemory(4, GRID, lattice(PERIOD))
    values = torch.randn(2, 6, 9, 4)
    moved, ahead = (torch.randint(-1, 2, (2, 6, 2)).float() for _ in range(2))
    read, state = memory(values, moved, ahead=ahead)
    for t in range(6):
        _, before = memory(values[:, :t], moved[:, :t])
        guessed, _ = memory.step(values[:, t], ahead[:, t], before)
        torch.testing.assert_close(read[:, t], guessed)
    there = memory.move(state, ahead[:, 0])
    torch.testing.assert_close(memory.read(there, GRID), memory.read(state, torch.tensor(GRID) + ahead[:, :1]))
    assert torch.equal(there["map"], state["map"])
