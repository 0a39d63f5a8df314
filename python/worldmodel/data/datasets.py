"""Recorded episodes in one file, and batches of them.

An episode file is an uncompressed ``.npz``, as ``numpy.savez`` writes it. Its arrays begin with the steps of all
episodes, one after another, as in ``Batch``: an episode of n actions has n + 1 steps.

    spec                    JSON as uint8: {"format": "worldmodel episodes 1", "observation": ..., "action": ...}, the
                            specs as ``to_json`` gives them; and whatever else is to be known, such as "env"
    observations/NAME       (steps, *shape), encoded, one array per modality
    actions                 (steps, *shape), encoded, 0 at an episode's last step
    rewards                 float32 (steps,), of the action, 0 at an episode's last step
    terminated              bool (steps,), whether the action ended the episode other than by a limit
    is_first, is_last       bool (steps,), first and last observation of an episode
    elapsed                 float32 (steps,), optional, time since the previous observation, at least 0
    displacement            float32 (steps, dims), optional, how far the action moved the agent, 0 at the last step
    heading                 int64 (steps,), optional, of the observation: quarter turns to the right, 0 to 3

Nothing in a file is executed, and it is mapped into memory, not read: it may be larger than the memory.
"""

import contextlib
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

from worldmodel.data.batch import Batch
from worldmodel.data.spaces import ActionSpec, ObservationSpec
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.files import RunError, open_file, parse_json, replacing, shown

FORMAT = "worldmodel episodes 1"
OBSERVED = "observations/"  # prefix of names
_MOST_SPEC = 2**20  # bytes
_MOST_HEADER = 4096  # characters of an array's
_MOST_ARRAYS = 4096
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of name and extra field
_TIMED = {
    "rewards": np.float32,
    "terminated": np.bool_,
    "is_first": np.bool_,
    "is_last": np.bool_,
    "elapsed": np.float32,
    "displacement": np.float32,
    "heading": np.int64,
}
_OPTIONAL = ("elapsed", "displacement", "heading")
Arrays = dict[str, np.ndarray]


