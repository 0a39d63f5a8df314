"""Result files of rows with a key, each written as soon as it is measured: what was interrupted goes on."""

import json
import statistics
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from harness import environment

Row = dict[str, Any]


class KeyedRows:
    """Rows of a benchmark on the CPU.

    Args:
        path: of the result file.
        benchmark: its name.
        key: of a row; there is one row of each.
    """

    def __init__(self, path: Path, benchmark: str, key: Callable[[Row], Hashable]) -> None:
        self._path, self._benchmark, self._key = path, benchmark, key

    @property
    def rows(self) -> list[Row]:
        """Those in the file."""
        return json.loads(self._path.read_text())["rows"] if self._path.exists() else []

    def has(self, planned: Row) -> bool:
        """Whether there is a row with the key of ``planned``."""
        return any(self._key(row) == self._key(planned) for row in self.rows)

    def add(self, row: Row) -> None:
        """Writes and prints ``row``, in place of the one with its key."""
        others = [old for old in self.rows if self._key(old) != self._key(row)]
        about = {"benchmark": self._benchmark, "device": "cpu"}
        about["environment"] = environment.describe(torch.device("cpu"))
        self._path.write_text(json.dumps({**about, "rows": [*others, row]}, indent=1) + "\n")
        print(row, flush=True)


def mean_and_range(shares: list[float]) -> str:
    """In percent; the range where it is one."""
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return f"{statistics.mean(shares):.0%}" + ("" if low == high else f" ({low} to {high})")
