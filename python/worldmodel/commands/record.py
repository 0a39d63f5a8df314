"""``record``: episodes of an environment in a file."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from worldmodel.acting.agent import Agent
from worldmodel.acting.recording import Policy, record
from worldmodel.commands.command_line import parse
from worldmodel.commands.options import environment_arguments
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Seed, Text, check_writable


@dataclasses.dataclass
class RecordOptions(Checked):
    """Records episodes of an environment in one .npz file, to train from; worldmodel.data.datasets has its layout."""

    env: Text = ""
    """Environment: a gymnasium id, module:Env-v0, a name of popgym's, or module:function, which makes one."""
    out: Path = Path("episodes.npz")
    """File to write, .npz."""
    steps: Annotated[int, Bounds(1, 10**9)] = 10_000
    """Actions in all; the last episode is cut there."""
    policy: Policy = "auto"
    """explore: the environment's own exploring policy; scripted: its expert; random: any legal action; agent: that of
    --agent; auto: agent if one is given, else explore where there is one, else random."""
    agent: Path | None = None
    """Folder of a run whose agent acts, greedily."""
    trust: bool = False
    """With --agent: import memory blocks that the run names even if they are not installed. This executes them."""
    env_args: tuple[Text, ...] = ()
    """Arguments of the environment, NAME=VALUE ... or JSON."""
    seed: Seed = 0
    """Seed of episodes and actions."""


def command(arguments: Sequence[str]) -> int:
    """Records, and prints the file."""
    options = parse(RecordOptions, arguments, "record")
    if not options.env:
        raise ConfigurationError("--env is missing: a gymnasium id, module:Env-v0, module:function, or popgym's name")
    if options.out.suffix != ".npz":
        raise ConfigurationError(f"--out is {str(options.out)!r}, expected a name that ends with .npz")
    check_writable("--out", options.out)
    if options.trust and options.agent is None:
        raise ConfigurationError("--trust is of the run of an agent: --agent is missing")
    agent = None if options.agent is None else Agent.load(options.agent, trust=options.trust)
    episodes = record(
        options.env,
        options.out,
        options.steps,
        policy=options.policy,
        seed=options.seed,
        env_args=environment_arguments(options.env_args),
        progress=_Progress(options.steps),
        agent=agent,
    )
    print(f"{options.steps:,} steps in {episodes:,} episodes of {options.env}", file=sys.stderr)
    print(options.out)
    return 0


class _Progress:
    """A line on stderr every 20 s."""

    def __init__(self, steps: int) -> None:
        self._steps, self._said = steps, time.monotonic()

    def __call__(self, steps: int) -> None:
        if time.monotonic() - self._said > 20:
            self._said = time.monotonic()
            print(f"{steps:,} of {self._steps:,} steps", file=sys.stderr, flush=True)