class EpisodeWriter:
    """Writes an episode file step by step; memory is constant. ``close`` makes the file, or nothing does.

    Args:
        path: of the file.
        observation_spec: of the observations.
        action_spec: of the actions.
        about: what else is to be known, for JSON.

    Example:
        >>> from gymnasium import spaces
        >>> specs = ObservationSpec.from_space(spaces.Discrete(4)), ActionSpec.from_space(spaces.Discrete(2))
        >>> path = Path(tempfile.mkdtemp()) / "episodes.npz"
        >>> with EpisodeWriter(path, *specs) as writer:
        ...     writer.step({"observation": [0]}, is_first=True, actions=1, rewards=0.5)
        ...     writer.step({"observation": [3]}, is_last=True)
        >>> EpisodeFile(path).steps, np.load(path)["rewards"].tolist()
        (2, [0.5, 0.0])
    """

    def __init__(
        self,
        path: Path,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.steps = path, 0
        spec = {"observation": observation_spec.to_json(), "action": action_spec.to_json()}
        self._spec = json.dumps({"format": FORMAT, **(about or {}), **spec}).encode()
        self._zeros = _zeros(observation_spec, action_spec)
        self._folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.")
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "EpisodeWriter":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

    def step(self, observations: Mapping[str, Any], **fields: Any) -> None:
        """Adds a step with encoded ``observations`` and, of the layout's other arrays, ``fields``; 0 where not given.

        Raises:
            ValueError: an unknown name, another shape, or optional arrays that are not those of the first step.
        """
        given = {f"observations/{name}": value for name, value in observations.items()} | fields
        if not self._files:
            self._begin(given)
        if unknown := given.keys() - self._files.keys():
            raise ValueError(
                f"EpisodeWriter: {sorted(unknown)} were not given at the first step, or are none of the layout"
            )
        for name, file in self._files.items():
            zero = self._zeros[name]
            array = np.asarray(given.get(name, zero), zero.dtype)
            if array.shape != zero.shape:
                raise ValueError(f"EpisodeWriter: {name} has shape {array.shape}, expected {zero.shape}")
            file.write(array.tobytes())
        self.steps += 1

    def _begin(self, given: Mapping[str, Any]) -> None:
        if "displacement" in given:
            self._zeros["displacement"] = np.zeros(np.shape(given["displacement"]), np.float32)
        for index, name in enumerate(self._zeros):
            if name in given or name not in _OPTIONAL:
                self._files[name] = (Path(self._folder.name) / str(index)).open("w+b")

    def close(self) -> None:
        """Writes the file. Raises ValueError without a step; OSError."""
        try:
            if not self.steps:
                raise ValueError("EpisodeWriter: no step was added, expected one at least")
            with replacing(self.path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("spec.npy", "w") as member:
                    np.lib.format.write_array(member, np.frombuffer(self._spec, np.uint8))
                for name, file in self._files.items():
                    zero = self._zeros[name]
                    described = np.lib.format.dtype_to_descr(zero.dtype)
                    header = {"descr": described, "fortran_order": False, "shape": (self.steps, *zero.shape)}
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array_header_1_0(member, header)
                        file.seek(0)
                        shutil.copyfileobj(file, member)
        finally:
            self._end()

    def _end(self) -> None:
        for file in self._files.values():
            file.close()
        self._folder.cleanup()


class EpisodeFile:
    """A file of recorded episodes, mapped into memory.

    Attributes:
        arrays: of the layout, by name, (steps, ...).
        observation_spec: of ``observations/...``.
        action_spec: of ``actions``.
        about: what else the file says, as JSON.

    Raises:
        RunError: no file, or none of this layout: another format or version, compressed, damaged or incomplete.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with os.fdopen(open_file(self.path), "rb") as file:
                self.arrays = _mapped(file)
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # zipfile and numpy raise errors of many types for damaged bytes
            raise RunError(f"{self.path} is no file of episodes, or damaged: {shown(error, 300)}") from error
        with self._refusing():
            self._check()

    @property
    def steps(self) -> int:
        """Steps of all episodes."""
        return len(self.arrays["is_first"])

    @property
    def episodes(self) -> int:
        return int(self.arrays["is_first"].sum())

    @property
    def episode_starts(self) -> np.ndarray:
        """The first step of each episode, (episodes,)."""
        return np.flatnonzero(self.arrays["is_first"])

    def check_actions(self, start: int, stop: int) -> None:
        """Raises RunError if an action from ``start`` to ``stop`` is none of the spec's, with its episode and step."""
        actions = self.arrays["actions"][start:stop]
        with self._refusing():
            try:
                self.action_spec.check(actions, len(actions), "episodes")
            except ValueError:
                for step, action in enumerate(actions):
                    with self._placed(start + step):
                        self.action_spec.check(action[None], 1, "episodes")
                raise

    def rows(self, starts: np.ndarray, window: int, every: int = 1) -> Arrays:
        """Copies of ``window`` steps from each of ``starts``, all arrays as (rows, window, ...), observations checked.

        Of observations, only each ``every``-th step is read.

        Raises:
            RunError: values that the specs do not have, with their episode and step.
        """
        cut: Arrays = {}
        for name, array in self.arrays.items():
            by = every if name.startswith(OBSERVED) else 1
            cut[name] = np.stack([array[start : start + window : by] for start in starts])
        with self._refusing():
            try:
                self._check_values(cut)
            except ValueError:
                for index in (start + step for start in starts for step in range(window)):
                    with self._placed(index):
                        self._check_values(
                            {name: array[None, index : index + 1] for name, array in self.arrays.items()}
                        )
                raise
        return cut

    def place(self, step: int) -> str:
        """Where a step of the file is, as errors name it.

        Example:
            >>> file.place(44)                                                               # doctest: +SKIP
            'episode 1, step 3'
        """
        starts = np.flatnonzero(self.arrays["is_first"][: step + 1])
        if not len(starts):
            return f"step {step} of the file, before the first episode"
        return f"episode {len(starts) - 1}, step {step - starts[-1]}"

    @contextlib.contextmanager
    def _placed(self, step: int) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.place(step)}: {error}") from error

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, ConfigurationError) as error:
            raise RunError(f"{self.path}: {shown(error, 300)}") from error

    def _check(self) -> None:
        spec = self.arrays.pop("spec", np.zeros(0, np.uint8))
        if spec.nbytes > _MOST_SPEC or spec.dtype != np.uint8 or spec.ndim != 1:
            raise ValueError(
                f"spec has {spec.nbytes:,} bytes in {spec.dtype}, expected at most {_MOST_SPEC:,} in uint8"
            )
        told = parse_json(spec.tobytes() or b"{}")
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            found = shown(told.get("format")) if isinstance(told, dict) else "none"
            raise ValueError(f"its format is {found}, expected {FORMAT!r}")
        self.observation_spec = ObservationSpec.from_json(told.pop("observation", None))
        self.action_spec = ActionSpec.from_json(told.pop("action", None))
        self.about = told
        zeros = _zeros(self.observation_spec, self.action_spec)
        if missing := sorted(zeros.keys() - self.arrays.keys() - {*_OPTIONAL}):
            raise ValueError(f"it has no {', '.join(missing)}")
        steps = len(self.arrays["is_first"]) if self.arrays["is_first"].ndim else 0
        for name, array in self.arrays.items():
            if name not in zeros:
                raise ValueError(f"{shown(name)} is none of the layout's arrays")
            shape = (steps, *(array.shape[1:2] if name == "displacement" else zeros[name].shape))
            if array.shape != shape or array.dtype != zeros[name].dtype or not steps:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}, expected {zeros[name].dtype} {shape}, of a step at least"
                )
        first, last = self.arrays["is_first"], self.arrays["is_last"]
        wrong = [0] * (not first[0]) + [*np.flatnonzero(first[1:] != last[:-1])] + [steps - 1] * (not last[-1])
        if wrong:
            raise ValueError(
                f"{self.place(int(wrong[0]))}: is_first and is_last do not fit: an episode begins where another ended, "
                "and only there"
            )
        if (first & last).any():
            where = self.place(int((first & last).argmax()))
            raise ValueError(f"{where}: the episode has one step and no action, expected two steps at least")
        try:
            _check_timed(self.arrays)
        except _Misplaced as error:
            raise ValueError(f"{self.place(error.step)}: {error}") from error

    def _check_values(self, cut: Arrays) -> None:
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in cut.items()}
        seen = {name.removeprefix(OBSERVED): array for name, array in flat.items() if name.startswith(OBSERVED)}
        self.observation_spec.check(seen, len(next(iter(seen.values()))), "episodes")
        self.action_spec.check(flat["actions"], len(flat["actions"]), "episodes")
        _check_timed(cut)


