"""``plan`` and ``demo plan``: whole episodes towards goals that an environment tells, and for the return without."""

import json
import math

import numpy as np
import pytest
import torch

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.acting.plan_evaluation import GoalDecider, GoalEpisodes, Success
from worldmodel.acting.recording import record
from worldmodel.environments.action_steps import ActionSteps
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.two_rooms.game import TwoRooms
from worldmodel.runs.run import Run

ROOMS = "worldmodel/TwoRooms-v0"
SMALL = ["--model.perception.hidden", "8", "--model.prediction.hidden", "8", "--model.evaluation.hidden", "8"]
SMALL += ["--model.decision.hidden", "8", "--replay.batch-size", "2", "--held-out", "0", "--threads", "1"]
SEARCH = ["--planner.horizon", "4", "--planner.samples", "8", "--planner.iterations", "2", "--threads", "1"]
SEARCH += ["--fresh.samples", "8", "--fresh.iterations", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    walks = folder / "walks.npz"
    record(ROOMS, walks, 120, env_args={"task": "walk", "length": 60})
    run = ["--preset", "planning", "--action-steps", "4", "--updates", "2", "--run", str(folder / "run"), *SMALL]
    assert main(["train", "--data", str(walks), *run]) == 0
    return folder / "run"


class Corridor(TwoRooms):
    """Tells of successes at steps 3 to 5, and of times."""

    def step(self, action):
        observation, _, _, truncated, info = super().step(action)
        return observation, 1.0, False, truncated, {**info, "success": 3 <= self.steps <= 5, "elapsed": self.steps}


def test_several_actions_are_one_and_an_episode_may_end_among_them():
    rooms = ActionSteps(Corridor(length=6), 4)
    rooms.reset(seed=0)
    assert rooms.action_space.contains(np.zeros((4, 2), np.float32)) and rooms.action_space.shape == (4, 2)
    _, reward, _, truncated, info = rooms.step(np.zeros((4, 2)))
    assert (reward, truncated, info["elapsed"]) == (4, False, 2.5) and rooms.unwrapped.steps == 4
    _, reward, _, truncated, info = rooms.step(np.zeros((4, 2)))
    assert (reward, truncated, info["elapsed"]) == (2, True, 5.5)


def test_goals_and_successes_are_kept_by_episode():
    rooms = GoalEpisodes(Corridor(length=6), 4)
    _, info = rooms.reset(seed=7)
    assert np.array_equal(rooms.goal, info["goal"])
    rooms.step(np.zeros((4, 2)))
    assert rooms.successes == {7: Success(3, True)}
    rooms.step(np.zeros((4, 2)))
    assert rooms.successes == {7: Success(3, False)}
    rooms.reset(seed=8)
    rooms.step(np.zeros((2, 2)))
    assert rooms.successes[8] == Success(math.inf, False) and rooms.successes[7].first == 3


def test_each_row_plans_to_the_goal_of_its_episode(trained):
    agent, seen, begun = Agent.load(trained), [], []

    class Spy:
        cost = None

        def begin(self, row, seed):
            begun.append((row, seed))

        def __call__(self, world_model, state):
            seen.append(self.cost)
            return torch.zeros(len(state["features"]), 8)

    environments = [GoalEpisodes(TwoRooms(), 4) for _ in range(2)]
    decider = GoalDecider(agent, environments, Spy())
    for row, environment in enumerate(environments):
        environment.reset(seed=row)
        decider.begin(row, row + 7)
    assert begun == [(0, 7), (1, 8)], "the planner is told, too"
    state = agent.init_state(2)
    decider(agent.world_model, state)
    goals = torch.from_numpy(np.stack([environment.goal for environment in environments]))
    with torch.no_grad():
        expected = agent.world_model.perception({"observation": goals})
    torch.testing.assert_close(seen[0].of_latents.goal, expected)
    environments[1].goal = None
    decider.begin(1, 9)
    with pytest.raises(EnvironmentFailed, match="1 of 2 episodes have a goal, expected all or none"):
        decider(agent.world_model, state)
    environments[0].goal = None
    decider.begin(0, 9)
    decider(agent.world_model, state)
    assert seen[-1] is None, "for the return"
    environments[0].goal = np.zeros(3)
    with pytest.raises(EnvironmentFailed, match=r"info\['goal'\] of the episode with seed 9 is no observation: "):
        decider.begin(0, 9)


def test_the_command_tells_what_was_reached_and_films_it(trained, tmp_path, capsys):
    told, film = tmp_path / "plan.json", tmp_path / "plan.gif"
    where = ["--env", ROOMS, "--env-args", "length=24", "ends=false", "--episodes", "3", "--num-envs", "2"]
    output = ["--json", str(told), "--video", str(film), "--video-episodes", "1", "--random-episodes", "2"]
    assert main(["plan", str(trained), *where, "--longest", "0.4", *SEARCH, *output]) == 0
    said = capsys.readouterr().out
    assert (
        f"{ROOMS}: goal reached in" in said and "ms of planning per action" in said and "random actions: goal" in said
    )
    found = json.loads(told.read_text())
    assert found["lengths"] == [6, 6, 6] and len(found["first_success"]) == 3 and found["ms_per_action"] > 0
    assert (
        0 <= found["held"] <= found["reached"] <= 1 and found["random"]["episodes"] == 2 and film.stat().st_size > 1000
    )
    assert main(["plan", str(trained)]) == 1
    assert "learned from recorded episodes: --env names an environment" in capsys.readouterr().err


def test_without_goals_plans_are_for_the_return_and_actions_are_continuous(tmp_path, capsys):
    for env in ("Pendulum-v1", "worldmodel_environments:Echo"):
        path, run = tmp_path / f"{env[:8]}.npz", tmp_path / env[:8]
        record(env, path, 40)
        learn = ["--data", str(path), "--updates", "1", "--memory", "none", "--replay.window", "6", "--run", str(run)]
        assert main(["train", *learn, "--replay.burn-in", "0", *SMALL]) == 0
    capsys.readouterr()
    planned = ["--episodes", "1", "--max-steps", "6", *SEARCH]
    assert main(["plan", str(tmp_path / "Pendulum"), "--env", "Pendulum-v1", *planned]) == 0
    assert "over 1 episodes, which have no goal" in capsys.readouterr().out
    assert main(["plan", str(run), "--env", env, *planned]) == 1
    assert "the run's actions are discrete, expected continuous ones" in capsys.readouterr().err


def test_the_demonstration_leaves_a_run_numbers_a_picture_and_a_film(tmp_path, capsys):
    folder = tmp_path / "demo"
    options = ["--walks", "3", "--seconds", "0.1", "--episodes", "4", "--steps", "16"]
    assert main(["demo", "plan", "--folder", str(folder), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(folder / "plan.png") and (folder / "plan.png").stat().st_size > 10_000
    summary = json.loads((folder / "plan.json").read_text())
    assert set(summary["reached"]) == {"planned", "straight line", "random walk"} and summary["updates"] >= 1
    films = [path for path in folder.iterdir() if path.suffix in (".gif", ".mp4")]
    assert len(films) == 1 and films[0].stat().st_size > 1000
    assert Run(folder / "run").checkpoints and "python -m worldmodel plan" in captured.err
    assert main(["demo", "plan", "--folder", str(folder)]) == 1
    assert "has a demonstration already" in capsys.readouterr().err
