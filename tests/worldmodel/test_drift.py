"""Drift: blocks are where their velocities bring them, and gaps agree with a plain history of what was seen."""

import tracemalloc

import pytest
import torch

from worldmodel.environments import drift as drift_worlds
from worldmodel.environments.drift import DriftConfig, DriftWorlds
from worldmodel.runs.fields import ConfigurationError

CONFIGS = {
    "plain": DriftConfig(size=7, view=3, blocks=6),
    "pauses": DriftConfig(size=9, view=5, blocks=12, pause=3, velocities=((0, 1), (-1, 0))),
    "pixels": DriftConfig(size=6, view=3, pixels=2, noise=0.05),
}


def worlds(config: DriftConfig, batch: int = 3, seed: int = 0) -> DriftWorlds:
    return DriftWorlds(batch, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_blocks_and_gaps_agree_with_a_history(config):
    drift, count, unseen = worlds(config), 80, 0
    positions, size, half = drift.positions[:, 0].tolist(), config.size, config.view // 2
    places, colours = drift._start.tolist(), drift._class[:, 1:].tolist()
    steps = drift.rollout(count)
    for world in range(3):
        seen, clock = {}, 0

        def view(world):
            """Block on top in each cell, None for the floor."""
            tops, colour = [], colours[world]
            for row in range(-half, half + 1):
                for column in range(-half, half + 1):
                    cell = [(positions[world][0] + row) % size, (positions[world][1] + column) % size]
                    here = [block for block in range(config.blocks) if places[world][block] == cell]
                    tops.append(max(here, key=lambda block: (colour[block], block), default=None))
            return tops

        def classes(world, tops):
            return [0 if block is None else colours[world][block] for block in tops]

        for t in range(count):
            before = view(world)
            assert steps["tokens"][world, t].tolist() == classes(world, before)
            seen.update({block: clock for block in before if block is not None})
            move = [(-1, 0), (0, 1), (1, 0), (0, -1)][steps["actions"][world, t]]
            assert steps["displacement"][world, t].tolist() == list(move)
            positions[world] = [(positions[world][k] + move[k]) % size for k in (0, 1)]
            elapsed = int(steps["elapsed"][world, t])
            assert 1 <= elapsed <= config.pause
            for block in range(config.blocks):
                velocity = config.velocities[colours[world][block] - 1]
                places[world][block] = [(places[world][block][k] + elapsed * velocity[k]) % size for k in (0, 1)]
            after = view(world)
            assert steps["next_tokens"][world, t].tolist() == classes(world, after)
            gaps = [clock - seen[block] if block in seen else -1 for block in after]
            assert steps["gap"][world, t].tolist() == gaps
            assert steps["inside"][world, t].tolist() == [block is not None for block in after]
            unseen += sum(gap > 1 for gap in gaps)
            clock += elapsed
    assert unseen > 20 and set(steps["elapsed"].flatten().tolist()) == set(range(1, config.pause + 1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_two_rollouts_are_one(config):
    whole, drift = worlds(config).rollout(40), worlds(config)
    parts = [drift.rollout(steps) for steps in (1, 24, 15)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], 1), value), name
    again = worlds(config).rollout(40, whole["actions"])
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_waiting_moves_the_blocks_and_not_the_agent():
    config = DriftConfig(size=7, view=7, blocks=1, velocities=((0, 0), (2, -1)))
    drift = worlds(config, batch=16)
    before, at = drift.map, drift.positions
    drift.wait(3)
    assert torch.equal(drift.map == 1, before == 1) and torch.equal(drift.positions, at)
    assert torch.equal(drift.map == 2, (before == 2).roll((6, -3), (1, 2))) and (before == 2).any()
    drift.wait(4)
    assert torch.equal(drift.map, before), "seven steps go once around"


def test_memory_does_not_grow_with_the_maps_of_all_steps(monkeypatch):
    def rollout():
        return worlds(DriftConfig(size=128, blocks=2), batch=2).rollout(128)

    tracemalloc.start()
    whole, peak = rollout(), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * 2**20, "maps of all steps are 32 MiB"
    monkeypatch.setattr(drift_worlds, "MOST_CELLS", 3 * 2 * 128**2)
    assert all(torch.equal(value, whole[name]) for name, value in rollout().items())


def test_bad_arguments_are_told():
    with pytest.raises(ConfigurationError, match=r"view is 9, expected an odd number of at most size \(7\)"):
        DriftConfig(size=7, view=9)
    with pytest.raises(ValueError, match="DriftWorlds: actions from -1 to 0, expected 0 to 3"):
        worlds(DriftConfig()).rollout(2, torch.tensor([[0, -1]] * 3))
    for steps in (-1, 1.5, True):
        with pytest.raises(ConfigurationError, match=f"DriftWorlds: steps is {steps}, expected a whole number"):
            worlds(DriftConfig()).wait(steps)
