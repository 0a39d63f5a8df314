"""A game in a terminal: the view in coloured cells, a key per command."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from worldmodel.play.game import KEYS, REFUSED, Game, said

HELP = (
    "{moves} move   m map   e# edit the cell above, # as below   . wait   f fork   x other world   c close the fork   "
    "S save   q quit"
)
_CLEAR = "\x1b[H\x1b[2J"


class Terminal:
    """Reads keys from ``source``, draws on ``screen``.

    Args:
        game: that is played.
        source: of the keys; from a terminal one by one, else as they come.
        screen: that is drawn on.
    """

    def __init__(self, game: Game, source: TextIO | None = None, screen: TextIO | None = None) -> None:
        self.game = game
        self.source, self.screen = source or sys.stdin, screen or sys.stdout
        self.world = 0
        self.keys = {key: index for index, name in enumerate(game.actions) for key in KEYS.get(name, [str(index + 1)])}

    def run(self) -> None:
        """Until q, twice where something is not saved, or the end of the source.

        Before an unexpected error is raised, what is not saved is rescued.
        """
        try:
            with self._single_keys():
                self._draw()
                before = ""
                while key := self._key():
                    if key == "q" and (before == "q" or all(map(self.game.is_saved, range(len(self.game.worlds))))):
                        break
                    if not key.isspace():
                        self._obey(key)
                        before = key
        except Exception:
            for path in self.game.rescue():
                self.screen.write(f"what was not saved is in {path}\n")
            raise

    def _key(self) -> str:
        """A key by its name in a browser; empty at the end."""
        key = self.source.read(1)
        if key != "\x1b" or self.source.read(1) != "[":
            return key
        return {"A": "ArrowUp", "B": "ArrowDown", "C": "ArrowRight", "D": "ArrowLeft"}.get(self.source.read(1), " ")

    def _obey(self, key: str) -> None:
        commands = {"f": "fork", "S": "save"}
        note, shows_map = "", key == "m" and self.game.worlds[self.world].period > 0
        try:
            if key in self.keys:
                self.game.obey({"do": "act", "world": self.world, "action": self.keys[key]})
            elif key == "x":
                self.world = (self.world + 1) % len(self.game.worlds)
            elif key == ".":
                self.game.obey({"do": "wait", "world": self.world, "steps": 1})
            elif key == "e":
                self._edit(self.source.read(1))
            elif key == "m":
                note = "" if shows_map else "this world has no map"
            elif key == "c":
                self.game.obey({"do": "close", "world": len(self.game.worlds) - 1})
                self.world = 0
            elif key == "q":
                note = "not all is saved: S saves this world, q again leaves without"
            elif key in commands:
                messages = self.game.obey({"do": commands[key], "world": self.world})
                note = " ".join(message["text"] for message in messages if message["type"] == "said")
            else:
                note = f"there is no key {key!r}"
        except REFUSED as error:
            note = str(said(error)["text"])
        self._draw(note, shows_map)

    def _edit(self, swatch: str) -> None:
        rows, columns = self.game.worlds[self.world].grid
        value = "123456789abcdefgh".find(swatch) if swatch else -1
        ahead = [rows // 2 - 1, columns // 2]
        self.game.obey({"do": "edit", "world": self.world, "view": ahead, "value": value})

    def _draw(self, note: str = "", shows_map: bool = False) -> None:
        game, world = self.game, self.game.worlds[self.world]
        picture = game.picture(self.world)
        agent = picture.shape[0] // 2, picture.shape[1] // 2
        if shows_map:
            places = game.places(self.world)
            values, certainty, _ = world.look(places.reshape(-1, 2))
            faded = world.colours[values] * np.asarray(certainty)[:, None]
            picture = faded.astype(np.uint8).reshape(*places.shape[:2], 3)
            y, x = np.argwhere((places == world.position()).all(-1))[0].tolist()
            agent = y, x
        row, column = world.position()
        saved = "saved" if game.is_saved(self.world) else "not saved"
        moves = "".join(key for key in self.keys if len(key) == 1)
        swatches = " ".join(
            f"{'123456789abcdefgh'[index]}{_cell(rgb)}" for index, (_, rgb) in enumerate(game.swatches[:17])
        )
        lines = [
            *(
                "".join(_cell(rgb, "<>" if (y, x) == agent else "  ") for x, rgb in enumerate(line))
                for y, line in enumerate(picture.tolist())
            ),
            f"world {self.world + 1} of {len(game.worlds)}, step {world.steps:,}, at {row}, {column}, {saved}",
            *([note] if note else []),
            HELP.format(moves=moves),
            swatches,
        ]
        self.screen.write((_CLEAR if self.screen.isatty() else "") + "\n".join(lines) + "\n")
        self.screen.flush()

    @contextlib.contextmanager
    def _single_keys(self) -> Iterator[None]:
        """Keys come without Enter from a terminal, which is put back as it was."""
        if not self.source.isatty():
            yield
            return
        import termios
        import tty

        handle = self.source.fileno()
        before = termios.tcgetattr(handle)
        try:
            tty.setcbreak(handle)
            yield
        finally:
            termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _cell(rgb: list[int], text: str = "  ") -> str:
    red, green, blue = rgb
    ink = 30 if sum(rgb) > 300 else 97
    return f"\x1b[48;2;{red};{green};{blue};{ink}m{text}\x1b[0m"
