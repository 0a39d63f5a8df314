"""What a player does to worlds: moves, edits, forks, saves, and what a page is told."""

import base64
import io
import json
import os
import pty
import signal

import numpy as np
import pytest
from worldmodel_play import COLOURS, SIDE, VIEW, Painted

from worldmodel.play.game import BadCommand, Game
from worldmodel.play.terminal import Terminal


@pytest.fixture
def game(tmp_path):
    return Game(Painted(), tmp_path / "world.npz")


def pixels(message):
    return np.frombuffer(base64.b64decode(message["rgb"]), np.uint8).reshape(message["rows"], message["columns"], 3)


def test_a_move_shows_the_view_there(game):
    world = game.worlds[0]
    (frame,) = game.obey({"do": "act", "action": 1})
    assert world.position() == (5, 6) and frame["position"] == [5, 6] and frame["steps"] == 1 and not frame["saved"]
    assert np.array_equal(pixels(frame["view"]), world.colours[world.view()]) and frame["milliseconds"] >= 0
    json.dumps(frame)


def test_the_map_has_colour_certainty_and_gap(game):
    for _ in range(3):
        game.obey({"do": "act", "action": 1})
    world, (found,) = game.worlds[0], game.obey({"do": "map"})
    gap = np.array(found["gap"]).reshape(SIDE, SIDE)
    certainty = np.frombuffer(base64.b64decode(found["certainty"]), np.uint8).reshape(SIDE, SIDE)
    assert gap[5, 3:11].tolist() == [3, 2, 1, 0, 0, 0, 0, 0] and (gap[0] == -1).all()
    assert certainty[5, 5] == round(0.9 * 255) and certainty[0, 0] == 0
    assert np.array_equal(pixels(found["picture"]), world.colours[world.cells]) and found["first"] == [0, 0]


def test_a_large_lattice_is_shown_around_the_agent(game, monkeypatch):
    monkeypatch.setattr("worldmodel.play.game.MOST_SIDE", 7)
    for _ in range(2):
        game.obey({"do": "act", "action": 0})
    world, (found,) = game.worlds[0], game.obey({"do": "map"})
    rows, columns = np.arange(0, 7), np.arange(2, 9)
    assert found["first"] == [0, 2] and np.array_equal(
        pixels(found["picture"]), world.colours[world.cells[rows][:, columns]]
    )
    for _ in range(2):
        game.obey({"do": "act", "action": 0})
    assert game.obey({"do": "map"})[0]["first"] == [9, 2], "around the edge"


@pytest.mark.parametrize("turns", [False, True])
def test_an_edit_of_a_cell_of_the_view_is_seen_there(turns, tmp_path):
    game = Game(Painted(turns), tmp_path / "world.npz")
    game.obey({"do": "act", "action": 2})  # south, or a turn to the right
    before = game.worlds[0].view()
    for row, column in ((0, 2), (4, 0), (2, 2), (1, 4)):
        value = (int(before[row, column]) + 1) % COLOURS
        game.obey({"do": "edit", "view": [row, column], "value": value})
        before[row, column] = value
        assert np.array_equal(game.worlds[0].view(), before)


def test_an_edit_of_a_place_changes_it_alone(game):
    before = game.worlds[0].cells.copy()
    game.obey({"do": "edit", "place": [0, 3], "value": 4})
    before[0, 3] = 4
    assert np.array_equal(game.worlds[0].cells, before)


def test_pixels_are_edited_by_a_colour(tmp_path):
    game = Game(Painted(pixels=True), tmp_path / "world.npz")
    assert game.frame(0)["view"]["rows"] == 3 * VIEW and game.frame(0)["cells"] == [VIEW, VIEW]
    game.obey({"do": "edit", "view": [2, 2], "value": 1})
    assert (game.worlds[0].view()[6:9, 6:9] == game.swatches[1][1]).all()
    (found,) = game.obey({"do": "map"})
    assert np.array_equal(pixels(found["picture"])[5, 5], game.swatches[1][1])


