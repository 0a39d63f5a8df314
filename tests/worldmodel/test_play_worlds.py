"""A model's worlds as the game plays them, and the command."""

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldmodel.__main__ import main
from worldmodel.acting.world import World
from worldmodel.environments.grids import palette
from worldmodel.environments.rooms import RoomsConfig, RoomWorlds
from worldmodel.learning.token_trainer import TokenTrainConfig, TokenTrainer
from worldmodel.learning.view_sources import WorldSource
from worldmodel.learning.world_run import WorldRunConfig, described_run
from worldmodel.model.blocks import GRUBlock
from worldmodel.model.place_map import PlaceConfig
from worldmodel.model.tokens import TokenConfig, TokenWorldModel
from worldmodel.play.game import BadCommand, Game
from worldmodel.play.worlds import ImaginedWorld, load, lock
from worldmodel.runs.files import RunError
from worldmodel.runs.run import Run

PLACE = PlaceConfig(period=9, motion="learned")
MODELS = {
    "classes": TokenConfig(grid=(3, 3), classes=6, place=PLACE),
    "an own heading": TokenConfig(grid=(3, 3), classes=6, actions=3, place=PlaceConfig(9, "learned", turns=True)),
    "pixels": TokenConfig(grid=(3, 3), classes=8, patch=2, place=PLACE),
}


CODEBOOK = [(0, 0, 0), (255, 0, 51), (0, 102, 255), (204, 204, 0)]


def game(path: Path, config: TokenConfig, env: str = "") -> Game:
    """Of a model that was not trained; patches of pixels are in the colours of ``CODEBOOK``."""
    model = TokenWorldModel(config)
    if config.patch:
        model.codec.codebook[:4] = (torch.tensor(CODEBOOK) / 255).repeat(1, config.patch**2)
        model.codec.used.fill_(len(CODEBOOK))
    return Game(ImaginedWorld(World(model, seed=3, about={"env": env})), path)


@pytest.mark.parametrize("config", MODELS.values(), ids=list(MODELS))
def test_places_gaps_and_edits_agree_with_what_was_in_view(config, tmp_path):
    played = game(tmp_path / "my.world", config)
    world, random = played.worlds[0], np.random.default_rng(0)
    seen = np.full((9, 9), -1)

    def see():
        """Cells around the agent are in view, whatever its heading: the view is square."""
        rows, columns = (np.arange(at - 1, at + 2) % 9 for at in world.position())
        seen[np.ix_(rows, columns)] = world.steps

    see()
    for _ in range(25):
        played.obey({"do": "act", "action": int(random.integers(config.actions))})
        see()
    found = np.array(played.map(0)["gap"]).reshape(9, 9)
    assert np.array_equal(found, np.where(seen < 0, -1, 25 - seen)) and world.steps == 25
    for cell in ((0, 1), (2, 2), (1, 0)):
        before, value = played.picture(0).copy(), int(random.integers(4))
        played.obey({"do": "edit", "view": list(cell), "value": value})
        patch = config.patch or 1
        part = tuple(slice(at * patch, (at + 1) * patch) for at in cell)
        before[part] = played.swatches[value][1]
        assert np.array_equal(played.picture(0), before)


def test_a_saved_world_is_played_on(tmp_path):
    played = game(tmp_path / "my.world", MODELS["classes"])
    for action in (0, 1, 1, 2):
        played.obey({"do": "act", "action": action})
    played.obey({"do": "save"})
    played.obey({"do": "fork"})
    again = load(tmp_path / "my.world")
    assert np.array_equal(again.view(), played.worlds[0].view()) and again.steps == 4
    assert again.position() == played.worlds[0].position() == played.worlds[1].position()


def test_classes_have_the_colours_of_their_worlds(tmp_path):
    rooms, drift, other = (
        game(tmp_path / "my.world", MODELS["classes"], env).worlds[0]
        for env in ("worldmodel/Rooms-v0", "worldmodel/Drift-v0", "")
    )
    assert rooms.names[-1] == "wall" and drift.names[0] == "floor" and other.names[-1] == "grey"
    assert np.array_equal(rooms.colours, palette(5)) and np.array_equal(drift.colours[1:], palette(5)[:-1])
    pixels = game(tmp_path / "my.world", MODELS["pixels"]).worlds[0]
    assert pixels.colours.tolist() == [list(colour) for colour in CODEBOOK]


