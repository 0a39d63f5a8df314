"""``demo arm``: records an expert at four tasks, imitates it from pictures, and draws the arm at each task.

The expert passes a disc on either side. It is asked nothing after the recording.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from worldmodel.acting.arm_episodes import (
    LENGTH,
    Actor,
    PolicyActor,
    mean_command_actor,
    perform,
    random_actor,
    record_demonstrations,
    success_by_task,
)
from worldmodel.data.datasets import EpisodeFile
from worldmodel.demo.arm_picture import Shown, draw, film
from worldmodel.environments.arm.game import observed
from worldmodel.environments.arm.pictures import pictures
from worldmodel.environments.arm.worlds import TASKS, ArmConfig, ArmWorlds
from worldmodel.learning.imitation_run import ImitationRunConfig, described_run
from worldmodel.learning.imitation_trainer import ImitationTrainConfig, ImitationTrainer, demonstrations
from worldmodel.learning.threads import threads_restored
from worldmodel.model.imitation import ImitationPolicy
from worldmodel.runs.fields import Bounds, Checked, Positive, Seed, check_writable
from worldmodel.runs.run import Run

ARM = ArmConfig(joints=True)
_SAY_SECONDS = 15
_SIDE = 256  # pixels of a frame


@dataclasses.dataclass
class ArmDemoOptions(Checked):
    """Records demonstrations of four tasks, learns to imitate them, tries every task, and draws and films the arm."""

    folder: Path = Path("demo-arm")
    """Folder for the demonstrations, the policy, the results, the picture and the film."""
    demonstrations: Annotated[int, Bounds(4, 100_000)] = 1200
    """Recorded episodes."""
    seconds: Positive = 150
    """Seconds of training."""
    episodes: Annotated[int, Bounds(1, 10_000)] = 25
    """Episodes per task that are tried."""
    length: Annotated[int, Bounds(1, 10_000)] = LENGTH
    """Steps of a tried episode, at most."""
    seed: Seed = 0
    """Seed of demonstrations, weights and tables."""


@threads_restored()
def run_arm(options: ArmDemoOptions) -> Path:
    """Returns the picture's path.

    Raises:
        ConfigurationError: the folder cannot be written.
        MissingPackage: matplotlib is not installed.
    """
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), options.folder
    check_writable("--folder", folder / "arm.json", parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demonstrations.npz"
    steps = record_demonstrations(path, options.demonstrations, ARM, seed=options.seed)
    _say(
        f"recorded {options.demonstrations:,} episodes, {steps:,} steps, in {time.perf_counter() - start:.0f} s: {path}"
    )
    trainer = _train(options, path)
    _say(f"for `python -m worldmodel evaluate`: {_saved(trainer, path, folder / 'run')}")
    policy, file = trainer.policy.eval(), EpisodeFile(path)
    random = np.random.default_rng(options.seed)

    actors: dict[str, Callable[[str, ArmWorlds], Actor]] = {
        "imitated": lambda task, worlds: PolicyActor(policy),
        "mean command": lambda task, worlds: mean_command_actor(file, task),
        "random": lambda task, worlds: random_actor(random),
    }
    success: dict[str, dict[str, float]] = {}
    for name, make_actor in actors.items():
        found = success_by_task(make_actor, ARM, options.episodes, seed=options.seed + 1, steps=options.length)
        success[name] = {task: float(performed.success.mean()) for task, performed in found.items()}
        _say(f"{name}: " + ", ".join(f"{task} {share:.0%}" for task, share in success[name].items()))
    summary: dict[str, Any] = {
        "updates": trainer.updates,
        "success": success,
        "seconds": time.perf_counter() - start,
    }
    (folder / "arm.json").write_text(json.dumps(summary, indent=1) + "\n")
    shown = {task: show(policy, task, options) for task in TASKS}
    picture = folder / "arm.png"
    draw(shown, success, picture)
    _say(f"film: {film(shown, folder / 'arm.mp4')}")
    _say(f"{time.perf_counter() - start:.0f} s in all")
    return picture


def show(policy: ImitationPolicy, task: str, options: ArmDemoOptions) -> Shown:
    """One episode of ``task``, as it is drawn."""
    worlds = ArmWorlds(1, dataclasses.replace(ARM, task=task), np.random.default_rng(options.seed + 2))  # type: ignore[arg-type]
    seen, perception = observed(worlds)["picture"], policy.perception
    assert perception is not None  # the arm is seen
    with torch.no_grad():
        posterior = perception({"picture": torch.from_numpy(seen)})
        drawn = perception.reconstruct(perception.latent.mode(posterior))["picture"]
    frames: list[np.ndarray] = []
    performed = perform(
        worlds, PolicyActor(policy), options.length, lambda worlds: frames.append(pictures(worlds, _SIDE)[0])
    )
    frames.append(pictures(worlds, _SIDE)[0])
    return Shown(seen[0], drawn[0].numpy(), frames, bool(performed.success[0]))


def _train(options: ArmDemoOptions, path: Path) -> ImitationTrainer:
    config = ImitationTrainConfig(minutes=options.seconds / 60, seed=options.seed)
    trainer = ImitationTrainer(config, demonstrations(path, config))
    said, nats = time.perf_counter(), []
    while not trainer.finished:
        nats.append(trainer.iterate()["action"])
        if trainer.finished or time.perf_counter() - said > _SAY_SECONDS:
            said = time.perf_counter()
            _say(f"{trainer.updates:,} updates: an action costs {np.mean(nats):.2f} nats")
            nats.clear()
    return trainer


def _saved(trainer: ImitationTrainer, path: Path, folder: Path) -> Path:
    """The folder of a run of ``imitate`` with the policy, a numbered one if there is one already."""
    config = ImitationRunConfig(path, held_out=0.0, env="worldmodel/Arm-v0", env_args=vars(ARM), train=trainer.config)
    run = Run.create(folder, described_run(config, trainer.source), numbered=True)
    run.save(trainer.updates, trainer.state_dict())
    run.close()
    return run.folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