def test_forks_are_independent_and_saved_apart(game):
    frame, _ = game.obey({"do": "fork"})
    assert frame["world"] == 1 and len(game.worlds) == 2
    game.obey({"do": "act", "world": 1, "action": 0})
    game.obey({"do": "edit", "world": 1, "place": [0, 0], "value": 4})
    assert game.worlds[0].position() == (5, 5) and game.worlds[0].cells[0, 0] != 4
    for world, name in ((0, "world.npz"), (1, "world-fork.npz")):
        frame, said = game.obey({"do": "save", "world": world})
        assert frame["saved"] and said == {"type": "said", "text": f"saved as {name}", "error": False}
    assert np.load(game.paths[0])["cells"][0, 0] != 4 == np.load(game.paths[1])["cells"][0, 0]
    game.obey({"do": "fork"})
    assert game.obey({"do": "save", "world": 1})[1]["text"] == "saved as world-fork2.npz"
    assert np.load(game.paths[0].with_name("world-fork.npz"))["cells"][0, 0] == 4, "an older fork's file stays"
    assert not game.obey({"do": "wait", "steps": 10})[0]["saved"] and game.worlds[0].steps == 10
    assert game.obey({"do": "close", "world": 1}) == [{"type": "closed", "world": 1}] and len(game.worlds) == 1


@pytest.mark.parametrize(
    "command, told",
    [
        ([], "a command is an object"),
        ({}, "there is no command 'None', expected one of act, wait"),
        ({"do": "frame"}, "there is no command 'frame'"),
        ({"do": "act"}, "action is None, expected a whole number from 0 to 3"),
        ({"do": "act", "action": 4}, "action is 4, expected a whole number from 0 to 3"),
        ({"do": "act", "action": True}, "action is True"),
        ({"do": "act", "action": 0, "world": 1}, "world is 1, expected a whole number from 0 to 0"),
        ({"do": "wait", "steps": 0}, "steps is 0, expected a whole number from 1 to 100,000"),
        ({"do": "edit", "value": 0}, "a place is None, expected a row and a column"),
        ({"do": "edit", "value": 9, "place": [0, 0]}, "value is 9, expected a whole number from 0 to 4"),
        ({"do": "edit", "value": 0, "view": [5, 0]}, "the view has no cell 5, 0, expected rows below 5"),
        ({"do": "edit", "value": 0, "place": [11, 0]}, "there is no place 11, 0"),
        ({"do": "close"}, "the world itself cannot be closed"),
    ],
)
def test_a_bad_command_is_told_and_changes_nothing(game, command, told):
    before = game.frame(0)
    with pytest.raises(ValueError, match=told):
        game.obey(command)
    assert game.frame(0) == before and len(game.worlds) == 1


def test_a_world_without_a_map_is_walked_all_the_same(game):
    game.worlds[0].period = 0
    assert not game.hello()["map"] and game.obey({"do": "map"}) == [{"type": "map", "world": 0, "picture": None}]
    assert "this world has no map" in played(game, "m")


def test_each_body_is_shown_moved_and_on_the_map(tmp_path):
    game = Game(Painted(bodies=2), tmp_path / "world.npz")
    other, frame = game.obey({"do": "act", "body": 1, "action": 1})
    assert (other["body"], other["position"]) == (0, [5, 5]) and "milliseconds" not in other
    assert (frame["body"], frame["bodies"], frame["position"]) == (1, 2, [8, 6]) and frame["milliseconds"] >= 0
    *frames, found = game.obey({"do": "edit", "body": 1, "view": [0, 2], "value": 4})
    assert game.worlds[0].cells[6, 6] == 4 and [message["body"] for message in frames] == [0, 1]
    assert found["positions"] == [[5, 5], [8, 6]] and found["headings"] == [0, 1]
    with pytest.raises(BadCommand, match="body is 2, expected a whole number from 0 to 1"):
        game.obey({"do": "act", "body": 2, "action": 1})
    said = played(game, "bdbm")
    assert game.worlds[0].position(1) == (8, 7) and "body 2 of 2, step 2, at 8, 7" in said
    assert said.count("()") == 1, "the map marks the other body"
    assert "there is no key 'b'" in played(Game(Painted(), tmp_path / "world.npz"), "b")


def test_actions_have_keys_of_one_letter_that_mean_nothing_else(tmp_path):
    game = Game(Painted(actions=30), tmp_path / "world.npz")
    keys = [action["keys"] for action in game.hello()["actions"]]
    assert keys[:11] == [[letter] for letter in "1234567890g"] and keys[-1] == []
    assert "there is no key" not in played(game, "".join(key for key, *_ in keys[:24])) and game.worlds[0].steps == 24
    others = Game(Painted(bodies=2), tmp_path / "world.npz")
    for letter in "mefxcbS.":
        played(others, letter)
        assert [letter] not in keys and others.worlds[0].steps <= 1


def test_a_terminal_knows_escape_from_an_arrow(game):
    said = played(game, "\x1bd\x1b[1;5B\x1bOAe\x1bd")
    assert game.worlds[0].position() == (5, 7) and "there is no key" not in said and "value is" not in said


