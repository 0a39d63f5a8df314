"""Rooms: what a rollout says of gaps, edits and places agrees with a plain history of what was seen."""

import numpy as np
import pytest
import torch

from worldmodel.environments.grids import MOVES
from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
from worldmodel.runs.fields import ConfigurationError

CONFIGS = {
    "plain": RoomsConfig(size=6, view=3, walls=0.2),
    "edits": RoomsConfig(size=6, view=5, edits=0.5, bumps=True),
    "own heading": RoomsConfig(size=5, view=3, own_heading=True, edits=0.3),
    "two agents": RoomsConfig(size=7, view=3, agents=2, edits=0.5),
    "pixels": RoomsConfig(size=5, view=3, pixels=2, noise=0.05),
    "a view of one cell": RoomsConfig(size=4, view=1),
    "no border": RoomsConfig(size=4, view=3, border=False, own_heading=True, bumps=True, agents=2, edits=0.3),
}


def worlds(config: RoomsConfig, batch: int = 3, seed: int = 0) -> RoomWorlds:
    return RoomWorlds(batch, config, torch.Generator().manual_seed(seed))


def with_agents(steps: dict[str, torch.Tensor], agents: int) -> dict[str, torch.Tensor]:
    return {name: value[:, None] if agents == 1 else value for name, value in steps.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_gaps_edits_and_views_agree_with_a_history(config):
    rooms, steps_taken = worlds(config), 60
    room, positions, headings = rooms.map.tolist(), rooms.positions.tolist(), rooms.headings.tolist()
    steps = with_agents(rooms.rollout(steps_taken), config.agents)
    radius, margin = config.view // 2, max(config.view // 2, 1) if config.border else 0
    ahead = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}

    def view(position, heading):
        """World cells of the view: its rows go from ahead to behind, its columns from the left to the right."""
        forward, right = ahead[heading], ahead[(heading + 1) % 4]
        return [
            tuple((position[k] - row * forward[k] + column * right[k]) % rooms.side for k in (0, 1))
            for row in range(-radius, radius + 1)
            for column in range(-radius, radius + 1)
        ]

    for world in range(3):
        seen, own = {}, [set() for _ in range(config.agents)]
        edited = {}
        for t in range(steps_taken):
            now = []
            for agent in range(config.agents):
                heading = headings[world][agent] if config.own_heading else 0
                assert steps["heading"][world, agent, t] == heading
                cells = view(positions[world][agent], heading)
                shown = [room[world][r][c] for r, c in cells]
                assert shown == steps["tokens"][world, agent, t].tolist()
                now.append(cells)
            for agent, cells in enumerate(now):
                seen.update(dict.fromkeys(cells, t))
                own[agent].update(cells)
            following = []
            for agent in range(config.agents):
                action = int(steps["actions"][world, agent, t])
                heading = headings[world][agent] if config.own_heading else action
                move = ahead[heading] if action == 0 or not config.own_heading else (0, 0)
                row, column = ((positions[world][agent][k] + move[k]) % rooms.side for k in (0, 1))
                if room[world][row][column] == config.colours:
                    move = (0, 0)
                assert steps["displacement"][world, agent, t].tolist() == list(move)
                positions[world][agent] = [(positions[world][agent][k] + move[k]) % rooms.side for k in (0, 1)]
                if config.own_heading:
                    headings[world][agent] = (heading + (0, 3, 1)[action]) % 4
                following.append(view(positions[world][agent], headings[world][agent] if config.own_heading else 0))
            fresh = {}
            for agent, cells in enumerate(following):
                for place, (r, c) in enumerate(cells):
                    colour = int(steps["next_tokens"][world, agent, t, place])
                    if fresh.get((r, c), colour) != colour:
                        raise AssertionError("two agents see one cell in two colours")
                    if colour != room[world][r][c] or (r, c) in fresh:
                        fresh[r, c] = colour
            for (r, c), colour in fresh.items():
                assert colour < config.colours and room[world][r][c] < config.colours
                assert seen[r, c] == t, "an edit of a cell that was not in view"
                room[world][r][c], edited[r, c] = colour, t
            for agent, cells in enumerate(following):
                for place, cell in enumerate(cells):
                    at = world, agent, t, place
                    assert steps["gap"][at] == (t - seen[cell] if cell in seen else -1)
                    assert steps["fresh"][at] == (cell in fresh)
                    assert steps["edited"][at] == (cell in edited)
                    assert steps["inside"][at] == all(margin <= k < margin + config.size for k in cell)
                    if config.agents > 1:
                        assert steps["other"][at] == (cell in seen and cell not in own[agent])
        if config.edits:
            assert edited, "nothing was edited: the test showed nothing"
    assert torch.equal(rooms.map, torch.tensor(room))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_two_rollouts_are_one(config):
    whole = worlds(config).rollout(40)
    rooms = worlds(config)
    parts = [rooms.rollout(steps) for steps in (1, 24, 15)]
    time = 1 if config.agents == 1 else 2
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], time), value), name


