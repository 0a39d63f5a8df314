"""``imitate`` and what reads its runs: from recorded episodes to a policy that is evaluated, resumed and drawn."""

import json
import shlex
import shutil
import signal

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from worldmodel.__main__ import main
from worldmodel.acting.imitation_agent import ImitationAgent, Success, evaluate_tasks
from worldmodel.acting.recording import record
from worldmodel.commands import plot
from worldmodel.data.datasets import EpisodeFile
from worldmodel.environments.registry import make
from worldmodel.learning import imitation_run
from worldmodel.learning.imitation_run import HeldOutActions, imitation_sources, load_policy, saved_imitation_config
from worldmodel.learning.imitation_trainer import ImitationTrainer
from worldmodel.runs.run import Run

SMALL = shlex.split(
    "--memory lstm --batch-size 2 --window 8 --warmup 1 --reconstruction vae --pictures 4 --policy.hidden 16 "
    "--policy.memory.width 16 --policy.pictures.latent.size 6 --policy.pictures.hidden 16 "
    "--policy.pictures.image-channels 4 --policy.head.hidden 8"
)
NUMBERS = shlex.split("--memory lstm --batch-size 2 --window 8 --policy.hidden 16 --policy.memory.width 16 --updates 2")
pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("arm") / "arm.npz"
    arm = ["--env", "worldmodel/Arm-v0", "--env-args", "noise=0.3", "joints=true", "--policy", "scripted"]
    assert main(["record", *arm, "--steps", "260", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def imitated(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "arm"
    assert main(["imitate", "--data", str(recorded), "--run", str(folder), *SMALL, "--updates", "2"]) == 0
    return folder


def refused(capsys, *arguments, begun=False):
    """The one line that a command ends with; if ``begun``, after what it said before."""
    capsys.readouterr()
    try:
        assert main([str(argument) for argument in arguments]) == 1
    except SystemExit as ended:
        assert ended.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and (begun or len(lines) == 1)
    return lines[-1]


def test_a_policy_is_learned_resumed_and_evaluated(recorded, tmp_path, capsys):
    folder, result = str(tmp_path / "run"), tmp_path / "result.json"
    assert main(["imitate", "--data", str(recorded), "--run", folder, *SMALL, "--updates", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folder}\n" and f"python -m worldmodel evaluate {folder}" in captured.err
    run = Run(folder)
    config = saved_imitation_config(run)
    assert (run.command, config.env, config.env_args["joints"]) == ("imitate", "worldmodel/Arm-v0", True)
    assert main(["imitate", "--resume", folder, "--updates", "3"]) == 0
    assert "going on after 2 updates" in capsys.readouterr().err
    run = Run(folder)
    assert [line["updates"] for line in run.metrics] == [2, 3] and run.checkpoints[-1].name == f"{3:012d}"
    assert all({"loss/action", "loss/pixels", "held_out/action"} <= line.keys() for line in run.metrics)
    held_out = HeldOutActions(imitation_sources(config)[1])
    assert held_out(load_policy(run)) == pytest.approx(run.metrics[-1]["held_out/action"], abs=1e-5)
    given = ["--episodes", "8", "--random-episodes", "4", "--max-steps", "2", "--json", str(result)]
    assert main(["evaluate", folder, *given]) == 0
    told, said = json.loads(result.read_text()), capsys.readouterr().out
    assert list(told["success"]) == ["pick", "push", "stack", "wipe"] and told["env"] == "worldmodel/Arm-v0"
    assert all(each["episodes"] == 2 and each["share"] == 0 for each in told["success"].values())
    assert told["lengths"] == [2] * 8 and told["cut"] == 8 and told["random"]["success"]["pick"]["episodes"] == 1
    assert "pick: success 0%, 95% interval [0%, 66%], over 2 episodes" in said
    for changed in (["--window", "9"], ["--held-out", "0.5"]):
        assert "a resumed run keeps its settings and data" in refused(capsys, "imitate", "--resume", folder, *changed)
    assert "leave it out" in refused(capsys, "imitate", "--resume", folder, "--memory", "scan")


def test_the_best_checkpoint_is_that_of_the_least_held_out_loss(recorded, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    weights = []

    def measured(self, policy):
        weights.append(policy.head.context.weight.detach().clone())
        return next(losses)

    monkeypatch.setattr(imitation_run.HeldOutActions, "__call__", measured)
    folder, often = tmp_path / "run", ["--held-out-minutes", "1e-9", "--updates", "3"]
    assert main(["imitate", "--data", str(recorded), "--run", str(folder), *SMALL, *often]) == 0
    run = Run(folder)
    assert [line["held_out/action"] for line in run.metrics] == [3, 1, 2]
    assert run.best_evaluation["updates"] == 2 and run.best_evaluation["held_out/action"] == 1
    best, newest = (ImitationAgent.load(folder, best=best).policy.head.context.weight for best in (True, False))
    assert (best == weights[1]).all() and (newest == weights[2]).all() and not (best == newest).all()
    losses = iter([1.5])
    assert main(["imitate", "--resume", str(folder), "--updates", "4"]) == 0
    assert Run(folder).best_evaluation["updates"] == 2, "a resumed run knows the best before"


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(recorded, tmp_path, monkeypatch, capsys):
    iterate = ImitationTrainer.iterate

    def interrupted(self):
        found = iterate(self)
        signal.raise_signal(signal.SIGINT)
        return found

    whole, folder = str(tmp_path / "whole"), str(tmp_path / "run")
    given = ["imitate", "--data", str(recorded), *SMALL, "--updates", "3"]
    assert main([*given, "--run", whole]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ImitationTrainer, "iterate", interrupted)
        assert main([*given, "--run", folder]) == 130
    assert f"python -m worldmodel imitate --resume {folder}" in capsys.readouterr().err
    assert Run(folder).checkpoints[-1].name == f"{1:012d}" and Run(folder).metrics[-1]["updates"] == 1
    assert main(["imitate", "--resume", folder]) == 0
    expected, found = load_policy(Run(whole)).state_dict(), load_policy(Run(folder)).state_dict()
    assert all((found[name] == value).all() for name, value in expected.items())
    assert Run(folder).metrics[-1]["held_out/action"] == Run(whole).metrics[-1]["held_out/action"]


def test_tasks_are_chosen_by_name_or_index(recorded, tmp_path, capsys):
    tasks = EpisodeFile(recorded).arrays["observations/task"][EpisodeFile(recorded).episode_starts, 0]
    task = int(tasks[0])
    name = ("pick", "push", "stack", "wipe")[task]
    folder = tmp_path / "run"
    given = ["--data", recorded, "--run", folder, *SMALL, "--updates", "1", "--held-out", "0", "--tasks", name]
    assert main(["imitate", *map(str, given)]) == 0
    config = saved_imitation_config(Run(folder))
    source, held_out = imitation_sources(config)
    assert config.tasks == (task,) and held_out is None
    assert source.file.episodes == (tasks == task).sum() < len(tasks)
    assert (source.sample()[0].observations["task"] == task).all()
    assert main(["evaluate", str(folder), "--episodes", "2", "--max-steps", "1", "--random-episodes", "0"]) == 0
    assert f"{name}: success" in (said := capsys.readouterr().out) and said.count("success") == 1
    assert "no loss on held-out episodes was measured" in refused(capsys, "evaluate", folder, "--best")
    said = refused(capsys, "imitate", "--data", recorded, "--tasks", "juggle")
    assert "--tasks has 'juggle', expected one of pick, push, stack, wipe, or an index" in said
    assert "has no episode of these" in refused(capsys, "imitate", "--data", recorded, "--tasks", "9")


def damaged(recorded, path, change):
    arrays = {name: np.array(array) for name, array in np.load(recorded).items()}
    change(arrays)
    np.savez(path, **arrays)
    return path


def one_step(arrays):
    start = int(np.flatnonzero(arrays["is_first"])[1])
    arrays["is_last"][start] = arrays["is_first"][start + 1] = True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays.pop("actions"), "it has no actions"),
        (
            lambda arrays: arrays["actions"].__setitem__(2, np.nan),
            "episode 0, step 2: episodes: actions has values from",
        ),
        (
            lambda arrays: arrays["observations/joints"].__setitem__(3, np.nan),
            "episode 0, step 3: episodes: observation 'joints' holds NaN",
        ),
        (one_step, "episode 1, step 0: the episode has one step and no action"),
    ],
    ids=["no actions", "NaN action", "NaN observation", "one step"],
)
def test_wrong_data_is_one_line_with_file_episode_and_step(recorded, tmp_path, capsys, change, said):
    path = damaged(recorded, tmp_path / "bad.npz", change)
    given = [*SMALL, "--held-out", "0", "--updates", "40", "--run", tmp_path / "run"]
    line = refused(capsys, "imitate", "--data", path, *given, begun="observation" in said)
    assert str(path) in line and said in line


def test_what_cannot_be_imitated_is_refused(recorded, tmp_path, capsys):
    record("worldmodel/Rooms-v0", tmp_path / "rooms.npz", 12)
    said = refused(capsys, "imitate", "--data", tmp_path / "rooms.npz")
    assert f"{tmp_path / 'rooms.npz'}: actions are discrete, expected numbers, of a Box" in said
    assert "--data is missing" in refused(capsys, "imitate")
    assert "none.npz" in refused(capsys, "imitate", "--data", tmp_path / "none.npz")
    said = refused(capsys, "imitate", "--data", recorded, "--head", "median")
    assert "--head is 'median', expected one of" in said
    record("Pendulum-v1", tmp_path / "numbers.npz", 40)
    none = ["--held-out", "0"]
    said = refused(capsys, "imitate", "--data", tmp_path / "numbers.npz", "--reconstruction", "vae", *none)
    assert "reconstruction is 'vae', and no picture is observed: expected 'none'" in said
    assert not (tmp_path / "runs").exists()


def test_other_commands_say_what_the_run_is(imitated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where play locks the new world's file
    for command in (["imagine"], ["plan"], ["train", "--resume"], ["train", "--init-from"]):
        said = refused(capsys, *command, imitated)
        assert f"{imitated} is a run of imitate, a policy without a world model, for evaluate and plot" in said
    assert "is a run of imitate, expected one of train-world" in refused(capsys, "play", imitated, "--text")
    assert "--video is of runs of train" in refused(capsys, "evaluate", imitated, "--video")


def test_a_run_of_someone_else_executes_nothing_and_allocates_no_more_than_its_weights(imitated, tmp_path, capsys):
    run = shutil.copytree(imitated, tmp_path / "run")
    (run / "hostile.py").write_text("import pathlib; pathlib.Path(__file__).with_name('executed').touch()")
    config = json.loads((run / "config.json").read_text())

    def changed(change):
        own = json.loads(json.dumps(config))
        change(own["imitation"])
        (run / "config.json").write_text(json.dumps(own))
        return refused(capsys, "evaluate", run, "--episodes", "1")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        patch.syspath_prepend(str(run))
        assert "hostile" in changed(lambda own: own.update(env="hostile:make"))
        block = [{"kind": "custom", "block": "hostile:Block"}]
        assert "hostile" in changed(lambda own: own["train"]["policy"]["memory"].update(blocks=block))
    assert not (run / "executed").exists()
    said = changed(lambda own: own["train"]["policy"].update(hidden=60_000))
    assert "holds the weights of another configuration" in said
    assert "imitation.train has nothing" in changed(lambda own: own["train"].update(nothing=1))


def test_curves_of_imitation_are_drawn_together_and_named_by_what_differs(imitated, recorded, tmp_path, capsys):
    others = {"seed": ["--seed", "1"], "wide": ["--policy.hidden", "12"]}
    folders = [imitated]
    for name, given in others.items():
        folders.append(tmp_path / name)
        given = ["--data", recorded, "--run", folders[-1], *SMALL, "--updates", "1", *given]
        assert main(["imitate", *map(str, given)]) == 0
    runs = [Run(folder) for folder in folders]
    assert plot.labels_of(runs[:2]) == ["worldmodel/Arm-v0"] * 2
    same, other = plot.labels_of(runs)[1:]
    assert same.endswith("train.policy.hidden=16") and other.endswith("train.policy.hidden=12")
    assert plot._shared_metrics(runs) == ("held_out/action", "loss/action")
    assert main(["plot", *map(str, folders), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000


class Reach(gymnasium.Env):
    """Success where the action has the task's sign, three steps long."""

    tasks = ("down", "up")
    observation_space = spaces.Dict(place=spaces.Box(-1, 1, (2,)), task=spaces.Discrete(2))
    action_space = spaces.Box(-3, 3, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task, self.steps = seed % 2, 0
        return self._seen(), {}

    def _seen(self):
        return {"place": self.np_random.uniform(-1, 1, 2).astype(np.float32), "task": self.task}

    def step(self, action):
        self.steps += 1
        right = bool((np.asarray(action) * (2 * self.task - 1) > 0).all())
        return self._seen(), float(right), False, self.steps == 3, {"success": right}

    def expert(self):
        return np.full(2, 2.0 * (2 * self.task - 1), np.float32)


@pytest.fixture
def reach():
    gymnasium.register("wmtest/Reach-v0", Reach)
    yield "wmtest/Reach-v0"
    gymnasium.registry.pop("wmtest/Reach-v0")


def test_numbers_alone_are_imitated_in_any_environment(reach, tmp_path, capsys):
    record(reach, tmp_path / "reach.npz", 300, policy="scripted")
    folder = str(tmp_path / "run")
    given = [*NUMBERS, "--lr", "0.03", "--batch-size", "8", "--updates", "40", "--warmup", "5", "--head", "mean"]
    assert main(["imitate", "--data", str(tmp_path / "reach.npz"), "--run", folder, *given]) == 0
    assert main(["evaluate", folder, "--episodes", "12", "--num-envs", "5", "--json", str(tmp_path / "a.json")]) == 0
    told, said = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert {task: each["successes"] for task, each in told["success"].items()} == {"down": 6, "up": 6}
    assert told["returns"] == [3.0] * 12 and "up: success 100%, 95% interval [61%, 100%], over 6 episodes" in said
    assert "random policy" in said and told["random"]["mean"] < 2
    agent = ImitationAgent.load(folder)
    assert evaluate_tasks(agent, reach, 3, 1, 2, max_steps=1).success == {"up": Success(2, 2), "down": Success(1, 1)}
    assert "has continuous actions (1,), expected (2,)" in refused(capsys, "evaluate", folder, "--env", "Pendulum-v1")


def test_data_without_a_name_of_its_environment_needs_one_to_evaluate_in(tmp_path, capsys):
    record("Pendulum-v1", tmp_path / "a.npz", 40)

    def nameless(arrays):
        spec = json.loads(arrays["spec"].tobytes())
        del spec["env"]
        arrays["spec"] = np.frombuffer(json.dumps(spec).encode(), np.uint8)

    path, folder = damaged(tmp_path / "a.npz", tmp_path / "b.npz", nameless), tmp_path / "run"
    given = [*NUMBERS, "--held-out", "0"]
    assert main(["imitate", "--data", str(path), "--run", str(folder), *given]) == 0
    assert "--env names an environment to act in" in refused(capsys, "evaluate", folder)
    few = ["--episodes", "1", "--max-steps", "2", "--random-episodes", "0"]
    assert main(["evaluate", str(folder), "--env", "Pendulum-v1", *few]) == 0
    assert "success" not in capsys.readouterr().out


def test_noise_is_of_what_the_expert_does_and_not_of_what_is_recorded_or_of_others(recorded):
    file = EpisodeFile(recorded)
    within = ~file.arrays["is_last"][:-1]
    turned = np.diff(file.arrays["observations/joints"][:, :3], axis=0)[within] / 0.12
    asked = file.arrays["actions"][:-1, :3][within]
    assert np.median(np.abs(turned - asked)) > 0.03
    assert file.arrays["actions"].shape[0] - file.episodes == 260
    arms = [make("worldmodel/Arm-v0", noise=noise, joints=True).unwrapped for noise in (0.0, 0.5)]
    for own in (True, False):
        joints = []
        for arm in arms:
            arm.reset(seed=3)
            action = arm.expert()
            action = action if own else np.clip(action + 0.05, -1, 1)
            joints.append(arm.step(action)[0]["joints"])
        assert np.allclose(*joints) is not own