def test_a_terminal_of_its_own_reads_key_by_key(game):
    outside, inside = pty.openpty()
    with os.fdopen(inside) as source:
        terminal = Terminal(game, source, io.StringIO())
        with terminal._single_keys():  # which drops what was typed before
            os.write(outside, b"\x1b")
            assert terminal._key() == "Escape", "it waits for no second key"
            os.write(outside, "\x1b[Dé".encode())
            assert [terminal._key(), terminal._key()] == ["ArrowLeft", "é"]
    os.close(outside)


def test_what_a_page_is_told_first(tmp_path):
    hello = Game(Painted(turns=True), tmp_path / "a.npz").hello()
    assert [action["name"] for action in hello["actions"]] == ["ahead", "left", "right"]
    assert hello["actions"][0]["keys"] == ["ArrowUp", "w"] and hello["file"] == "a.npz"
    assert hello["swatches"][1] == {"name": "sky", "rgb": [86, 180, 233]}


def played(game, keys):
    screen = io.StringIO()
    Terminal(game, io.StringIO(keys), screen).run()
    return screen.getvalue()


def test_a_terminal_moves_edits_forks_and_saves(game):
    said = played(game, "dd\x1b[Ae3fxS\nx?mwq")
    world, fork = game.worlds
    assert world.position() == (3, 7) and fork.position() == (4, 7)
    assert world.cells[3, 7] == fork.cells[3, 7] == 2
    assert "saved as world-fork.npz" in said and "there is no key '?'" in said and "world 2 of 2, step 3" in said
    assert "\x1b[48;2;0;158;115;97m  " in said and said.count("<>") == said.count(", step ") == 13
    assert not game.paths[0].exists() and game.paths[1].exists()


def test_a_terminal_tells_what_is_wrong(game):
    said = played(game, "e9")
    assert "value is 8, expected a whole number from 0 to 4" in said
    game.paths[0].mkdir()
    assert "Is a directory" in played(game, "S") or "world.npz" in played(game, "S")


def test_a_fork_that_is_not_saved_is_not_replaced(game):
    game.obey({"do": "fork"})
    fork = game.worlds[1]
    with pytest.raises(BadCommand, match="save or close it first"):
        game.obey({"do": "fork"})
    assert game.worlds[1] is fork
    played(game, "c")
    assert len(game.worlds) == 1
    game.obey({"do": "fork"})
    game.paths[1].write_text("another's")
    assert game.obey({"do": "save", "world": 1})[1]["text"] == "saved as world-fork2.npz"
    game.obey({"do": "act", "world": 1, "action": 0})
    assert game.obey({"do": "save", "world": 1})[1]["text"] == "saved as world-fork2.npz"
    assert game.paths[1].with_name("world-fork.npz").read_text() == "another's"


def test_leaving_what_is_not_saved_takes_two_keys(game):
    assert "not all is saved" in played(game, "dqd") and game.worlds[0].steps == 2
    played(game, "dqqd")
    assert game.worlds[0].steps == 3
    assert "not all is saved" not in played(game, "Sqd") and game.worlds[0].steps == 3


def test_what_is_not_saved_is_rescued_from_an_unexpected_error(game, monkeypatch):
    played(game, "dSdf")
    monkeypatch.setattr(game.worlds[0], "wait", lambda steps: steps / 0)
    screen = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        Terminal(game, io.StringIO("."), screen).run()
    rescued = [game.paths[0].with_name(f"world-rescued{number}.npz") for number in ("", 2)]
    assert [np.load(path)["steps"] for path in (game.paths[0], *rescued)] == [1, 2, 2]
    assert all(f"what was not saved is in {path}\n" in screen.getvalue() for path in rescued)


def test_a_new_world_is_rescued_once_it_was_changed(tmp_path):
    game = Game(Painted(), tmp_path / "world.npz")
    with pytest.raises(BadCommand):
        game.obey({"do": "act", "action": 9})
    assert game.rescue() == []
    game.obey({"do": "edit", "place": [0, 0], "value": 4})
    assert game.rescue() == [tmp_path / "world-rescued.npz"]
    assert np.load(tmp_path / "world-rescued.npz")["cells"][0, 0] == 4


@pytest.mark.usefixtures("terminal_signals")
def test_ctrl_c_in_a_terminal_rescues_what_is_not_saved(game, monkeypatch):
    terminal = Terminal(game, io.StringIO("d"), io.StringIO())
    read = terminal._read
    monkeypatch.setattr(terminal, "_read", lambda: read() or signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        terminal.run()
    assert np.load(game.paths[0].with_name("world-rescued.npz"))["steps"] == 1


def test_a_command_that_is_unknown_is_no_other_error(game):
    with pytest.raises(BadCommand):
        game.obey({"do": "act", "action": "0"})
