"""The command line: ``python -m worldmodel train | evaluate | imagine | demo``."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from worldmodel.runs.optional_dependencies import MissingPackage, require

Options = TypeVar("Options")

USAGE = """usage: python -m worldmodel COMMAND [options]

  train       train a world model on an environment
  evaluate    run whole episodes with what was trained
  imagine     draw what was seen, reconstructed and imagined open-loop, as a PNG and a GIF
  demo        show what the memory does: `demo memory`, under three minutes on two cores

python -m worldmodel COMMAND --help explains the options.
"""


@dataclasses.dataclass
class EvaluateOptions:
    """Runs whole episodes with the newest checkpoint of a run, and prints their mean return."""

    run: Path
    """Folder of the run."""
    episodes: int = 100
    """How many episodes."""
    seed: int = 0
    """Seed of the first episode; the others follow it."""
    num_envs: int = 16
    """Environments that run side by side."""
    env: str | None = None
    """Another environment with the same spaces; the one trained on if not given."""
    sample: bool = False
    """Draw actions from the policy; the best one is taken if not given."""
    device: str = "cpu"
    """Where to compute."""
    threads: int | None = None
    """Threads that PyTorch uses on a CPU."""
    json: Path | None = None
    """Also write the returns to this file."""
    video: Path | None = None
    """Also write a video to this file, .mp4 or .gif; RUN/evaluated.mp4 where --video has no file behind it. Without
    imageio-ffmpeg it is a GIF."""
    video_episodes: int = 3
    """How many episodes the video shows, the first ones."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot work."""
        for name in ("episodes", "num_envs", "video_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


def parse(kind: type[Options], arguments: Sequence[str], command: str, default: Options | None = None) -> Options:
    """A dataclass out of options, whose help is its docstrings."""
    tyro = require("tyro", "read the command line")
    given = {} if default is None else {"default": default}
    config = (tyro.conf.PositionalRequiredArgs,)
    return tyro.cli(kind, args=list(arguments), prog=f"python -m worldmodel {command}", config=config, **given)


def train_command(arguments: Sequence[str]) -> int:
    """Starts a run, or goes on with one."""
    from worldmodel.commands.options import train_options
    from worldmodel.learning.trainer import train

    config, folder, how = train_options(arguments, parse)
    run = train(config, folder, **how)
    print(run.folder)
    return 0


def evaluate_command(arguments: Sequence[str]) -> int:
    """Evaluates a run."""
    import torch

    from worldmodel.acting.agent import Agent
    from worldmodel.acting.rollout import evaluate, evaluate_filmed
    from worldmodel.learning.settings import saved_config
    from worldmodel.runs.run import Run

    options = parse(EvaluateOptions, _video_named(arguments), "evaluate")
    if options.threads:
        torch.set_num_threads(options.threads)
    agent = Agent.load(options.run, options.device)
    env = options.env or saved_config(Run(options.run)).env
    how = (options.episodes, options.seed, options.num_envs)
    if options.video is None:
        found = evaluate(agent, env, *how, greedy=not options.sample)
    else:
        from worldmodel.acting.video import video_file

        wanted = options.run / "evaluated.mp4" if options.video == Path() else options.video
        file, notice = video_file(wanted)
        if notice:
            print(notice, file=sys.stderr)
        found = evaluate_filmed(agent, env, file, options.video_episodes, *how, greedy=not options.sample)
        print(file)
    print(f"{env}: mean return {found.mean:.4f} ± {found.standard_error:.4f} over {len(found.returns)} episodes")
    if options.json is not None:
        options.json.write_text(json.dumps({"env": env, **found.to_json()}, indent=1) + "\n")
    return 0


def _video_named(arguments: Sequence[str]) -> list[str]:
    """``--video`` with nothing behind it stands for the place in the run's folder, which an empty name says."""
    named: list[str] = []
    for index, argument in enumerate(arguments):
        named.append(argument)
        following = arguments[index + 1 : index + 2]
        if argument == "--video" and (not following or following[0].startswith("-")):
            named.append(str(Path()))
    return named


def imagine_command(arguments: Sequence[str]) -> int:
    """Draws what a run imagines."""
    import torch

    from worldmodel.commands.imagine import ImagineOptions, imagine, summary

    options = parse(ImagineOptions, arguments, "imagine")
    if options.threads:
        torch.set_num_threads(options.threads)
    print(summary(imagine(options)))
    return 0


def demo_command(arguments: Sequence[str]) -> int:
    """Shows something."""
    from worldmodel.demo.command import main as demo

    return demo(arguments, parse)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "evaluate": evaluate_command,
    "imagine": imagine_command,
    "demo": demo_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; what a user can put right is one line on stderr, not a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    command = COMMANDS.get(given[0])
    if command is None:
        print(f"there is no command {given[0]!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return command(given[1:])
    except MissingPackage as error:
        print(error, file=sys.stderr)
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("worldmodel"):
            raise
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
