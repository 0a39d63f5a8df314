"""Runs of the previous release work; ``data/README.md`` describes them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worldmodel_environments  # noqa: F401 - registers its environments
from test_replay import STATE, Recorder, assert_same, single
from worldmodel_examples import small_model

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.acting.rollout import evaluate
from worldmodel.commands import train as training
from worldmodel.commands.options import train_options
from worldmodel.commands.train import train
from worldmodel.data.replay import Replay, ReplayConfig
from worldmodel.learning.settings import TrainConfig, saved_config
from worldmodel.learning.trainer import Trainer
from worldmodel.model.codecs import VectorCodec
from worldmodel.model.evaluation import EvaluationConfig
from worldmodel.model.networks import ScalarConfig
from worldmodel.model.prediction import PredictionConfig
from worldmodel.runs import storage
from worldmodel.runs.configuration import ConfigurationError, to_json
from worldmodel.runs.migration import FIELDS, load_part
from worldmodel.runs.run import Run

DATA = Path(__file__).with_name("data")
RUNS = ("scan", "gru", "control", "conv_lstm")
pytestmark = pytest.mark.usefixtures("same_threads")


def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / name / "expected.json").read_text())
    return found


def is_far(agent: Agent, observation: dict[str, np.ndarray]) -> bool:
    """Whether a number is more than 10 deviations from its mean, which the release before took as it was."""
    perception = agent.world_model.perception
    pairs = zip(perception.codecs, agent.observation_spec.modalities, strict=True)
    return any(
        isinstance(codec, VectorCodec)
        and bool((codec.standardised(torch.from_numpy(observation[name])).abs() > 10).any())
        for codec, name in pairs
    )


@pytest.mark.parametrize("name", RUNS)
def test_an_agent_of_the_release_before_acts_as_it_did(name: str) -> None:
    agent, known = Agent.load(DATA / name), expected(name)
    state, compared = None, 0
    for step, before in enumerate(known["acted"]):
        observation = {
            modality: np.array([value], agent.observation_spec.modalities[modality].dtype)
            for modality, value in before["observation"].items()
        }
        actions, state = agent.act_encoded(observation, state, np.array([step in (0, 7)]))
        assert actions[0].tolist() == before["action"], step
        if is_far(agent, observation):
            assert name == "control"  # which has no memory: later steps are as they were
            continue
        compared += 1
        torch.testing.assert_close(state["features"][0], torch.tensor(before["features"]), rtol=1e-4, atol=1e-5)
        value = agent.world_model.evaluation.value(state["features"])
        torch.testing.assert_close(value[0].item(), before["value"], rtol=1e-4, atol=1e-5)
    assert state is not None and compared >= 3
    model = agent.world_model
    with torch.no_grad():
        imagined = model.imagine_actions(state, state["action"][:, None].repeat(1, 3, 1), model.perception.latent.mode)
    as_before = slice(1 if is_far(agent, observation) else 0, None)  # what is imagined from a far one is as it was
    for field, index in (("rewards", 0), ("continues", 0), ("features", (0, -1))):
        now, before = getattr(imagined, field)[index], torch.tensor(known["imagined"][field])
        steps = as_before if field != "features" else slice(None)
        torch.testing.assert_close(now[steps], before[steps], rtol=1e-4, atol=1e-5)
    assert float(model.reward_scale.scale) == pytest.approx(known["reward_scale"])


def test_an_agent_of_the_release_before_has_the_returns_that_it_had() -> None:
    agent, known = Agent.load(DATA / "gru"), expected("gru")
    found = evaluate(agent, saved_config(Run(DATA / "gru")).env, 4, seed=3, num_envs=2)
    assert list(found.returns) == known["returns"] and list(found.lengths) == known["lengths"]


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(DATA / name, folder)
    return folder


def test_a_run_of_whole_episodes_resumes_with_the_losses_of_the_release_before(tmp_path: Path) -> None:
    run, known = Run(copied("gru", tmp_path / "run")), expected("gru")
    trainer = Trainer(saved_config(run))
    trainer.load(run)
    assert (trainer.updates, trainer.steps) == (known["updates"], known["steps"])
    learned, real = [], trainer.learner.update

    def update(batch: Any) -> dict[str, float]:
        learned.append(real(batch))
        return learned[-1]

    trainer.learner.update = update  # type: ignore[method-assign]
    while trainer.steps < known["steps_after"]:
        trainer.iterate()
    assert len(learned) == len(known["learned"]) > 3
    for now, before in zip(learned, known["learned"], strict=True):
        assert {name: now[name] for name in before} == pytest.approx(before, rel=1e-3, abs=1e-5)


def test_a_run_with_stored_states_resumes_trains_on_and_is_saved_in_todays_format(tmp_path: Path) -> None:
    folder = copied("scan", tmp_path / "run")
    before = Run(folder)
    old = before.load("replay")
    known = expected("scan")
    assert main(["train", "--resume", str(folder), "--steps", str(known["steps"] + 40)]) == 0
    run = Run(folder)
    assert json.loads((folder / "config.json").read_text())["format"] == 2
    assert len(run.checkpoints) == 2 and run.metrics[-1]["updates"] > known["updates"]
    assert np.isfinite([run.metrics[-1][f"loss/{part}"] for part in ("model", "value", "policy")]).all()
    for path in run.checkpoints[-1].iterdir():
        assert storage.load_versioned(path, read=run.segments.read)[1] == storage.VERSION
    # Replay keeps its data.
    assert sum(len(old["sequences"][chunk_id]["rewards"]) for chunk_id in old["chunk_ids"]) > 100
    assert run.load("replay")["added"] == old["added"] + 40
    assert main(["train", "--resume", str(folder), "--steps", str(known["steps"] + 60)]) == 0
    assert Agent.load(folder).world_model.reward_scale.count > 0


def test_a_configuration_of_the_release_before_is_the_one_of_today(tmp_path: Path) -> None:
    config = saved_config(Run(DATA / "control"))
    assert config.learner.ema == 20 and config.learner.max_grad_norm == 1.0 and config.learner.model_lr == 1e-3
    assert config.model.decision.gradient == "reinforce" and config.model.evaluation.tau == 0.02
    assert saved_config(Run(DATA / "conv_lstm")).env == "worldmodel/HiddenBall-v0"


def test_the_default_columns_of_an_earlier_release_are_those_of_today(tmp_path: Path) -> None:
    for data in (None, tmp_path / "recorded.npz"):
        settings = {**to_json(TrainConfig(data=data, preset="popgym")), "data_columns": ["pixels"]}
        assert saved_config(Run.create(tmp_path / str(data is None), {"train": settings})).data_columns == ()


def test_an_option_of_an_earlier_release_names_the_one_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    today = re.findall(r"--[\w.-]+", capsys.readouterr().out)
    for old in (field for field in FIELDS if field.startswith("train.")):  # others depend on the spaces
        option = "--" + old.removeprefix("train.").replace("_", "-")
        with pytest.raises(ConfigurationError, match=f"{option} is an option of an earlier release: use --") as refused:
            train_options(["--env", "CartPole-v1", option, "1"])
        assert str(refused.value).partition("use ")[2] in today


def test_an_option_of_the_flat_memory_names_blocks() -> None:
    with pytest.raises(
        ConfigurationError, match=r"--model.memory.kind is an option of an earlier release: use --memory"
    ):
        train_options(["--env", "CartPole-v1", "--model.memory.kind=gru"])


def test_a_run_of_a_module_that_is_gone_says_which(tmp_path: Path) -> None:
    folder = copied("gru", tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["train"]["env"] = "worldmodel.gone:Echo-v0"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the module 'worldmodel\.gone' cannot be imported"):
        train(saved_config(Run(folder)), folder, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("episodes", "expected"),
    [
        ({"numbers": [3, 4], "begun": 5}, {"episode_ids": [3, 4], "begun": 5}),
        ({"pickle": b"", "ignored": [False]}, {"pickle": b"", "ignored": [False]}),
        (None, None),
    ],
    ids=["environments", "a pickled vector environment", "a vector environment"],
)
def test_the_episodes_of_every_kind_of_environment_are_translated(episodes: Any, expected: Any) -> None:
    part = load_part("collector", lambda _: ({"episodes": episodes}, 1), lambda _: True)
    assert part == {"episodes": expected}


def as_version_2(state: dict[str, Any], window: int) -> dict[str, Any]:
    """A replay's state as it was: chunks concatenated, unfinished ones padded to a window."""
    sequences, writer = state["sequences"], state["writer"]
    chunks = [sequences[chunk_id] for chunk_id in state["chunk_ids"]]
    inside = [chunk for chunk in chunks if chunk["inside"][0]]
    running = [(fields, sequences[fields["id"]]) for fields in writer["running"]]

    def padded(name: str, rows: int) -> np.ndarray:
        found = np.zeros((len(running), rows, *running[0][1][name].shape[1:]), running[0][1][name].dtype)
        for row, (_, arrays) in enumerate(running):
            found[row, : len(arrays[name])] = arrays[name]
        return found

    packed = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0] if "." not in name}
    return {
        **{name: value for name, value in state.items() if name != "sequences"},
        "chunks": {
            **packed,
            "observations": {"observation": np.concatenate([chunk["observations.observation"] for chunk in chunks])},
            "states": {"memory.h": np.concatenate([chunk["state.memory.h"] for chunk in inside])},
            "length": np.array([len(chunk["rewards"]) for chunk in chunks]),
        },
        "writer": {
            "observations": {"observation": padded("observations.observation", window)},
            "elapsed": padded("elapsed", window),
            **{name: padded(name, window - 1) for name in ("actions", "rewards", "reward_mask")},
            "length": np.array([len(arrays["rewards"]) for _, arrays in running]),
            "episode_step": np.array([fields["episode_step"] for fields, _ in running]),
            "repeated": np.array([fields["burn_in"] for fields, _ in running]),
            "state": writer["state"],
            "next_state": [later[0][1:] if later else None for later in writer["later"]],
        },
        "next_id": writer["next_id"],
    }


