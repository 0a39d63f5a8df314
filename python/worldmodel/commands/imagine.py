"""``imagine``: observed, reconstructed and imagined steps, drawn."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from worldmodel.acting.agent import Agent
from worldmodel.commands.command_line import parse
from worldmodel.commands.options import named_environment
from worldmodel.data.actions import action_generator
from worldmodel.data.batch import Batch, State
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.environments.single import make_single
from worldmodel.environments.vector import VectorEnvironment
from worldmodel.learning.threads import threads_for
from worldmodel.model.deciders import policy_sample
from worldmodel.model.open_loop import UNITS, episode_batch, error, open_loop
from worldmodel.pictures.bands import Panel
from worldmodel.pictures.page import draw_gif, draw_png
from worldmodel.pictures.renderers import renderer
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Seed, Text, Threads, check_writable
from worldmodel.runs.optional_dependencies import require
from worldmodel.runs.run import Run


@dataclasses.dataclass
class ImagineOptions(Checked):
    """Draws open-loop imagination of a run's newest checkpoint beside observations: a PNG and a GIF.

    After the observed steps, the world model imagines from the agent's actions alone.
    """

    run: Path
    """Folder of the run."""
    episodes: Annotated[int, Bounds(1, 100)] = 1
    """Number of episodes, drawn below each other."""
    context: Annotated[int, Bounds(1, 10_000)] = 5
    """Observed steps; half of an episode that is not longer."""
    horizon: Annotated[int, Bounds(1, 10_000)] = 30
    """Most imagined steps; fewer where the episode ends."""
    seed: Seed = 0
    """Seed of the first episode; the others follow it."""
    env: Text | None = None
    """Another environment with the same spaces; the training one if not given."""
    env_args: tuple[Text, ...] = ()
    """Arguments of the environment, NAME=VALUE or JSON; without --env, those of training if not given."""
    best: bool = False
    """Use the weights of the best evaluation of training, RUN/best."""
    random: bool = False
    """Play with random actions."""
    sample: bool = False
    """Play with actions sampled from the policy; greedy if neither is given."""
    sample_latents: bool = False
    """Sample each imagined latent; the mode if not given."""
    fps: Annotated[float, Bounds(0, 100, above=True)] = 4
    """Steps per second in the GIF."""
    output: Path | None = None
    """Path of the pictures without .png and .gif; RUN/imagined if not given."""
    json: Path | None = None
    """Also write the errors by step to this file."""
    device: Text = "cpu"
    """Device, as PyTorch names it."""
    threads: Threads | None = None
    """CPU threads; as many as the model keeps busy if not given."""
    trust: bool = False
    """Import the modules that the run names even if they are not installed, such as a file in the working directory.
    This executes them: only for runs of someone you trust."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random and self.sample:
            raise ConfigurationError("--random and --sample both say which actions are played: give one of them")
        if self.output is not None and not self.output.name:
            raise ConfigurationError(f"--output is {str(self.output)!r}, expected a path that ends in a name")


@dataclasses.dataclass
class Imagination:
    """Files and episodes from ``imagine``.

    Attributes:
        random_persistence: the persistence baseline's mean error under random actions, by modality.
        failures: a line per episode that an error of the environment ended; it is not drawn.
    """

    png: Path
    gif: Path
    panels: list[Panel]
    random_persistence: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        modalities = self.panels[0].modalities
        units = {name: UNITS[modality.kind] for name, modality in modalities.items()}
        names = (
            "errors",
            "reconstruction_errors",
            "persistence_errors",
            "rewards",
            "predicted_rewards",
            "predicted_ends",
        )

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(part) for key, part in value.items()}
            return value.tolist()

        episodes = [
            {"title": panel.title, "context": panel.context, **{name: plain(getattr(panel, name)) for name in names}}
            for panel in self.panels
        ]
        return {"units": units, "episodes": episodes, "failures": self.failures}


def command(arguments: Sequence[str]) -> int:
    """Imagines and draws."""
    options = parse(ImagineOptions, arguments, "imagine")
    made = imagine(options)
    print(summary(made))
    if made.failures:
        said = f"{len(made.failures)} episodes failed and are left out; the first: {made.failures[0]}"
        print(f"error: {said}", file=sys.stderr)
    return 1 if made.failures else 0


def imagine(options: ImagineOptions) -> Imagination:
    """Plays and draws.

    Raises RunError, UnknownEnvironment, MissingPackage, or EnvironmentFailed if every episode fails.
    """
    require("imageio.v3", "write pictures")
    require("matplotlib", "draw pictures")
    if options.json is not None:
        check_writable("--json", options.json)
    stem = options.output or options.run / "imagined"
    png, gif = (stem.with_name(stem.name + suffix) for suffix in (".png", ".gif"))
    for file in (png, gif) if options.output is not None else ():
        check_writable("--output", file, parents=True)
    run = Run(options.run)
    with named_environment(run, options.env, options.env_args, options.trust) as (name, env_args):
        return _imagine(options, run, name, env_args, (png, gif))


