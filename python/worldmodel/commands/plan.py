"""``plan``: whole episodes by planning in the world model of a run."""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from worldmodel.acting.agent import Agent
from worldmodel.acting.plan_decider import FRESH_IN_LATENTS, IN_LATENTS, PlanningDecider
from worldmodel.acting.plan_evaluation import EvaluatedPlans, evaluate_plans
from worldmodel.acting.planner import PlannerConfig, within_norm
from worldmodel.acting.video import video_file
from worldmodel.commands.command_line import parse
from worldmodel.commands.display import EvaluationProgress
from worldmodel.commands.options import named_environment
from worldmodel.learning.settings import saved_config
from worldmodel.learning.threads import threads_for
from worldmodel.runs.fields import (
    Bounds,
    Checked,
    ConfigurationError,
    Limit,
    Positive,
    Seed,
    Size,
    Text,
    Threads,
    check_writable,
)
from worldmodel.runs.run import Run


@dataclasses.dataclass
class PlanOptions(Checked):
    """Runs whole episodes by planning in the world model of a run, towards the goal that the environment tells.

    The goal is info["goal"] of a reset, an observation. Without one, plans are for the predicted return.
    """

    run: Path
    """Folder of the run."""
    episodes: Annotated[int, Bounds(1, 10**6)] = 100
    """Number of episodes."""
    seed: Seed = 0
    """Seed of the first episode; the others follow it."""
    num_envs: Size = 16
    """Parallel environments, for which plans are searched together."""
    max_steps: Limit | None = None
    """Cut an episode after this many actions of the world model. If not given, after the environment's own limit, or
    10,000 where it has none."""
    random_episodes: Annotated[int, Bounds(0, 10**6)] = 20
    """Episodes of random actions, for comparison, at most as many as --episodes; 0 leaves it out."""
    env: Text | None = None
    """Environment to act in, with the spaces of the run; the training one if not given."""
    env_args: tuple[Text, ...] = ()
    """Arguments of the environment, NAME=VALUE or JSON; without --env, those of training if not given."""
    every: Size = 1
    """Actions that are taken from a plan before it is renewed. A model's errors add up until then."""
    longest: Positive | None = None
    """Longest action of a plan: the Euclidean norm in shares of its bounds. Plans that stay within what was recorded
    are foreseen best. If not given, only the bounds limit them."""
    repeat: bool = True
    """Whether the moves of one action, of a run with --action-steps, are searched as one."""
    planner: PlannerConfig = dataclasses.field(default_factory=lambda: IN_LATENTS)
    """The search."""
    fresh: PlannerConfig = dataclasses.field(default_factory=lambda: FRESH_IN_LATENTS)
    """The search at an episode's beginning."""
    threads: Threads | None = None
    """CPU threads; as many as the model keeps busy if not given."""
    json: Path | None = None
    """Also write the results to this file."""
    video: Path | None = None
    """Also write a video to this file, .mp4 or .gif. Without imageio-ffmpeg it is a GIF."""
    video_episodes: Annotated[int, Bounds(1, 1000)] = 3
    """Episodes in the video, from the first."""
    trust: bool = False
    """Import the modules that the run names even if they are not installed, such as a file in the working directory.
    This executes them: only for runs of someone you trust."""


def command(arguments: Sequence[str]) -> int:
    """Plans, and prints what was reached."""
    options = parse(PlanOptions, arguments, "plan")
    if options.json is not None:
        check_writable("--json", options.json)
    film, notice = (None, "") if options.video is None else video_file(options.video)
    if film is not None:
        check_writable("--video", film)
    run = Run(options.run)
    with named_environment(run, options.env, options.env_args, options.trust) as (env, env_args):
        told = _plan(options, env, env_args, film)
    if notice:
        print(notice, file=sys.stderr)
    if options.json is not None:
        with run.writing(options.json) as file:
            file.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def _plan(options: PlanOptions, env: str, env_args: dict[str, Any], film: Path | None) -> dict[str, Any]:
    """Prints the results, and gives them for JSON."""
    agent = Agent.load(options.run, trust=options.trust)
    if agent.action_spec.kind != "continuous":
        raise ConfigurationError(f"plan: the run's actions are {agent.action_spec.kind}, expected continuous ones")
    torch.set_num_threads(options.threads or threads_for(agent.world_model, options.num_envs))
    steps = saved_config(Run(options.run)).action_steps
    planner = functools.partial(
        PlanningDecider,
        config=options.planner,
        fresh=dataclasses.replace(options.fresh, horizon=options.planner.horizon),
        every=options.every,
        project=None if options.longest is None else within_norm(options.longest),
        repeats=steps if options.repeat else 1,
        seed=options.seed,
    )
    how: dict[str, Any] = {
        "seed": options.seed,
        "num_envs": options.num_envs,
        "action_steps": steps,
        "max_steps": options.max_steps,
        "env_args": env_args,
    }
    shown = EvaluationProgress(env, options.episodes)
    found = evaluate_plans(
        agent,
        env,
        options.episodes,
        planner=planner,
        film=film,
        filmed=options.video_episodes,
        progress=shown,
        **how,
    )
    shown.end()
    if film is not None:
        print(film)
    print(f"{env}: {_summary(found)}, {found.ms_per_action:.2f} ms of planning per action")
    told = {"env": env, "env_args": env_args, **found.to_json()}
    if episodes := min(options.random_episodes, options.episodes):
        chance = evaluate_plans(agent, env, episodes, planner=None, **how)
        print(f"random actions: {_summary(chance)}")
        told["random"] = chance.to_json()
    return told


def _summary(found: EvaluatedPlans) -> str:
    count = len(found.episodes.returns)
    if not found.successes:
        return f"mean return {found.episodes.mean:.4f} over {count} episodes, which have no goal"
    return f"goal reached in {found.reached:.0%} of {count} episodes, held at the end in {found.held:.0%}"