def test_a_replay_with_padded_chunks_is_cut_to_its_steps_and_goes_on_as_it_would_have(tmp_path: Path) -> None:
    config = ReplayConfig(batch_size=3, window=11, burn_in=3, max_steps=300)
    recorder = Recorder(single(3, 40), config)
    for _ in range(133):
        recorder.step()
    recorder.replay.sample()
    storage.save(tmp_path / "replay.safetensors", recorder.replay.state_dict())
    old = as_version_2(storage.load(tmp_path / "replay.safetensors"), window=11)
    upgraded = load_part("replay", lambda _: (old, 2), lambda _: True)
    again = Replay(recorder.replay.observation_spec, recorder.replay.action_spec, 3, config, STATE)
    again.load_state_dict(upgraded)
    assert again.nbytes == recorder.replay.nbytes
    for _ in range(40):
        batches = [replay.sample(version=200) for replay in (recorder.replay, again)]
        assert_same(batches[0][0], batches[1][0])
        rows, zeros = np.arange(3), np.zeros(3, bool)
        step = {"observation": recorder.random.normal(size=(3, 4)).astype(np.float32)}
        for replay in (recorder.replay, again):
            replay.add(rows, rows, np.ones(3, np.float32), zeros, zeros, step)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("part", ["world_model", "ema"])
