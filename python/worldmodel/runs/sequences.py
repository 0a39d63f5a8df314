"""Sequences that only grow, such as a replay's: what a checkpoint wrote of them, the next one need not write again.

A sequence is named arrays, each of which grows along its first axis. They are packed by name, with the id, the first
row and the number of rows of every slice, so that slices of one array may be in several packs.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.runs.memory import machine_memory

PACK_BYTES = 32 * 2**20  # of rows; bounds the memory of saving and loading
_SAMPLE_BYTES = 2**18
_WORTHWHILE = 0.7  # compressed share of a sample
_MOST_RATIO = 1100  # of zlib

Slice = tuple[int, str, int, np.ndarray]  # id, name, first row, rows


@dataclasses.dataclass(frozen=True)
class Segment:
    """An immutable file of slices.

    Attributes:
        path: of the file.
        size: of the file, in bytes.
        slices: name -> int64 (n, 3): id, first row, rows.
        row_bytes: name -> bytes per row, before compression.
    """

    path: Path
    size: int
    slices: dict[str, np.ndarray]
    row_bytes: dict[str, int]

    def is_there(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    def nbytes(self, ids: np.ndarray | None = None) -> int:
        """Bytes before compression, of all sequences or of ``ids``."""
        total = 0
        for name, found in self.slices.items():
            rows = found[:, 2] if ids is None else found[np.isin(found[:, 0], ids), 2]
            total += int(rows.sum()) * self.row_bytes[name]
        return total


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is in ``segments``: all of ``complete`` sequences, and ``rows`` of the others' arrays by id and name."""

    segments: tuple[Segment, ...] = ()
    complete: frozenset[int] = frozenset()
    rows: Mapping[int, Mapping[str, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Record:
    """A ``Saved`` that can be replaced; of one object whose sequences are saved."""

    value: Saved = dataclasses.field(default_factory=Saved)


@dataclasses.dataclass
class Sequences:
    """Sequences for ``storage.save``.

    Attributes:
        ids: of all, in order.
        growing: ids of those that may still grow.
        arrays: id -> name -> (rows, ...).
        record: of what is written; ``runs.segments`` replaces its value with each checkpoint.
    """

    ids: Sequence[int]
    growing: Collection[int]
    arrays: Callable[[int], Mapping[str, np.ndarray]]
    record: Record = dataclasses.field(default_factory=Record)

    def new(self, saved: Saved) -> Iterator[Slice]:
        """The rows that ``saved`` does not have."""
        for sequence in self.ids:
            if sequence not in saved.complete:
                before = saved.rows.get(sequence, {})
                for name, array in self.arrays(sequence).items():
                    start = before.get(name, 0)
                    if len(array) > start:
                        yield sequence, name, start, array[start:]

    def inline(self) -> dict[str, Any]:
        """All of it as a nested state."""
        return {**self.header(), "packs": list(packs(self.new(Saved())))}

    def saved_in(self, segments: tuple[Segment, ...]) -> Saved:
        growing = {each: {name: len(array) for name, array in self.arrays(each).items()} for each in self.growing}
        return Saved(segments, frozenset(self.ids) - growing.keys(), growing)

    def header(self) -> dict[str, Any]:
        return {"ids": np.array(self.ids, np.int64), "growing": sorted(self.growing)}


class Loaded(dict[int, dict[str, np.ndarray]]):
    """Sequences as loaded: id -> name -> (rows, ...).

    Attributes:
        saved: the files that they come from.
    """

    saved = Saved()


def packs(slices: Iterable[Slice]) -> Iterator[dict[str, Any]]:
    """Slices as nested states of about ``PACK_BYTES``."""
    waiting: dict[str, list[Slice]] = {}
    nbytes = 0
    for sequence, name, start, rows in slices:
        most = max(1, PACK_BYTES // max(1, rows[:1].nbytes))
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            if nbytes and nbytes + part.nbytes > PACK_BYTES:
                yield _packed(waiting)
                waiting, nbytes = {}, 0
            waiting.setdefault(name, []).append((sequence, name, start + first, part))
            nbytes += part.nbytes
    if waiting:
        yield _packed(waiting)


def _packed(waiting: Mapping[str, list[Slice]]) -> dict[str, Any]:
    return {
        name: {
            "slices": np.array([(sequence, start, len(rows)) for sequence, _, start, rows in found], np.int64),
            "rows": _compressed(np.concatenate([rows for *_, rows in found])),
        }
        for name, found in waiting.items()
    }


def _compressed(rows: np.ndarray) -> np.ndarray | dict[str, Any]:
    """``rows`` by zlib's fastest level where a sample of them shrinks."""
    raw = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
    sample = raw[:_SAMPLE_BYTES]
    if len(zlib.compress(sample, 1)) > _WORTHWHILE * len(sample):
        return rows
    packed = np.frombuffer(zlib.compress(raw, 1), np.uint8)
    return {"zlib": packed, "dtype": rows.dtype.str, "shape": list(rows.shape)}


def row_bytes(rows: np.ndarray | Mapping[str, Any]) -> int:
    """Bytes per row before compression."""
    if isinstance(rows, np.ndarray):
        return rows[:1].nbytes
    return math.prod(rows["shape"][1:]) * np.dtype(rows["dtype"]).itemsize


def _nbytes(rows: np.ndarray | Mapping[str, Any]) -> int:
    """Before compression, by the shape; raises ValueError if that cannot be."""
    if isinstance(rows, np.ndarray):
        return rows.nbytes
    nbytes = math.prod(rows["shape"]) * np.dtype(rows["dtype"]).itemsize
    if not 0 <= nbytes <= _MOST_RATIO * rows["zlib"].nbytes:
        raise ValueError(f"compressed rows of shape {rows['shape']} cannot have {rows['zlib'].nbytes} bytes")
    return nbytes


def _decompressed(rows: np.ndarray | Mapping[str, Any]) -> np.ndarray:
    """Raises ValueError if the length is not that of the shape."""
    if isinstance(rows, np.ndarray):
        return rows
    dtype, shape, expected = np.dtype(rows["dtype"]), tuple(rows["shape"]), _nbytes(rows)
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(rows["zlib"].tobytes(), expected + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != expected:
        raise ValueError(f"compressed rows hold {len(raw)} bytes, expected {expected}")
    return np.frombuffer(raw, dtype).reshape(shape)


def unpacked(header: Mapping[str, Any], found: Iterable[tuple[Mapping[str, Any], Segment | None]]) -> Loaded:
    """Inverts ``packs``; ``found`` are packs, and the segments they come from.

    Raises:
        ValueError: rows are missing, or there twice.
    """
    ids = header["ids"].tolist()
    parts: dict[int, dict[str, list[tuple[int, np.ndarray]]]] = {sequence: {} for sequence in ids}
    segments, nbytes = [], 0
    for pack, segment in found:
        segments += [] if segment is None else [segment]
        for name, packed in pack.items():
            nbytes += _nbytes(packed["rows"])
            if nbytes > machine_memory():
                raise ValueError(f"more than {nbytes:,} bytes once decompressed, which is beyond this machine's memory")
            rows, stop = _decompressed(packed["rows"]), 0
            if packed["slices"][:, 2].sum() != len(rows):
                raise ValueError(f"slices of {name} have another number of rows than there are")
            for sequence, start, count in packed["slices"].tolist():
                first, stop = stop, stop + count
                if sequence in parts:
                    parts[sequence].setdefault(name, []).append((start, rows[first:stop].copy()))
    loaded = Loaded((sequence, {name: _joined(of) for name, of in parts.pop(sequence).items()}) for sequence in ids)
    growing = set(header["growing"])
    loaded.saved = Saved(
        tuple(segments),
        frozenset(ids) - growing,
        {sequence: {name: len(array) for name, array in loaded[sequence].items()} for sequence in growing},
    )
    return loaded


def _joined(parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    parts.sort(key=lambda part: part[0])
    expected = 0
    for start, rows in parts:
        if start != expected:
            raise ValueError(f"rows from {expected} to {start} of a sequence are missing or there twice")
        expected = start + len(rows)
    return parts[0][1] if len(parts) == 1 else np.concatenate([rows for _, rows in parts])
