"""A new run takes the weights of another that fit, and says which do not."""

import dataclasses
from pathlib import Path

import pytest
import torch

from worldmodel.__main__ import main
from worldmodel.acting.agent import Agent
from worldmodel.learning.settings import TrainConfig, saved_config
from worldmodel.learning.trainer import Trainer
from worldmodel.model.networks import ScalarHead
from worldmodel.runs.configuration import to_json
from worldmodel.runs.run import Run, RunError

CONTROL = Path(__file__).parent / "data" / "control"  # CartPole-v1, with averaged weights
pytestmark = pytest.mark.usefixtures("same_threads")


def new_trainer(**changed: object) -> Trainer:
    return Trainer(dataclasses.replace(saved_config(Run(CONTROL)), **changed))  # type: ignore[arg-type]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.world_model.state_dict().items()}


def test_the_same_task_starts_from_every_averaged_weight(tmp_path: Path) -> None:
    first = new_trainer()
    assert first.learner.ema is not None
    run = Run.create(tmp_path / "run", {"train": to_json(first.config)})
    saved = {name: torch.rand_like(value.float()).to(value) for name, value in weights(first).items()}
    saved |= {name: value for name, value in weights(first).items() if name.endswith("centers")}
    run.save(0, {"ema": saved})
    run.close()
    trainer = new_trainer()
    said = trainer.warm_start(Run(run.folder))
    found = weights(trainer)
    assert saved.keys() == found.keys()
    assert all(torch.equal(value, saved[name]) for name, value in found.items())
    assert trainer.learner.ema is not None
    assert all(torch.equal(value, saved[name]) for name, value in trainer.learner.ema.module.state_dict().items())
    total = sum(parameter.numel() for parameter in trainer.world_model.parameters())
    assert f"{total:,} of {total:,} parameters start from {run.folder}" in said
    assert "new:" not in said


def test_a_head_whose_bins_are_of_other_values_is_not_taken() -> None:
    trainer, saved = new_trainer(), Run(CONTROL).load("ema")
    before = weights(trainer)
    heads = ("evaluation.network.3.", "evaluation.target.3.")  # two-hot, with the bins of an earlier release
    said = trainer.warm_start(Run(CONTROL))
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name] if name.startswith(heads) else saved[name]), name
    assert "evaluation.network.3.centers (other bins)" in said
    assert all(head.narrow is None for head in trainer.world_model.modules() if isinstance(head, ScalarHead))


def test_another_task_keeps_what_fits_and_names_what_does_not() -> None:
    trainer = new_trainer(env="Acrobot-v1")  # three actions, six numbers seen; CartPole has two and four
    before, saved = weights(trainer), Run(CONTROL).load("ema")
    said = trainer.warm_start(Run(CONTROL))
    kept = [name for name, value in before.items() if name not in saved or saved[name].shape != value.shape]
    kept += [name for name in before if name.startswith(("evaluation.network.3.", "evaluation.target.3."))]  # bins
    assert kept and not any(name.startswith("memory.") for name in kept)
    for name, value in weights(trainer).items():
        assert torch.equal(value, before[name] if name in kept else saved[name]), name
    assert "new: " in said
    assert "there, " in said


def test_weights_of_another_size_are_refused() -> None:
    config = TrainConfig(env="CartPole-v1", threads=1)
    trainer = Trainer(config)
    before = weights(trainer)
    with pytest.raises(RunError, match=r"no weights of .* fit this world model: "):
        trainer.warm_start(Run(CONTROL))
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_the_command_takes_settings_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--init-from", str(CONTROL), "--env", "Acrobot-v1", "--run", str(tmp_path / "run")]
    assert main([*arguments, "--steps", "4"]) == 0
    assert f"parameters start from {CONTROL}" in capsys.readouterr().err
    run = Run(tmp_path / "run")
    config = saved_config(run)
    assert config == dataclasses.replace(saved_config(Run(CONTROL)), env="Acrobot-v1", steps=4)
    assert "parameters start from" in run.config["init_from"][0]
    assert Agent.load(run.folder).world_model.action_spec.sizes == (3,)


def test_one_of_resume_and_init_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--init-from", str(CONTROL), "--resume", str(tmp_path)]) == 1
    assert "--init-from gives a new run its weights, and --resume goes on" in capsys.readouterr().err