def test_a_head_of_a_version_whose_bins_widened_says_what_it_said(version: int, part: str) -> None:
    kinds = ScalarConfig("two_hot"), ScalarConfig("mean")
    model = small_model(
        dtype=torch.float32,
        prediction=PredictionConfig(16, reward=kinds[0]),
        evaluation=EvaluationConfig(16, value=kinds[1]),
    )
    stored: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("project.bias") and f"{name.removesuffix('project.bias')}" in SCALARS:
            head = name.removesuffix("project.bias")
            stored |= {f"{head}v_min": torch.tensor(-2.0), f"{head}v_max": torch.tensor(6.0)}
        if not name.endswith("centers"):
            stored[name] = value
    read = load_part(part, lambda _: (stored, version), lambda _: True)
    model.load_state_dict(read)
    head, features = model.prediction.reward, torch.randn(5, 16)
    logits = head(features)
    torch.testing.assert_close(head.mean(logits), logits.softmax(-1) @ torch.linspace(-2, 6, 41))
    assert head.narrow == (-2.0, 6.0)


SCALARS = ("prediction.reward.", "evaluation.network.3.", "evaluation.target.3.")


def test_a_resumed_run_says_where_the_bins_of_an_earlier_release_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(dataclasses.replace(saved_config(Run(DATA / "control")), steps=10))
    assert not training.narrow_notice(trainer)
    trainer.world_model.load_state_dict(Run(DATA / "control").load("world_model"))
    (said,) = training.narrow_notice(trainer)
    low, high = trainer.world_model.evaluation.head.narrow
    assert f"values beyond {low:.3g} and {high:.3g} reward scales count as these" in said
