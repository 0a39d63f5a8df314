import dataclasses
import itertools
import json
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
import pytest
import torch
from gymnasium import spaces
from worldmodel_examples import MEMORIES, random_batch, set_reward_scale, small_model, whole_episodes

from worldmodel.__main__ import main
from worldmodel.commands.imagine import ImagineOptions, imagine, summary
from worldmodel.data.spaces import ObservationSpec
from worldmodel.environments.registry import make
from worldmodel.learning.settings import acting_part, saved_config
from worldmodel.model.decision import Policy
from worldmodel.model.open_loop import error, open_loop
from worldmodel.pictures.bands import Panel
from worldmodel.pictures.page import draw_gif, draw_png
from worldmodel.pictures.renderers import TILE, WRONG, GridRenderer, ImageRenderer, MiniGridRenderer, renderer
from worldmodel.runs import storage
from worldmodel.runs.run import Run

ECHO = "worldmodel_environments:wmtest/Echo-v0"
CATCH = "worldmodel_environments:wmtest/Catch-v0"
CONTEXT = 5
pytestmark = pytest.mark.usefixtures("same_threads")


class Replayed(Policy):
    def __init__(self, actions: torch.Tensor) -> None:
        self.actions = list(actions.unbind(1))

    def __call__(self, features: torch.Tensor) -> "Replayed":
        return self

    def sample(self) -> torch.Tensor:
        return self.actions.pop(0)


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_given_actions_lead_where_a_policy_that_does_them_leads(memory: str) -> None:
    model = small_model(memory=MEMORIES[memory])
    batch = random_batch(model)
    state, actions = model.observe(batch).state, model.action_spec.encode(torch.randint(3, (3, 6))).double()
    mode = model.perception.latent.mode
    given, chosen = model.imagine_actions(state, actions, mode), model.imagine(state, Replayed(actions), 6, sample=mode)
    for name in ("features", "latent", "actions", "rewards", "continues"):
        assert torch.equal(getattr(given, name), getattr(chosen, name)), name
    assert torch.equal(given.actions, actions)
    for shape in ((3, 3), (2, 6, 3), (3, 0, 3), (3, 6, 2)):
        with pytest.raises(ValueError, match=r"actions has shape .*, expected \(batch=3, horizon of at least 1, .*=3"):
            model.imagine_actions(state, torch.zeros(shape))


def test_what_is_imagined_depends_on_the_context_and_the_actions_alone() -> None:
    model = small_model()
    batch = whole_episodes(model)
    before = open_loop(model, batch, CONTEXT)
    for name, modality in batch.observations.items():
        modality[:, CONTEXT:] = modality[:, CONTEXT:].flip(1) if name == "place" else (modality[:, CONTEXT:] + 1) % 4
    after = open_loop(model, batch, CONTEXT)
    for name in batch.observations:
        assert torch.equal(after.imagined[name], before.imagined[name])
        assert torch.equal(after.reconstructed[name][:, :CONTEXT], before.reconstructed[name][:, :CONTEXT])
    assert torch.equal(after.predicted_rewards, before.predicted_rewards)
    assert torch.equal(after.predicted_ends, before.predicted_ends)
    # The last context frame and the actions matter.
    batch.observations["place"][:, CONTEXT - 1] += 1
    seen = open_loop(model, batch, CONTEXT).predicted_rewards
    assert torch.equal(seen[:, : CONTEXT - 1], after.predicted_rewards[:, : CONTEXT - 1])
    assert (seen[:, CONTEXT - 1 :] != after.predicted_rewards[:, CONTEXT - 1 :]).all()
    batch.actions[:, CONTEXT] = (batch.actions[:, CONTEXT] + 1) % 3
    done = open_loop(model, batch, CONTEXT).predicted_rewards
    assert torch.equal(done[:, :CONTEXT], seen[:, :CONTEXT])
    assert (done[:, CONTEXT:] != seen[:, CONTEXT:]).all()


