"""Text that every Python ships: the sources of its standard library's top-level modules, as bytes."""

import dataclasses
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = 10  # a file's hash modulo this: 0 validation, 1 tuning, else training


@dataclasses.dataclass
class Corpus:
    """Bytes of files, uint8; a file is in one part alone.

    Attributes:
        train: files one after the other.
        validation: by file.
        tuning: by file; to choose settings.
        description: for the result: how many files and bytes, the version of Python, a hash of names and contents.
    """

    train: Tensor
    validation: list[Tensor]
    tuning: list[Tensor]
    description: dict[str, Any]


def load(folder: Path | None = None) -> Corpus:
    """The modules in ``folder``, by default that of ``os``; a hash of a file's name says which part it is in."""
    folder = folder or Path(os.__file__).parent
    names = {name for name in sys.stdlib_module_names if not name.startswith("_sysconfigdata")}  # differs by machine
    files = sorted(path for path in folder.glob("*.py") if path.stem in names)
    digest, parts = hashlib.sha256(), ([], [], [])
    for path in files:
        text = path.read_bytes()
        digest.update(path.name.encode() + b"\0" + text)
        part = min(hashlib.sha256(path.name.encode()).digest()[0] % PARTS, 2)
        parts[part].append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    validation, tuning, train = parts
    description = {
        "text": "sources of the standard library's top-level modules",
        "python": sys.version.split()[0],
        "files": len(files),
        "validation_files": len(validation),
        "tuning_files": len(tuning),
        "train_bytes": sum(map(len, train)),
        "validation_bytes": sum(map(len, validation)),
        "sha256": digest.hexdigest(),
    }
    return Corpus(torch.cat(train), validation, tuning, description)


def windows(files: list[Tensor], length: int, most: int) -> Tensor:
    """Up to ``most`` windows of ``length`` + 1 bytes, (windows, length + 1), spread evenly over the files."""
    starts = [(file, at) for file in files for at in range(0, len(file) - length, length)]
    chosen = starts[:: max(1, len(starts) // most)][:most]
    return torch.stack([file[at : at + length + 1] for file, at in chosen]).long()


class Stream:
    """Windows to train on, at random places of a text, or where the window before ended.

    Args:
        text: bytes.
        rows: of a batch.
        length: of a window.
        share: of windows that go on.
        generator: of places.
    """

    def __init__(self, text: Tensor, rows: int, length: int, share: float, generator: torch.Generator) -> None:
        self.text, self.length, self.share, self.generator = text, length, share, generator
        self.starts = torch.full((rows,), len(text))  # nothing goes on

    def next(self) -> tuple[Tensor, Tensor]:
        """(rows, length + 1) bytes, and which rows go on."""
        size = self.starts.shape
        follow = self.starts + self.length
        on = torch.zeros(size, dtype=torch.bool)
        if self.share:
            fits = follow + self.length < len(self.text)
            on = fits & (torch.rand(size, generator=self.generator) < self.share)
        anywhere = torch.randint(len(self.text) - self.length, size, generator=self.generator)
        self.starts = torch.where(on, follow, anywhere)
        return self.text[self.starts[:, None] + torch.arange(self.length + 1)].long(), on