def test_given_actions_repeat_a_rollout_and_seeds_differ():
    config = RoomsConfig(size=6, bumps=True, agents=2)
    steps = worlds(config).rollout(20)
    again = worlds(config).rollout(20, steps["actions"])
    assert all(torch.equal(steps[name], again[name]) for name in steps)
    assert not torch.equal(worlds(config, seed=1).rollout(20)["tokens"], steps["tokens"])


def test_the_policy_keeps_its_direction_and_avoids_walls_unless_it_bumps():
    for own_heading in (False, True):
        config = RoomsConfig(walls=0.2, persistence=0.8, own_heading=own_heading)
        rooms = worlds(config, batch=64)
        free = rooms.legal().any(-1).squeeze(1)  # a cell between four walls leaves no choice
        steps = rooms.rollout(200)
        stopped = ~steps["displacement"].any(-1)
        moves = steps["actions"] == 0 if own_heading else torch.ones_like(stopped)
        assert not (stopped & moves)[free].any()
        bumping = worlds(RoomsConfig(walls=0.2, bumps=True, own_heading=own_heading), batch=64).rollout(200)
        moves = bumping["actions"] == 0 if own_heading else torch.ones_like(stopped)
        assert (~bumping["displacement"].any(-1) & moves).float().mean() > 0.05
    open_floor = worlds(RoomsConfig(size=200, view=1, walls=0, persistence=0.8), batch=64).rollout(100)
    same = (open_floor["actions"][:, 1:] == open_floor["actions"][:, :-1]).double().mean()
    assert abs(same - (0.8 + 0.2 / 4)) < 0.02


def test_pictures_are_the_tokens_in_colour():
    config = RoomsConfig(size=5, view=3, pixels=3)
    rooms = worlds(config)
    steps = rooms.rollout(8)
    colours = steps["pixels"][:, :, 1::3, 1::3].flatten(2, 3)
    assert torch.equal(colours, torch.from_numpy(rooms._colours)[steps["tokens"]])
    assert torch.equal(steps["pixels"][:, 1:], steps["next_pixels"][:, :-1])
    assert len(np.unique(rooms._colours, axis=0)) == config.classes
    noisy = worlds(RoomsConfig(size=5, view=3, pixels=3, noise=0.02)).rollout(8)["pixels"].float()
    assert 3 < (noisy - steps["pixels"]).abs().max() < 6  # 5.1, where the limits of uint8 leave room


def test_positions_and_legal_moves():
    rooms = worlds(RoomsConfig(size=5, view=3, walls=0.4, agents=2))
    legal, room = rooms.legal(), rooms.map
    for world in range(3):
        for agent in range(2):
            for action in range(4):
                row, column = (rooms.positions[world, agent] + torch.from_numpy(MOVES[action])).tolist()
                assert legal[world, agent, action] == (room[world, row, column] < 8)


def test_bad_arguments_are_told():
    with pytest.raises(ConfigurationError, match=r"view is 5, expected at most size \(4\) without a border"):
        RoomsConfig(size=4, border=False)
    with pytest.raises(ConfigurationError, match="view is 4, expected an odd number"):
        RoomsConfig(view=4)
    rooms = worlds(RoomsConfig())
    with pytest.raises(ValueError, match=r"shape \(3, 5\), expected \(3, 4\)"):
        rooms.rollout(4, torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="actions from 0 to 4, expected 0 to 3"):
        rooms.rollout(2, torch.tensor([[0, 4]] * 3))