class _Misplaced(ValueError):
    """A wrong value, first at ``step``, an index into the arrays flattened to steps."""

    def __init__(self, message: str, wrong: np.ndarray, shape: tuple[int, ...]) -> None:
        super().__init__(message)
        self.step = int(wrong.reshape(*shape, -1).any(-1).argmax())


def _check_timed(arrays: Arrays) -> None:
    shape = arrays["is_first"].shape
    for name in ("rewards", "elapsed", "displacement"):
        if name in arrays and not (finite := np.isfinite(arrays[name])).all():
            raise _Misplaced(f"{name} holds NaN or infinity, expected finite numbers", ~finite, shape)
    for name, most, expected in (("elapsed", np.inf, "times of at least 0"), ("heading", 3, "quarter turns, 0 to 3")):
        if name in arrays and not (fits := (arrays[name] >= 0) & (arrays[name] <= most)).all():
            span = f"{arrays[name].min()} to {arrays[name].max()}"
            raise _Misplaced(f"{name} is from {span}, expected {expected}", ~fits, shape)


def _zeros(observation_spec: ObservationSpec, action_spec: ActionSpec) -> Arrays:
    """A step of each array of the layout; ``displacement`` without its dimension."""
    zeros = {f"observations/{name}": array for name, array in observation_spec.zeros().items()}
    return zeros | {"actions": action_spec.zeros()} | {name: np.zeros((), kind) for name, kind in _TIMED.items()}


def _mapped(file: BinaryIO) -> Arrays:
    """The arrays of an open .npz, mapped read-only. Raises what a damaged file raises."""
    size = os.fstat(file.fileno()).st_size
    arrays: Arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > _MOST_ARRAYS:
            raise ValueError(f"it has {len(members):,} arrays, expected at most {_MOST_ARRAYS:,}")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays or name == member.filename:
                raise ValueError(f"{shown(member.filename)} occurs twice, or is no .npy")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise ValueError(
                    f"{shown(name)} is compressed or encrypted, expected arrays as numpy.savez writes them"
                )
            file.seek(member.header_offset)
            signature, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            if signature != b"PK\x03\x04":
                raise ValueError(f"{shown(name)} has no header")
            start = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
            file.seek(start)
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
                version
            )
            if read is None:
                raise ValueError(f"{shown(name)} is an array of version {version}, expected 1.0 or 2.0")
            shape, fortran, dtype = read(file, max_header_size=_MOST_HEADER)
            if fortran or dtype.kind not in "biuf" or dtype.hasobject:
                raise ValueError(f"{shown(name)} is {shown(dtype)} in another order than C, expected numbers in C's")
            offset, count = file.tell(), int(np.prod([int(extent) for extent in shape], dtype=object))
            if offset - start + count * dtype.itemsize != member.file_size or start + member.file_size > size:
                raise ValueError(f"{shown(name)} has another size than it says")
            arrays[name] = np.memmap(file, dtype, "r", offset, shape) if count else np.zeros(shape, dtype)
    return arrays