def _imagine(
    options: ImagineOptions, run: Run, name: str, env_args: dict[str, Any], files: tuple[Path, Path]
) -> Imagination:
    agent = Agent.load(options.run, options.device, best=options.best, trust=options.trust)
    torch.set_num_threads(options.threads or threads_for(agent.world_model, options.context + options.horizon))
    torch.manual_seed(options.seed)
    model, modalities = agent.world_model, agent.observation_spec.modalities
    environment = make_single(name, **env_args)
    try:
        found = ((modality, renderer(modalities[modality], environment)) for modality in modalities)
        renderers = {modality: drawn for modality, drawn in found if drawn is not None}
        panels: list[Panel] = []
        failures: list[EnvironmentFailed] = []
        for number in range(options.episodes):
            try:
                batch, whole = _play(agent, environment, options, number)
            except EnvironmentFailed as failure:
                failures.append(failure)
                continue
            steps = batch.shape[1]
            context = options.context if options.context < steps else steps // 2
            sample = model.perception.latent.sample if options.sample_latents else None
            loop = open_loop(model, batch.to(agent.device), context, sample)
            end = "whole" if whole else f"its first {batch.shape[1]} observations"
            title = f"episode with seed {options.seed + number}, {end}"
            if context < options.context:
                title += f", context lowered to {context}"
                print(title, file=sys.stderr)
            panels.append(Panel.of(title, loop, 0, modalities, renderers))
        if not panels:
            raise failures[0]
        try:
            moved = _persistence_errors(agent, environment, options)
        except EnvironmentFailed as failure:
            failures.append(failure)
            moved = {}
    finally:
        environment.close()
    title = f"{name.rpartition(':')[2]}, after {int(run.checkpoints[-1].name):,} steps of training"
    png, gif = files
    png.parent.mkdir(parents=True, exist_ok=True)
    with run.writing(png) as file:
        draw_png(title, panels, file)
    with run.writing(gif) as file:
        draw_gif(title, panels, file, options.fps)
    made = Imagination(png, gif, panels, moved, [str(failure) for failure in failures])
    if options.json is not None:
        with run.writing(options.json) as file:
            file.write_text(json.dumps({"env": name, "env_args": env_args, **made.to_json()}, indent=1) + "\n")
    return made


def _persistence_errors(agent: Agent, environment: Any, options: ImagineOptions) -> dict[str, float]:
    """Of an episode with random actions; nothing of the model."""
    batch, _ = _play(agent, environment, dataclasses.replace(options, random=True, sample=False), 0)
    steps = batch.shape[1]
    context = options.context if options.context < steps else steps // 2
    errors = {}
    for name, modality in agent.observation_spec.modalities.items():
        observed = batch.observations[name][0]
        later = observed[context:]
        errors[name] = float(error(modality, observed[context - 1].expand_as(later), later).mean())
    return errors


def _play(agent: Agent, environment: Any, options: ImagineOptions, number: int) -> tuple[Batch, bool]:
    specs = agent.observation_spec, agent.action_spec
    seed = options.seed + number
    running = VectorEnvironment([environment], lambda _: seed, *specs)
    random = action_generator(seed)
    state: State | None = None
    observations = [{name: array[0] for name, array in running.observations.items()}]
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    elapsed = [1.0]
    terminated = truncated = False
    while len(actions) < options.context + options.horizon - 1 and not (terminated or truncated):
        if options.random:
            chosen = agent.action_spec.sample(random, 1, mask=specs[0].legal(running.observations))
        else:
            decider = policy_sample if options.sample else None
            chosen, state = agent.act_encoded(
                running.observations, state, running.is_first, decider, elapsed=running.elapsed
            )
        happened = running.step(chosen)
        actions.append(chosen[0])
        rewards.append(float(happened.rewards[0]))
        elapsed.append(float(happened.elapsed[0]))
        observations.append({name: array[0] for name, array in happened.next_observations.items()})
        terminated, truncated = bool(happened.terminated[0]), bool(happened.truncated[0])
    return episode_batch(*specs, observations, actions, rewards, terminated, elapsed), terminated or truncated


def summary(made: Imagination) -> str:
    """Mean errors beside the persistence baseline's, and where that says little about the model."""
    lines = []
    for name, modality in made.panels[0].modalities.items():
        ours, kept = (
            float(np.mean(np.concatenate([getattr(panel, which)[name] for panel in made.panels])))
            for which in ("errors", "persistence_errors")
        )
        lines.append(f"{name}: mean error {ours:.4f}, persistence baseline {kept:.4f} ({UNITS[modality.kind]})")
        random = made.random_persistence.get(name, 0.0)
        if kept < ours and kept < random / 2:
            lines.append(
                f"  little changes in this play, so the baseline is hard to beat; under random actions it errs by "
                f"{random:.4f}, and --random imagines those"
            )
    return "\n".join([*lines, str(made.png), str(made.gif)])
