"""Worlds that stay: what is imagined once is there again, after edits, forks, files and other processes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from worldmodel.acting import world_file
from worldmodel.acting.world import World, WorldError
from worldmodel.environments.drift import DriftConfig, DriftWorlds
from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
from worldmodel.learning.token_trainer import TokenTrainConfig, TokenTrainer
from worldmodel.learning.view_sources import WorldSource
from worldmodel.learning.world_run import WorldRunConfig, described_run
from worldmodel.model.blocks import GRUBlock
from worldmodel.model.place_map import PlaceConfig
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.runs import storage
from worldmodel.runs.run import Run, RunError

MODEL = TokenConfig(grid=(3, 3), classes=6, place=PlaceConfig(period=9, motion="learned"))
TRAIN = TokenTrainConfig(batch_size=16, steps=48, updates=70, lr=1e-2, minutes=10, warmup=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of small rooms, in which bumps are learned."""
    rooms = RoomsConfig(size=7, view=3, colours=5, walls=0.2, bumps=True)
    trainer = TokenTrainer(MODEL, TRAIN, WorldSource(RoomWorlds, rooms, torch.Generator().manual_seed(0)))
    while not trainer.finished:
        metrics = trainer.iterate()
    assert metrics["returning"] == metrics["moves"] == 1
    folder = tmp_path_factory.mktemp("worlds") / "run"
    made = Run.create(folder, described_run(WorldRunConfig(model=MODEL, train=TRAIN)))
    made.save(trainer.updates, trainer.state_dict())
    made.close()
    return folder


def walk(world: World, steps: int, seed: int = 0, body: int = 0) -> list[tuple[np.ndarray, dict]]:
    random, action, seen = np.random.default_rng(seed), 0, []
    for _ in range(steps):
        action = int(random.integers(4)) if random.random() < 0.4 else action
        view, _, _, _, info = world.step(action, body)
        seen.append((view, info))
    return seen


def whole(world: World) -> np.ndarray:
    """Every place of the world."""
    low, high = -(world.size // 2), world.size - world.size // 2
    return np.stack(np.meshgrid(np.arange(low, high), np.arange(low, high), indexing="ij"), -1)


def test_what_was_imagined_is_there_on_return_and_the_map_comes_to_rest(run: Path) -> None:
    world = World.create(run, seed=1)
    known, returned = {}, 0
    for view, info in walk(world, 300):
        row, column = info["position"]
        for i in range(3):
            for j in range(3):
                place = ((row + i - 1) % 9, (column + j - 1) % 9)
                returned += place in known
                assert known.setdefault(place, view[i, j]) == view[i, j]
    tokens, certainty = world.look(whole(world))
    seen = np.array([[tuple(place % 9) in known for place in row] for row in whole(world)])
    assert seen.mean() > 0.4 and returned > 2000 and certainty[seen].min() > 0.9
    assert all(known[tuple(place % 9)] == token for place, token in zip(whole(world)[seen], tokens[seen], strict=True))
    assert np.array_equal(seen, world.last_seen.numpy() >= 0)
    row, column = np.add(world.bodies[0].position.numpy(), 4) % 9
    assert world.last_seen[row, column] == world.time == 300 == world.last_seen.max()
    before = world.shared_map.clone()
    if not any(info["new"].any() for _, info in walk(world, 50, seed=1)):
        assert torch.equal(world.shared_map, before)


def test_walls_of_an_imagined_world_stop(run: Path) -> None:
    world = World.create(run, seed=2)
    walked = walk(world, 100)
    moved = [tuple(np.abs(np.subtract(a["position"], b["position"]))) for (_, a), (_, b) in itertools.pairwise(walked)]
    assert {(0, 0)} < {*moved} and all(world.config.classes - 1 != view[1, 1] for view, _ in walked)


def test_an_edit_is_seen_on_arrival_and_nothing_else_changes(run: Path) -> None:
    world = World.create(run, seed=1)
    walk(world, 100)
    there, (before, _) = whole(world), world.look(whole(world))
    other = world.fork()
    places = [(-4, -4), (0, 3), (4, 1), world.bodies[0].position.tolist()]
    for place in places:
        token = int((world.look(place)[0] + 1) % 5)
        world.edit(place, token)
        assert world.look(place)[0] == token
    after, _ = world.look(there)
    changed = {tuple(place) for place in there[before != after].tolist()}
    assert changed == {tuple(place) for place in places}
    assert world.observe()[1, 1] == world.look(places[-1])[0] != other.observe()[1, 1]
    assert np.array_equal(other.look(there)[0], before)  # the fork is as it was
    for view, info in walk(world, 60, seed=3):
        at = [((row + half) % 9) - half for row, half in zip(info["position"], (4, 4), strict=True)]
        assert view[1, 1] == world.look(at)[0]


def test_forks_have_the_same_chances_and_then_their_own(run: Path) -> None:
    world = World.create(run, seed=4)
    walk(world, 20)
    twin, other = world.fork(), world.fork(seed=7)
    paths = [walk(one, 60, seed=5) for one in (world, twin, other)]
    same = [np.array_equal(a, b) for (a, _), (b, _) in zip(paths[0], paths[1], strict=True)]
    assert all(same) and torch.equal(world.shared_map, twin.shared_map)
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(paths[0], paths[2], strict=True))
    assert world.model is twin.model


