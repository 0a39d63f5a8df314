"""Segments: immutable files in a run's folder that hold the rows of ``Sequences``. Format: ``docs/state_files.md``.

A checkpoint lists its segments by checksum, which is their file name, and writes only rows that no earlier segment
has. A segment less than half of which is in use is written anew without the rest, and small ones are joined when there
are many. So the segments of a checkpoint hold at most twice the rows in use.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.runs import files, storage
from worldmodel.runs.sequences import PACK_BYTES, Record, Saved, Segment, Sequences, Slice, packs, row_bytes

_MOST_SMALL = 64  # segments below half a pack
_NAME = re.compile(r"[0-9a-f]{64}")


class Segments:
    """Reads and writes the segments in ``folder``, for one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._appended: list[tuple[Record, Saved]] = []

    def append(self, sequences: Sequences) -> dict[str, Any]:
        """Writes what is new; returns what stands for ``sequences`` in the checkpoint. Raises OSError."""
        saved = sequences.record.value
        kept, again = self._divide(saved.segments, np.array(sequences.ids, np.int64))
        self.folder.mkdir(exist_ok=True)
        slices = itertools.chain(_rewritten(again, sequences), sequences.new(saved))
        written = [self._write(pack) for pack in packs(slices)]
        files.sync_folder(self.folder)
        segments = (*kept, *written)
        self._appended.append((sequences.record, sequences.saved_in(segments)))
        listed = [{"checksum": segment.path.stem, "size": segment.size} for segment in segments]
        return {**sequences.header(), "segments": listed}

    def _divide(self, segments: Iterable[Segment], ids: np.ndarray) -> tuple[list[Segment], list[Segment]]:
        """Those to keep, and those whose rows are written again."""
        kept: list[Segment] = []
        again: list[Segment] = []
        for segment in segments:
            whole = segment.path.parent == self.folder and segment.is_there()
            (kept if whole and 2 * segment.nbytes(ids) >= segment.nbytes() else again).append(segment)
        small = [segment for segment in kept if 2 * segment.nbytes() < PACK_BYTES]
        if len(small) > _MOST_SMALL:
            kept, again = [segment for segment in kept if segment not in small], again + small
        return kept, again

    def _write(self, pack: dict[str, Any]) -> Segment:
        content = storage.content_of("segment", pack)
        path = self._path(content[1]["checksum"])
        storage.write(path, content)
        return _segment(path, pack)

    def _path(self, checksum: str) -> Path:
        return self.folder / f"{checksum}.safetensors"

    def commit(self) -> None:
        """To be called once the checkpoint is in its place."""
        for record, saved in self._appended:
            record.value = saved

    def read(self, listed: Mapping[str, Any]) -> tuple[Any, Segment]:
        """The pack of a segment; raises as ``storage.load``."""
        path = self._path(_checked(listed["checksum"]))
        pack, metadata = storage.load_with_metadata(path)
        if metadata["checksum"] != path.stem:
            raise storage.DamagedFile(f"{path} is damaged: it is another file than its name says")
        return pack, _segment(path, pack)

    def remove_all_but(self, checkpoints: Iterable[Path]) -> None:
        """Deletes the segments that no part of ``checkpoints`` lists; none, if a part of them cannot be read."""
        if not self.folder.is_dir():
            return
        try:
            listed = {name for folder in checkpoints for part in folder.glob("*.safetensors") for name in _listed(part)}
        except (storage.DamagedFile, storage.NewerFile, files.RunError):
            return
        for path in self.folder.iterdir():
            name = path.name.partition(".")[0]
            if _NAME.fullmatch(name) and (name not in listed or path.name != f"{name}.safetensors"):
                path.unlink()


def _segment(path: Path, pack: Mapping[str, Any]) -> Segment:
    return Segment(
        path,
        path.stat().st_size,
        {name: of["slices"] for name, of in pack.items()},
        {name: row_bytes(of["rows"]) for name, of in pack.items()},
    )


def _rewritten(segments: Iterable[Segment], sequences: Sequences) -> Iterator[Slice]:
    """The slices of ``segments`` that are in use, by sequence."""
    ids = set(sequences.ids)
    found = [
        (sequence, name, start, count)
        for segment in segments
        for name, slices in segment.slices.items()
        for sequence, start, count in slices.tolist()
        if sequence in ids
    ]
    for sequence, of in itertools.groupby(sorted(found), lambda slice_: slice_[0]):
        arrays = sequences.arrays(sequence)
        for _, name, start, count in of:
            yield sequence, name, start, arrays[name][start : start + count]


def _listed(part: Path) -> set[str]:
    """The segments of a part; raises as ``storage.load``."""
    names: set[str] = set()

    def read(listed: Mapping[str, Any]) -> tuple[Any, Segment]:
        names.add(_checked(listed["checksum"]))
        return {}, Segment(part, 0, {}, {})

    if storage.has_sequences(part):
        storage.load_versioned(part, read=read)
    return names


def _checked(name: Any) -> str:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"a segment is named {name!r}, expected a checksum")
    return name