def test_a_prediction_rests_on_what_was_seen_up_to_its_step_or_on_the_context() -> None:
    model = small_model()
    batch = whole_episodes(model)
    set_reward_scale(model, 3.0)
    loop = open_loop(model, batch, CONTEXT)
    mode = model.perception.latent.mode
    for step in range(CONTEXT):
        state = model.observe(batch.steps(0, step + 1), sample=mode).state
        actions = model.action_spec.encode(batch.actions[:, step:-1]).double()
        imagined = model.imagine_actions(state, actions, mode)
        torch.testing.assert_close(loop.predicted_rewards[:, step], 3.0 * imagined.rewards[:, 0])
        torch.testing.assert_close(loop.predicted_ends[:, step], 1 - imagined.continues[:, 0])
    torch.testing.assert_close(loop.predicted_rewards[:, CONTEXT - 1 :], 3.0 * imagined.rewards)
    latents = model.perception.reconstruct(imagined.latent)
    assert all(torch.equal(loop.imagined[name], latents[name]) for name in latents)


def test_no_random_generator_moves_and_the_weights_stay_as_they_were() -> None:
    model = small_model()
    batch, before = whole_episodes(model), {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loop = open_loop(model, batch, CONTEXT)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not loop.predicted_rewards.requires_grad
    sampled = open_loop(model, batch, CONTEXT, sample=model.perception.latent.sample)
    assert not torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(sampled.imagined["card"], loop.imagined["card"])


def test_only_the_episode_that_a_row_begins_with_counts() -> None:
    model = small_model()
    batch = whole_episodes(model)
    batch.is_first[0, 8] = True
    batch.valid[1, 11:] = False
    batch.is_first[2, 0] = False  # continues from a state
    batch.state = {name: torch.rand_like(value) for name, value in model.init_state(3).items()}
    loop = open_loop(model, batch, CONTEXT)
    assert loop.valid.sum(1).tolist() == [8, 11, 14]
    panel = Panel.of("one", loop, 1, model.observation_spec.modalities, {})
    assert panel.steps == 11 and len(panel.errors["card"]) == 11 - CONTEXT
    for context in (0, 14):
        with pytest.raises(ValueError, match=rf"context is {context}, expected at least 1 and below time=14"):
            open_loop(model, batch, context)


def test_errors_are_what_their_units_say() -> None:
    kinds = spaces.Dict(
        card=spaces.MultiDiscrete([4, 3]),
        place=spaces.Box(-9, 9, (2,)),
        pixels=spaces.Box(0, 255, (16, 16, 3), np.uint8),
        cells=spaces.Box(0, 15, (5, 5, 2), np.uint8),
    )
    modalities = ObservationSpec.from_space(kinds).modalities
    seen = {name: torch.zeros(5, *modality.shape) for name, modality in modalities.items()}
    assert all((error(modalities[name], value, value) == 0).all() for name, value in seen.items())
    predicted = {name: value.clone() for name, value in seen.items()}
    predicted["card"][1, 0] = 2
    predicted["place"][1] = torch.tensor([np.e - 1, 0])
    predicted["pixels"][1, :8] = 255
    predicted["cells"][1, 0, 0, :] = 1  # one cell, two channels
    predicted["cells"][1, 2, 1, 1] = 1
    expected = {"card": 1 / 2, "place": 0.5**0.5, "pixels": 0.5**0.5, "cells": 2 / 25}
    for name, value in expected.items():
        found = error(modalities[name], predicted[name], seen[name])
        torch.testing.assert_close(found, torch.tensor([0, value, 0, 0, 0], dtype=torch.float64))


def cell(picture: np.ndarray, x: int, y: int) -> np.ndarray:
    return picture[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]


def test_minigrid_is_drawn_as_the_environment_draws_itself() -> None:
    environment = make("MiniGrid-MemoryS9-v0", render_mode="rgb_array", tile_size=TILE, agent_pov=True)
    view = environment.reset(seed=3)[0]["image"]
    drawn = renderer(ObservationSpec.from_space(environment.observation_space).modalities["image"], environment)
    assert isinstance(drawn, MiniGridRenderer)
    picture, shown = drawn.render(view), environment.render()
    agent = (3, 6)
    compared = 0
    for x in range(7):
        for y in range(7):
            if view[x, y, 0] not in (0,) and (x, y) != agent:
                assert np.array_equal(cell(picture, x, y), cell(shown, x, y)), (x, y)
                compared += 1
    assert compared > 10
    names = [name for _, name in drawn.legend([view])]
    assert set(names) >= {"unseen", "wall", "empty"} and any(name.endswith((" key", " ball")) for name in names)
    # Wrong cells have a frame.
    other = view.copy()
    other[2, 5] = 14, 3, 9
    marked = drawn.render(other, view)
    corners = {(x, y): tuple(cell(marked, x, y)[0, 0].tolist()) == WRONG for x in range(7) for y in range(7)}
    assert [place for place, wrong in corners.items() if wrong] == [(2, 5)]
    assert drawn.name(other[2, 5]) == "nothing MiniGrid has"
    assert drawn.name(np.array([4, 2, 2])) == "locked blue door" and drawn.name(np.array([5, 4, 0])) == "yellow key"
    environment.close()


def test_grids_and_pixels_are_drawn_so_that_different_arrays_look_different() -> None:
    grid = GridRenderer(2)
    array = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    picture = grid.render(array)
    assert picture.shape == (2 * TILE, 3 * TILE, 3)
    for channel in range(2):
        changed = array.copy()
        changed[1, 2, channel] = 0
        differ = np.argwhere((grid.render(changed) != picture).any(-1))
        assert len(differ) and (differ >= (TILE, 2 * TILE)).all()
    assert [name for _, name in grid.legend([array])] == [str(value) for value in range(12)]
    ball = make("worldmodel.environments.hidden_ball:HiddenBall-v0")
    view = ball.reset(seed=1)[0]
    drawn = renderer(ObservationSpec.from_space(ball.observation_space).modalities["observation"], ball)
    assert drawn is not None and [name for _, name in drawn.legend([view])] == ["nothing", "curtain", "ball"]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 18, 4)).astype(np.uint8)
    for channels, expected in ((1, [0, 0, 0]), (3, [0, 1, 2]), (4, [3, 3, 3]), (2, [1, 1, 1])):
        assert np.array_equal(ImageRenderer().render(pixels[..., :channels]), pixels[..., expected])


