"""``evaluate``: whole episodes with a run's newest checkpoint."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from worldmodel.acting.agent import Agent
from worldmodel.acting.imitation_agent import ImitationAgent, RandomAgent, evaluate_tasks
from worldmodel.acting.rollout import Evaluated, RandomPolicy, evaluate, evaluate_filmed
from worldmodel.acting.video import video_file
from worldmodel.commands.command_line import parse
from worldmodel.commands.display import EvaluationProgress
from worldmodel.commands.options import named_environment
from worldmodel.environments.registry import EnvironmentFailed
from worldmodel.learning.imitation_run import saved_imitation_config
from worldmodel.learning.threads import threads_for
from worldmodel.model.deciders import policy_sample
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Limit, Seed, Size, Text, Threads, check_writable
from worldmodel.runs.run import Run


@dataclasses.dataclass
class EvaluateOptions(Checked):
    """Runs whole episodes with the newest checkpoint of a run, and prints their mean return.

    Of a run of imitate also the success by task, where the environment tells one in info["success"].
    """

    run: Path
    """Folder of the run."""
    episodes: Annotated[int, Bounds(1, 10**6)] = 100
    """Number of episodes."""
    seed: Seed = 0
    """Seed of the first episode; the others follow it."""
    num_envs: Size = 16
    """Parallel environments."""
    max_steps: Limit | None = None
    """Cut an episode after this many steps. If not given, after the environment's own limit, or 10,000 where it has
    none."""
    random_episodes: Annotated[int, Bounds(0, 10**6)] = 20
    """Episodes of the random policy, for comparison, at most as many as --episodes; 0 leaves it out."""
    env: Text | None = None
    """Another environment with the same spaces; if not given the training one, or the one that was recorded."""
    env_args: tuple[Text, ...] = ()
    """Arguments of the environment, NAME=VALUE or JSON; without --env, those of training if not given."""
    best: bool = False
    """Use the weights of the best evaluation of training, RUN/best. Its return there is better than it is elsewhere. Of
    a run of imitate, those of the least loss on held-out episodes."""
    sample: bool = False
    """Sample actions from the policy; greedy if not given."""
    device: Text = "cpu"
    """Device, as PyTorch names it."""
    threads: Threads | None = None
    """CPU threads; as many as the model keeps busy if not given."""
    json: Path | None = None
    """Also write the returns to this file."""
    video: Path | None = None
    """Also write a video to this file, .mp4 or .gif; RUN/evaluated.mp4 if --video has no value. Without imageio-ffmpeg
    it is a GIF."""
    video_episodes: Annotated[int, Bounds(1, 1000)] = 3
    """Episodes in the video, from the first."""
    trust: bool = False
    """Import the modules that the run names even if they are not installed, such as a file in the working directory.
    This executes them: only for runs of someone you trust."""


def command(arguments: Sequence[str]) -> int:
    """Evaluates a run."""
    options = parse(EvaluateOptions, _video_named(arguments), "evaluate")
    if options.json is not None:
        check_writable("--json", options.json)
    video, notice = None, ""
    if options.video is not None:
        video, notice = video_file(options.run / "evaluated.mp4" if options.video == Path() else options.video)
        if options.video != Path():
            check_writable("--video", video)
    run = Run(options.run)
    with named_environment(run, options.env, options.env_args, options.trust) as (env, env_args):
        evaluate_run = _evaluate_imitation if run.command == "imitate" else _evaluate
        told = evaluate_run(options, run, env, env_args, video)
    if notice:
        print(notice, file=sys.stderr)
    if options.json is not None:
        with run.writing(options.json) as file:
            file.write_text(json.dumps(told, indent=1) + "\n")
    failures = [*told["failures"], *told.get("random", {}).get("failures", ())]
    if failures:
        print(f"error: {len(failures)} episodes failed and are left out; the first: {failures[0]}", file=sys.stderr)
    return 1 if failures else 0


def _evaluate(
    options: EvaluateOptions, run: Run, env: str, env_args: dict[str, Any], video: Path | None
) -> dict[str, Any]:
    """Prints the returns, and gives them for JSON."""
    agent = Agent.load(options.run, options.device, best=options.best, trust=options.trust)
    torch.set_num_threads(options.threads or threads_for(agent.world_model, options.num_envs))
    how = (options.episodes, options.seed, options.num_envs)
    decider = policy_sample if options.sample else None
    limits: dict[str, Any]
    shown = EvaluationProgress(env, options.episodes)
    if video is None:
        found = evaluate(
            agent, env, *how, decider=decider, max_steps=options.max_steps, progress=shown, env_args=env_args
        )
    else:
        limits = {"max_steps": options.max_steps, "progress": shown, "env_args": env_args}
        with run.writing(video) as film:
            found = evaluate_filmed(agent, env, film, options.video_episodes, *how, decider=decider, **limits)
        print(video)
    shown.end()
    print(f"{env}: {_summary(found)}")
    told = {"env": env, "env_args": env_args, **found.to_json()}
    if episodes := min(options.random_episodes, options.episodes):
        shown = EvaluationProgress(f"{env}, random policy", episodes)
        random: dict[str, Any] = {"decider": RandomPolicy(agent.action_spec), "progress": shown}
        limits = {"max_steps": options.max_steps, "env_args": env_args}
        try:
            chance = evaluate(agent, env, episodes, options.seed, options.num_envs, **random, **limits)
        except EnvironmentFailed as failure:
            shown.end()
            told["random"] = {"failures": [str(failure)]}
        else:
            shown.end()
            print(f"random policy: {_summary(chance)}")
            told["random"] = chance.to_json()
    return told


def _evaluate_imitation(
    options: EvaluateOptions, run: Run, env: str, env_args: dict[str, Any], video: Path | None
) -> dict[str, Any]:
    """As ``_evaluate``, of a run of ``imitate``."""
    if video is not None:
        raise ConfigurationError(f"--video is of runs of train, and {run.folder} is one of imitate: leave it out")
    temperature = 1.0 if options.sample else 0.0
    agent = ImitationAgent.load(
        options.run, options.device, best=options.best, temperature=temperature, trust=options.trust
    )
    torch.set_num_threads(options.threads or 1)
    how: dict[str, Any] = {"max_steps": options.max_steps, "env_args": env_args}
    how["tasks"] = saved_imitation_config(run).tasks
    told: dict[str, Any] = {"env": env, "env_args": env_args}
    actors: dict[str, tuple[ImitationAgent | RandomAgent, int]] = {env: (agent, options.episodes)}
    if episodes := min(options.random_episodes, options.episodes):
        actors["random policy"] = RandomAgent(agent.observation_spec, agent.action_spec, options.seed), episodes
    for name, (actor, count) in actors.items():
        shown = EvaluationProgress(name, count)
        found = evaluate_tasks(actor, env, count, options.seed, options.num_envs, progress=shown, **how)
        shown.end()
        print(f"{name}: {_summary(found.found)}")
        for task, success in found.success.items():
            low, high = success.interval
            said = f"{success.share:.0%}, 95% interval [{low:.0%}, {high:.0%}], over {success.episodes} episodes"
            print(f"  {task}: success {said}")
        told |= {"random": found.to_json()} if actor is not agent else found.to_json()
    return told


def _summary(found: Evaluated) -> str:
    if found.interval is None:
        said = f"return {found.mean:.4f}, of one episode"
    else:
        low, high = found.interval
        said = f"mean return {found.mean:.4f}, 95% interval [{low:.4f}, {high:.4f}], over {len(found.returns)} episodes"
    if found.cut:
        said += f", {found.cut} of them cut after {max(found.lengths):,} steps (--max-steps)"
    return said


def _video_named(arguments: Sequence[str]) -> list[str]:
    named: list[str] = []
    for index, argument in enumerate(arguments):
        named.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--video" and (not following or following[0].startswith("-")):
            named.append(str(Path()))
    return named
