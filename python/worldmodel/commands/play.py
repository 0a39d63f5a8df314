"""``play``: walks through a world in a browser or a terminal."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch

from worldmodel.commands.command_line import parse
from worldmodel.play.game import Game
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Seed, Text


@dataclasses.dataclass
class PlayOptions(Checked):
    """Walks through a saved world, or a new one of a run, in a browser or with --text in a terminal."""

    world: Path
    """File of a world, or folder of a run of train-world, which makes a new one."""
    save: Path | None = None
    """Of a new world, the file that it is saved as; world.safetensors if not given."""
    seed: Seed | None = None
    """Seed of a new world; 0 if not given."""
    size: Annotated[int, Bounds(1, 512)] | None = None
    """Places per side of a new world; by default as in training."""
    bodies: Annotated[int, Bounds(1, 16)] | None = None
    """Agents in a new world, which take turns as you switch between them; 1 if not given."""
    text: bool = False
    """Play in this terminal, without a browser."""
    host: Text = "127.0.0.1"
    """Address to listen on. Others than this machine's own need the token that the address is printed with."""
    port: Annotated[int, Bounds(0, 65535)] = 8710
    """Port to listen on; 0 finds a free one."""


def command(arguments: Sequence[str]) -> int:
    """Plays until Ctrl-C; what is not saved then is rescued."""
    options = parse(PlayOptions, arguments, "play")
    torch.set_num_threads(1)  # a step is small, and others wait for it
    if options.text:
        from worldmodel.play.terminal import Terminal

        with _game(options) as game:
            Terminal(game).run()
        return 0
    from worldmodel.play.server import serve  # a missing package is told before the world is made

    with _game(options) as game:
        try:
            serve(game, options.host, options.port)
        finally:
            for path in game.rescue():
                print(f"what was not saved is in {path}", flush=True)
    return 0


@contextlib.contextmanager
def _game(options: PlayOptions) -> Iterator[Game]:
    """The game, whose file no other process plays meanwhile."""
    from worldmodel.play.worlds import create, load, lock

    new = options.world.is_dir()
    path = (options.save or Path("world.safetensors")) if new else options.world
    if new and path.exists():
        raise ConfigurationError(f"--save {path} is there already: play that, or give another name")
    if not new and not path.exists():
        raise ConfigurationError(f"{path} is neither the file of a world nor the folder of a run")
    for name in ("save", "seed", "size", "bodies"):
        if not new and getattr(options, name) is not None:
            raise ConfigurationError(f"--{name} is of a new world, and {path} is a saved one: leave it out")
    held = lock(path, new)
    try:
        made = (options.seed or 0, options.size, options.bodies or 1)
        yield Game(create(options.world, *made) if new else load(path), path)
    finally:
        held.release()