ENTER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_world import walk
from worldmodel.acting.world import World
torch.set_num_threads(1)
world = World.load(sys.argv[1])
walk(world, 20, seed=9)
walk(world, 10, seed=9, body=1)
world.save(sys.argv[1] + ".there")
"""


def test_another_process_enters_the_world_where_it_was_left(run: Path, tmp_path: Path) -> None:
    world = World.create(run, seed=5, bodies=2)
    walk(world, 20)
    path = tmp_path / "my.world"
    world.save(path)
    command = [sys.executable, "-c", ENTER, str(path), str(Path(__file__).parent)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    walk(world, 20, seed=9)
    walk(world, 10, seed=9, body=1)
    torch.set_num_threads(threads)
    there = World.load(f"{path}.there")
    assert torch.equal(there.shared_map, world.shared_map) and there.time == world.time == 50
    for one, other in zip(there.bodies, world.bodies, strict=True):
        assert torch.equal(one.view, other.view) and torch.equal(one.position, other.position)
        assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())
    assert torch.equal(there.last_seen, world.last_seen) and there.about == world.about
    assert torch.equal(there.generator.get_state(), world.generator.get_state())


def test_bodies_share_a_world(run: Path) -> None:
    world = World.create(run, seed=6, bodies=2)
    walk(world, 40)
    tokens, certainty = world.look(whole(world))
    for view, info in walk(world, 40, seed=2, body=1):
        for i in range(3):
            for j in range(3):
                place = tuple((np.add(info["position"], (i - 1, j - 1)) + 4) % 9)
                assert certainty[place] < 0.9 or view[i, j] == tokens[place]
    assert world.bodies[0].steps == world.bodies[1].steps == 40 and world.time == 80


def test_what_is_in_view_of_any_body_is_seen_now(run: Path) -> None:
    world = World.create(run, seed=6, bodies=2)
    walk(world, 40)
    world.wait(10)
    for body in world.bodies:
        rows, columns = (np.arange(at - 1, at + 2) % 9 for at in (body.position + 4).tolist())
        assert (world.last_seen.numpy()[np.ix_(rows, columns)] == world.time).all()
    assert world.bodies[0].position.tolist() != [0, 0] and world.time == 50
    assert (world.last_seen == 50).sum() <= 18 and (world.last_seen < 40).any()


def test_worlds_of_any_size_from_one_run(run: Path) -> None:
    world = World.create(run, seed=0, size=30)
    assert world.size == 30
    walk(world, 40)
    world.edit((14, -15), 2)
    assert world.look((14, -15))[0] == 2


def test_what_drifts_has_drifted_after_a_wait() -> None:
    velocities = ((0, 0), (0, 1))
    config = DriftConfig(size=6, view=5, blocks=5, velocities=velocities)
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1))
    place = PlaceConfig(6, moves=moves, velocities=velocities, gated=True)
    model = TokenConfig(classes=3, width=16, place=place)
    train = TokenTrainConfig(batch_size=16, steps=24, updates=45, lr=2e-2, minutes=10, warmup=5, in_view_weight=0.1)
    trainer = TokenTrainer(model, train, WorldSource(DriftWorlds, config, torch.Generator().manual_seed(0)))
    while not trainer.finished:
        trainer.iterate()
    world = World(trainer.model, seed=3)
    for action in (0, 1, 2, 3, 0, 0, 1, 1):
        world.step(action)
    before, _ = world.look(whole(world))
    world.wait(2)
    after, _ = world.look(whole(world))
    resting, moving = (before == 1) & (after == 1), before == 2
    assert (np.roll(moving, 2, 1) & (after != 2)).sum() <= 1 and moving.any()  # at most one is hidden
    assert resting.sum() >= (before == 1).sum() - 1
    world.wait(4)  # around the torus
    row, column = np.argwhere((after == 0) & (np.roll(after, -2, 1) == 0))[0]
    for token, place in ((2, (row, (column + 2) % 6)), (1, (row, column))):
        edited, other = world.fork(), world.fork()
        edited.edit((row - 3, column - 3), token)
        for one in (edited, other):
            one.wait(2)
        (there, _), (expected, _) = edited.look(whole(world)), other.look(whole(world))
        expected[place] = token
        assert np.array_equal(there, expected)


def test_a_world_is_a_gymnasium_environment(run: Path) -> None:
    world = World.create(run, seed=0)
    check_env(world, skip_render_check=True)
    assert isinstance(world, gymnasium.Env)
    first, _ = world.reset(seed=3)
    again, _ = world.reset(seed=3)
    assert np.array_equal(first, again)


def test_blocks_imagine_worlds_without_a_map_and_say_what_they_cannot() -> None:
    model = TokenWorldModel(TokenConfig(grid=(3, 3), classes=6, place=None, blocks=(GRUBlock(),), rewards=True))
    world = World(model)
    view, reward, _, truncated, info = world.step(1)
    assert view.shape == (3, 3) and reward != 0 and not truncated and "position" not in info
    for action in (lambda: world.look((0, 0)), lambda: world.edit((0, 0), 1)):
        with pytest.raises(WorldError, match="no map of places"):
            action()
    with pytest.raises(WorldError, match="bodies is 2"):
        World(model, bodies=2)
    with pytest.raises(WorldError, match="given its motion"):
        World(TokenWorldModel(TokenConfig()))
    with pytest.raises(WorldError, match="classes 64"):
        World(TokenWorldModel(TokenConfig(grid=(3, 3), classes=0, patch=2)))


def test_bad_input_is_one_clear_line_and_changes_nothing(run: Path, tmp_path: Path) -> None:
    world = World.create(run, seed=0)
    walk(world, 10)
    before = world.fork()
    for bad, reason in (
        (lambda: world.step(4), "action is 4, expected a whole number from 0 to 3"),
        (lambda: world.step("north"), "action is 'north'"),
        (lambda: world.step([[1], [2, 3]]), r"action is \[\[1\], \[2, 3\]\]"),
        (lambda: world.step(np.array([1])), "action is array"),
        (lambda: world.step(0, body=1), "body is 1"),
        (lambda: world.edit([[1, 2], [3, 4]], 5), "expected one row and one column"),
        (lambda: world.look(np.zeros((0, 2), int)), "expected at least one"),
        (lambda: World.create(run, seed=1.5), "seed is 1.5, expected a whole number"),
        (lambda: World.create(run, size="a"), "size is 'a', expected from 3"),
        (lambda: world.edit((5, 0), 1), r"place \[5, 0\] is outside the world of 9 x 9 places"),
        (lambda: world.edit((0, 0), 6), "value is 6, expected a whole number from 0 to 5"),
        (lambda: world.edit((0, 0), 1.5), "value is 1.5"),
        (lambda: world.edit((0.5, 0), 1), "whole numbers"),
        (lambda: world.edit("there", 1), "expected rows and columns"),
        *((lambda n=n: world.wait(n), "steps is") for n in (-1, 0.5, True, "a", 10**30, world_file.MOST_TIME - 9)),
        (lambda: World.create(run, size=2), "size is 2, expected from 3"),
        (lambda: World.create(run, size=5000), "to 512"),
    ):
        with pytest.raises(WorldError, match=reason) as caught:
            bad()
        assert "\n" not in str(caught.value)
    assert torch.equal(world.shared_map, before.shared_map) and world.time == before.time == 10
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="is not the folder of a run"):
            World.create(folder)
    for name, reason in (("none", FileNotFoundError), ("file", NotADirectoryError)):
        with pytest.raises(reason) as caught:
            world.save(tmp_path / name / "my.world")
        assert caught.value.filename == str(tmp_path / name)


def test_a_world_of_the_longest_time_is_saved_and_ends(run: Path, tmp_path: Path) -> None:
    world = World.create(run, seed=0)
    world.wait(world_file.MOST_TIME)
    world.save(tmp_path / "my.world")
    assert World.load(tmp_path / "my.world").time == world_file.MOST_TIME
    with pytest.raises(WorldError, match="the most of a world"):
        world.step(0)


def test_a_file_of_another_version_damaged_or_a_link_is_refused(run: Path, tmp_path: Path) -> None:
    world = World.create(run, seed=0)
    path = tmp_path / "my.world"
    world.save(path)
    content = path.read_bytes()
    saved = storage.load(path)
    damaged = bytearray(content)
    damaged[-40] ^= 1

    def changed(**fields: object) -> bytes:
        storage.save(path, {**saved, **fields})
        return path.read_bytes()

    other = torch.zeros_like(saved["map"])[:, :, :-2]
    for bad, reason in (
        (content[:-100], "damaged"),
        (bytes(damaged), "checksum"),
        (b"", "damaged"),
        (json.dumps({}).encode(), "damaged"),
        (changed(version=True), "version True of worlds, this release reads version 1"),
        (changed(last_seen=saved["last_seen"] + 1), "last_seen is from 0 to 1, expected from -1"),
        (changed(version=2), "version 2 of worlds, this release reads version 1"),
        (changed(kind="run"), "is no world"),
        (changed(map=other), "map has shape"),
        (changed(model={**saved["model"], "place": {**saved["model"]["place"], "period": 512}}), "map has shape"),
        (changed(model={**saved["model"], "classes": 2**16}), "codec.embedding.weight has shape"),
        (changed(weights={**saved["weights"], "starts": saved["weights"]["starts"][..., None]}), "starts has shape"),
        (changed(model={**saved["model"], "width": 2**16}), "head.0.weight has shape"),
        (changed(bodies=[{**saved["bodies"][0], "view": saved["bodies"][0]["view"] + 6}]), "tokens from"),
        (changed(bodies=[]), "bodies is 0"),
        (changed(time=10**9 + 1), "time is 1000000001"),
        (changed(bodies=[{**saved["bodies"][0], "steps": 1}]), "steps is 1, expected at most the time, 0"),
    ):
        path.write_bytes(bad)
        with pytest.raises(RunError, match=reason) as caught:
            World.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="missing"):
        World.load(tmp_path / "none.world")
    path.write_bytes(content)
    link = tmp_path / "link.world"
    link.symlink_to(path)
    with pytest.raises(RunError, match="symbolic link"):
        World.load(link)
    assert World.load(path).time == 0 and world_file.VERSION == 1