class Episodes(Protocol):
    """What ``RecordedSource`` reads: an ``EpisodeFile``, ``flat_episodes.FlatEpisodes``, or some of their episodes."""

    path: Path
    observation_spec: ObservationSpec
    action_spec: ActionSpec

    @property
    def steps(self) -> int: ...
    @property
    def episodes(self) -> int: ...
    @property
    def episode_starts(self) -> np.ndarray: ...
    def rows(self, starts: np.ndarray, window: int, every: int = 1) -> Arrays: ...


class RecordedSource:
    """Batches from a file of episodes: a ``data.source.Source``.

    A row is ``window`` steps in a row of the file, and may hold several episodes; what begins or ends inside an episode
    is taken for an episode of its own. An epoch takes each row once; the next one cuts the file elsewhere.

    Args:
        file: of the episodes.
        batch_size: rows.
        window: steps of a row.
        seed: of the order and the cuts.
        burn_in: leading steps without a loss of a row that begins inside an episode, less than ``window - 1``.

    Raises:
        ConfigurationError: the file has fewer steps than a row, batch_size or window is too small, or burn_in too
            large.

    Attributes:
        file: of the episodes.
    """

    def __init__(
        self, file: Episodes, batch_size: int = 16, window: int = 128, seed: int = 0, burn_in: int = 0
    ) -> None:
        if batch_size < 1 or not 2 <= window <= file.steps:
            raise ConfigurationError(
                f"RecordedSource: batch_size is {batch_size} and window {window}, expected at least 1, and from 2 to "
                f"the {file.steps:,} steps of {file.path}"
            )
        if not 0 <= burn_in < window - 1:
            raise ConfigurationError(
                f"RecordedSource: burn_in is {burn_in}, expected 0 to less than window - 1 = {window - 1}"
            )
        self.file, self.batch_size, self.window, self.burn_in = file, batch_size, window, burn_in
        self.observation_spec, self.action_spec = file.observation_spec, file.action_spec
        self.epochs = 0
        self._random = np.random.default_rng(seed)
        self._cut()

    def _cut(self) -> None:
        rows, rest = divmod(self.file.steps, self.window)
        self._starts = self._random.permutation(rows) * self.window + self._random.integers(rest + 1)
        self._taken = 0

    def __len__(self) -> int:
        return self.file.steps // self.window

    @property
    def transitions(self) -> int:
        return self.file.steps - self.file.episodes

    @property
    def nbytes(self) -> int:
        return 0

    def rows(self) -> Arrays:
        """The next batch's arrays, as ``EpisodeFile.rows`` returns them, and "loss_mask", bool (rows, window).

        It may end an epoch and begin the next.
        """
        parts: list[np.ndarray] = []
        while missing := self.batch_size - sum(len(part) for part in parts):
            if self._taken >= len(self._starts):
                self.epochs += 1
                self._cut()
            parts.append(self._starts[self._taken : self._taken + missing])
            self._taken += len(parts[-1])
        starts = np.concatenate(parts)
        rows = self.file.rows(starts, self.window)
        begun = np.logical_or.accumulate(rows["is_first"], 1)
        rows["loss_mask"] = begun | (np.arange(self.window) >= self.burn_in)
        rows["is_first"][:, 0] = rows["is_last"][:, -1] = True
        return rows

    def sample(self, version: int = 0) -> tuple[Batch, dict[str, float]]:
        """The next batch; no metrics. Raises RunError for values that the specs do not have."""
        rows = {name: torch.from_numpy(array) for name, array in self.rows().items()}
        observations = {name: rows[f"observations/{name}"] for name in self.observation_spec.modalities}
        fields = {name: rows[name] for name in ("actions", "rewards", "terminated", "is_last", "is_first", "loss_mask")}
        valid = torch.ones_like(rows["is_first"])
        return Batch(observations=observations, valid=valid, elapsed=rows.get("elapsed"), **fields), {}  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        state = self._random.bit_generator.state
        return {"starts": self._starts, "taken": self._taken, "epochs": self.epochs, "random": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Raises RunError for the state of another file or window."""
        starts = np.asarray(saved["starts"])
        if starts.shape != (len(self),) or starts.min() < 0 or starts.max() + self.window > self.file.steps:
            raise RunError(f"the checkpoint was written with other episodes than {self.file.path}, or another window")
        self._starts, self._taken, self.epochs = starts.copy(), int(saved["taken"]), int(saved["epochs"])
        self._random.bit_generator.state = saved["random"]