def test_a_world_without_a_map_shows_its_view(tmp_path):
    played = game(tmp_path / "my.world", TokenConfig(grid=(3, 3), classes=6, place=None, blocks=(GRUBlock(),)))
    (frame,) = played.obey({"do": "act", "action": 1})
    assert frame["position"] == [0, 0] and not played.hello()["map"]
    for where in ({"place": [0, 0]}, {"view": [0, 1]}):
        with pytest.raises(BadCommand, match="no map, and cannot be edited"):
            played.obey({"do": "edit", **where, "value": 1})
    assert played.worlds[0].steps == 1


def test_a_world_has_one_player(tmp_path, capsys, monkeypatch):
    path = tmp_path / "{my}.world"
    played = game(path, MODELS["classes"])
    played.obey({"do": "save"})
    monkeypatch.setattr("sys.stdin", io.StringIO("d"))
    held = lock(path)
    assert main(["play", str(path), "--text"]) == 1
    said = capsys.readouterr().err
    assert "{my}.world is being played by process" in said and "play a copy of the file" in said
    with pytest.raises(RunError, match="give --save another name"):
        lock(path, new=True)
    held.release()
    assert main(["play", str(path), "--text"]) == 0
    assert "world 1 of 1, step 1" in capsys.readouterr().out
    with pytest.raises(RunError, match="is being played"):
        first = lock(path), lock(path)  # noqa: F841, held


def test_a_run_makes_a_new_world_that_is_saved_where_it_is_told(tmp_path, capsys, monkeypatch):
    rooms = RoomsConfig(size=5, view=3, colours=5)
    source = WorldSource(RoomWorlds, rooms, torch.Generator().manual_seed(0))
    trainer = TokenTrainer(MODELS["classes"], TokenTrainConfig(batch_size=2, steps=8, updates=1), source)
    trainer.iterate()
    config = WorldRunConfig(env="worldmodel/Rooms-v0", model=MODELS["classes"])
    with contextlib.closing(Run.create(tmp_path / "run", described_run(config))) as run:
        run.save(1, trainer.state_dict())
    monkeypatch.setattr("sys.stdin", io.StringIO("ddS"))
    path = tmp_path / "my.world"
    assert main(["play", "--text", str(tmp_path / "run"), "--save", str(path), "--size", "13", "--bodies", "2"]) == 0
    world = load(path)
    assert world.bodies == 2 and world.position(1) == (6, 6) != world.position(0)
    assert world.period == 13 and world.steps == 2 and world.names[-1] == "wall"
    assert main(["play", "--text", str(tmp_path / "run"), "--save", f"{path}2", "--size", "2"]) == 1
    assert "size is 2, expected from 3" in capsys.readouterr().err


def test_what_cannot_be_played_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.world").write_bytes(b"nothing")
    (tmp_path / "there.world").touch()
    for arguments, told in (
        ([tmp_path / "none.world"], "none.world is neither the file of a world nor the folder of a run"),
        ([tmp_path / "bad.world"], "bad.world"),
        ([tmp_path, "--save", tmp_path / "there.world"], "there.world is there already"),
        ([tmp_path, "--save", tmp_path / "new.world"], ""),
        ([tmp_path / "there.world", "--seed", 0], "--seed is of a new world, and"),
        ([tmp_path / "there.world", "--size", 9], "--size is of a new world, and"),
        ([tmp_path / "there.world", "--bodies", 2], "--bodies is of a new world, and"),
        ([tmp_path / "there.world", "--save", tmp_path / "new.world"], "--save is of a new world, and"),
    ):
        assert main(["play", "--text", *map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1


def test_what_was_not_saved_in_a_browser_is_rescued_at_the_end(tmp_path, capsys, monkeypatch):
    server = pytest.importorskip("worldmodel.play.server")
    played = game(tmp_path / "my.world", MODELS["classes"])
    played.obey({"do": "save"})
    monkeypatch.setattr(server, "serve", lambda game, host, port: game.obey({"do": "act", "action": 1}))
    assert main(["play", str(tmp_path / "my.world")]) == 0
    assert capsys.readouterr().out == f"what was not saved is in {tmp_path / 'my-rescued.world'}\n"
    assert (load(tmp_path / "my.world").steps, load(tmp_path / "my-rescued.world").steps) == (0, 1)


def test_playing_without_starlette_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "worldmodel.play.server", raising=False)
    assert main(["play", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "pip install 'wmkernels[play]'" in said and said.count("\n") == 1
