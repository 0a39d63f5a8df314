"""A game in a terminal: the view in coloured cells, a key per command."""

import codecs
import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from worldmodel.play.game import REFUSED, Game, said

HELP = (
    "{moves} move   m map   e# edit the cell above, # as below   . wait   f fork   x other world   c close the fork   "
    "{bodies}S save   q quit"
)
_CLEAR = "\x1b[H\x1b[2J"
_ARROWS = {"A": "ArrowUp", "B": "ArrowDown", "C": "ArrowRight", "D": "ArrowLeft"}
_ESCAPE_SECONDS = 0.05  # after which Esc was the key, and not the first byte of an arrow's


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
        self.world = self.body = 0
        self.keys = {key: index for index, keys in enumerate(game.keys) for key in keys}
        self._next = ""  # key that was read already
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def run(self) -> None:
        """Until q, twice where something is not saved, or the end of the source.

        Before Ctrl-C, another signal or an unexpected error ends it, what is not saved is rescued.
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
        except BaseException:
            for path in self.game.rescue():
                self.screen.write(f"what was not saved is in {path}\n")
            raise

    def _key(self) -> str:
        """A key by its name in a browser; empty at the end."""
        key, self._next = self._next or self._read(), ""
        if key != "\x1b":
            return key
        if self.source.isatty() and not select.select([self.source], [], [], _ESCAPE_SECONDS)[0]:
            return "Escape"
        following = self._read()
        if following not in ("[", "O"):
            self._next = following
            return "Escape"
        last = self._read()
        while following == "[" and last and not "@" <= last <= "~":  # what keys with Ctrl or Shift say of them
            last = self._read()
        return _ARROWS.get(last, " ")

    def _read(self) -> str:
        """A letter; of a terminal none is read ahead, so that it can be asked whether another is there."""
        if not self.source.isatty():
            return self.source.read(1)
        letter = ""
        while not letter and (byte := os.read(self.source.fileno(), 1)):
            letter = self._decoder.decode(byte)
        return letter

    def _obey(self, key: str) -> None:
        commands = {"f": "fork", "S": "save"}
        note, shows_map = "", key == "m" and self.game.worlds[self.world].period > 0
        try:
            if key in self.keys:
                self.game.obey({"do": "act", "world": self.world, "body": self.body, "action": self.keys[key]})
            elif key == "x":
                self.world = (self.world + 1) % len(self.game.worlds)
            elif key == "b" and self.game.worlds[self.world].bodies > 1:
                self.body = (self.body + 1) % self.game.worlds[self.world].bodies
            elif key == ".":
                self.game.obey({"do": "wait", "world": self.world, "steps": 1})
            elif key == "e":
                self._edit(self._key())
            elif key == "m":
                note = "" if shows_map else "this world has no map"
            elif key == "c":
                self.game.obey({"do": "close", "world": len(self.game.worlds) - 1})
                self.world = 0
            elif key == "q":
                note = "not all is saved: S saves this world, q again leaves without"
            elif key == "Escape":
                note = ""
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
        if swatch == "Escape":
            return
        value = "123456789abcdefgh".find(swatch) if swatch else -1
        ahead = [rows // 2 - 1, columns // 2]
        self.game.obey({"do": "edit", "world": self.world, "body": self.body, "view": ahead, "value": value})

    def _draw(self, note: str = "", shows_map: bool = False) -> None:
        game, world = self.game, self.game.worlds[self.world]
        picture = game.picture(self.world, self.body)
        marks = {(picture.shape[0] // 2, picture.shape[1] // 2): "<>"}
        if shows_map:
            places = game.places(self.world, self.body)
            values, certainty, _ = world.look(places.reshape(-1, 2))
            faded = world.colours[values] * np.asarray(certainty)[:, None]
            picture = faded.astype(np.uint8).reshape(*places.shape[:2], 3)
            here = {body: np.argwhere((places == world.position(body)).all(-1)) for body in range(world.bodies)}
            marks = {(y, x): "()" for found in here.values() for y, x in found.tolist()}
            marks |= {(y, x): "<>" for y, x in here[self.body].tolist()}
        row, column = world.position(self.body)
        bodies = f"body {self.body + 1} of {world.bodies}, " if world.bodies > 1 else ""
        saved = "saved" if game.is_saved(self.world) else "not saved"
        moves = "".join(key for key in self.keys if len(key) == 1)
        swatches = " ".join(
            f"{'123456789abcdefgh'[index]}{_cell(rgb)}" for index, (_, rgb) in enumerate(game.swatches[:17])
        )
        lines = [
            *(
                "".join(_cell(rgb, marks.get((y, x), "  ")) for x, rgb in enumerate(line))
                for y, line in enumerate(picture.tolist())
            ),
            f"world {self.world + 1} of {len(game.worlds)}, {bodies}step {world.steps:,}, at {row}, {column}, {saved}",
            *([note] if note else []),
            HELP.format(moves=moves, bodies="b other body   " if world.bodies > 1 else ""),
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