FEW = ("--num-envs", "2", "--prefill", "30", "--train-ratio", "4", "--threads", "1", "--replay.window", "24")
SMALL = ("--replay.batch-size", "2", "--replay.burn-in", "4", "--model.perception.hidden", "8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    names = {"pixels": CATCH, "grid": "MiniGrid-MemoryS9-v0", "numbers": "CartPole-v1", "class": ECHO}
    for name, env in names.items():
        arguments = ["--env", env, "--run", str(folder / name), "--steps", "60", *FEW, *SMALL]
        assert main(["train", *arguments]) == 0
    return {name: folder / name for name in names}


@pytest.mark.parametrize("name", ["pixels", "grid", "numbers", "class"])
def test_a_run_is_drawn_as_a_picture_and_as_a_film(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found, run = tmp_path / "found.json", runs[name]
    arguments = ["--context", "3", "--horizon", "6", "--random", "--json", str(found), "--threads", "1"]
    assert main(["imagine", str(run), *arguments]) == 0
    said = capsys.readouterr().out
    assert str(run / "imagined.png") in said and str(run / "imagined.gif") in said
    picture, film = iio.imread(run / "imagined.png"), iio.imread(run / "imagined.gif")
    (episode,) = json.loads(found.read_text())["episodes"]
    steps = len(episode["rewards"]) + 1
    assert steps == 9 and len(film) == steps
    assert all((a != b).any() for a, b in itertools.pairwise(film))
    assert {len(values) for values in episode["errors"].values()} == {6}
    assert picture.shape[1] == 1500 and picture.std() > 10
    if name == "pixels":  # the observed ball
        ball = (picture[..., :3] == (255, 200, 40)).all(-1)
        assert ball.sum() > 9 * 50
    if name == "grid":
        assert "image: mean error" in said and "(share of cells that are wrong)" in said


def test_episodes_are_drawn_below_each_other_and_depend_on_their_seeds_alone(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    options = ImagineOptions(runs["class"], context=2, horizon=4, output=tmp_path / "deep" / "down.v1")
    one = imagine(options)
    two = imagine(dataclasses.replace(options, episodes=2, seed=1, output=tmp_path / "two"))
    other = imagine(dataclasses.replace(options, seed=2, output=tmp_path / "other"))
    assert one.png == tmp_path / "deep" / "down.v1.png" and one.gif.is_file()
    assert np.array_equal(two.panels[1].observed["observation"], other.panels[0].observed["observation"])
    tall, flat = iio.imread(two.png), iio.imread(one.png)
    assert tall.shape[0] > 1.6 * flat.shape[0]
    again = imagine(options)
    assert np.array_equal(iio.imread(again.png), flat)


def test_short_episodes_lower_the_context(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = imagine(ImagineOptions(runs["class"], context=11, horizon=4, output=tmp_path / "short"))
    (panel,) = made.panels
    assert panel.context == 5 and len(panel.errors["observation"]) == 6
    assert "episode with seed 0, whole, context lowered to 5" in capsys.readouterr().err


def test_the_words_say_where_the_persistence_baseline_says_little(runs: dict[str, Path], tmp_path: Path) -> None:
    made = imagine(ImagineOptions(runs["numbers"], context=2, horizon=4, output=tmp_path / "still"))
    (panel,) = made.panels
    panel.errors["observation"][:], panel.persistence_errors["observation"][:] = 0.05, 0.01
    assert 0 < made.random_persistence["observation"] < 10
    for moved, little in ((0.3, True), (0.015, False)):
        made.random_persistence["observation"] = moved
        said = summary(made)
        assert "mean error 0.0500, persistence baseline 0.0100" in said
        assert ("little changes in this play" in said) == little
    panel.errors["observation"][:] = 0.005
    assert "little" not in summary(made)


def test_rewards_are_drawn_in_the_units_of_the_environment(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["numbers"]
    options = ImagineOptions(run, context=2, horizon=4, output=tmp_path / "a")
    before = imagine(options).panels[0].predicted_rewards
    path = Run(run).checkpoints[-1] / f"{acting_part(saved_config(Run(run)))}.safetensors"
    kept = path.read_bytes()
    weights = storage.load(path)
    weights["reward_scale.mean_square"] *= 4.0
    storage.save(path, weights)
    try:
        np.testing.assert_allclose(imagine(options).panels[0].predicted_rewards, 2 * before, rtol=1e-6)
    finally:
        path.write_bytes(kept)


def test_many_numbers_and_many_classes_are_drawn_too(tmp_path: Path) -> None:
    model = small_model(spaces.Dict(numbers=spaces.Box(-1, 1, (9,)), switches=spaces.MultiBinary(8)))
    batch = whole_episodes(model, rows=1, time=60)
    panel = Panel.of("all of it", open_loop(model, batch, 20), 0, model.observation_spec.modalities, {})
    picture = draw_png("many", [panel], None, dpi=50)
    assert picture.shape[1] == 625 and picture.std() > 10
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "axes.grid": True}):
        assert (draw_png("many", [panel], None, dpi=50) == picture).all()  # settings of the working directory
    draw_gif("many", [panel], tmp_path / "many.gif", fps=10, dpi=30)
    assert len(iio.imread(tmp_path / "many.gif")) == 60


def test_mistakes_are_one_line_that_says_what_is_wrong(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    Run.create(empty, Run(runs["class"]).config)
    cases = {
        (str(tmp_path / "nowhere"),): "is not the folder of a run",
        (str(empty),): "has no checkpoint yet",
        (str(runs["class"]), "--env", "Nothing-v3"): "no environment 'Nothing-v3'",
        (str(runs["class"]), "--device", "abacus"): "device is 'abacus'",
    }
    capsys.readouterr()
    for arguments, words in cases.items():
        assert main(["imagine", *arguments]) == 1
        said = capsys.readouterr().err
        assert words in said and len(said.strip().splitlines()) == 1, said
    zeros = [((option, "0"), " is 0") for option in ("--episodes", "--context", "--horizon", "--fps")]
    for options, words in [*zeros, (("--random", "--sample"), "give one of them")]:
        with pytest.raises(SystemExit) as stop:
            main(["imagine", str(runs["class"]), *options])
        assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
