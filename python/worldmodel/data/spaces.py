"""Observation and action specs from gymnasium spaces.

An observation is a flat dict of *modalities*, of the kinds in ``kinds.py``. Text is dropped.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.data.kinds import (
    Extents,
    Kind,
    Modality,
    Path,
    Whole,
    check_values,
    encode_part,
    is_number_type,
    modality_of,
    one_line,
)
from worldmodel.runs.configuration import differences, from_json, to_json
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Text
from worldmodel.runs.files import shown
from worldmodel.runs.optional_dependencies import missing

try:
    from gymnasium import spaces
except ImportError as error:
    raise missing(error, "describe what is seen and done") from error

__all__ = ["ROOT", "ActionSpec", "Kind", "Modality", "ObservationSpec"]

ROOT = "observation"  # name of a space without keys
_PART_NAME = re.compile(r"[^/].{0,255}")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ObservationSpec(Checked):
    """The modalities of an observation.

    Attributes:
        modalities: by name; a slash joins nested keys.
        dropped: names of text.

    Example:
        >>> from gymnasium import spaces
        >>> spec = ObservationSpec.from_space(spaces.Dict(card=spaces.Discrete(4), place=spaces.Box(-1, 1, (2,))))
        >>> {name: (modality.kind, modality.shape) for name, modality in spec.modalities.items()}
        {'card': ('categorical', (1,)), 'place': ('vector', (2,))}
        >>> spec.encode({"card": 3, "place": [0.0, 0.5]})["card"]
        array([3], dtype=uint8)
    """

    modalities: Annotated[dict[str, Modality], Bounds(1, 4096)]
    dropped: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.modalities:
            if not _PART_NAME.fullmatch(name) or not name.isprintable() or ".." in name.split("/"):
                raise ConfigurationError(
                    f"ObservationSpec: a part is named {shown(name)!r}, expected 1 to 256 printable characters and "
                    "no path to somewhere else (../, /); a gymnasium.ObservationWrapper can rename it"
                )

    @classmethod
    def from_space(
        cls,
        space: spaces.Space[Any],
        kinds: "Mapping[str, str] | ObservationSpec | None" = None,
        example: Callable[[], Any] | None = None,
    ) -> "ObservationSpec":
        """The spec of a space; ``kinds.py`` has the rules.

        Args:
            space: of the environment's observations.
            kinds: by modality name, ``KIND`` or ``KIND:LAYOUT``; or a spec whose parts are to be read as they were.
            example: returns first observations, one or a batch; called where the space alone does not tell.

        Raises:
            ConfigurationError: an unsupported space, text alone, or kinds that do not fit.
        """
        saved = kinds.modalities if isinstance(kinds, ObservationSpec) else {}
        asked = {} if isinstance(kinds, ObservationSpec) else dict(kinds or {})
        first: list[Any] = []

        def values(path: Path) -> Any:
            if not first and example is not None:
                first.append(example())
            try:
                return _follow(first[0], path)
            except (KeyError, IndexError, TypeError) as error:
                name = "/".join(map(str, path)) or ROOT
                raise ConfigurationError(f"ObservationSpec: the first observation has no part {name!r}") from error

        modalities, dropped = {}, []
        for path, part in _parts(space, ()):
            name = "/".join(map(str, path)) or ROOT
            if _is_text(part):
                dropped.append(name)
                _log.info("observation %r is text, which the world model does not read: it is left out", name)
                continue
            if name in modalities:
                raise ConfigurationError(
                    f"ObservationSpec: two parts of the space {one_line(space)} are named {name!r}"
                )
            wanted = asked.pop(name, None) or saved.get(name)
            look = functools.partial(values, path) if example is not None else None
            modalities[name] = modality_of(name, part, path, wanted, look)
        if asked:
            raise ConfigurationError(
                f"ObservationSpec: kinds names {sorted(asked)}, expected names among {sorted(modalities)}"
            )
        if not modalities:
            raise ConfigurationError(f"ObservationSpec: the space {one_line(space)} holds nothing but text")
        return cls(modalities, tuple(dropped))

    def encode(self, observation: Any) -> dict[str, np.ndarray]:
        """Arrays (*modality.shape) by modality name.

        Raises:
            ValueError: another shape, type or range than the space's, NaN, infinity, a missing part.
        """
        return {
            name: encode_part(name, modality, _part(name, modality, observation), ())
            for name, modality in self.modalities.items()
        }

    def encode_batch(self, observations: Any) -> dict[str, np.ndarray]:
        """``encode`` for a vector environment's observations: (batch, *modality.shape)."""
        encoded = {}
        for name, modality in self.modalities.items():
            value = np.asarray(_part(name, modality, observations))
            encoded[name] = encode_part(name, modality, value, value.shape[:1])
        return encoded

    def check(self, encoded: Mapping[str, np.ndarray], steps: int, caller: str) -> dict[str, np.ndarray]:
        """Validates and casts (steps, *modality.shape); ``caller`` prefixes errors.

        Raises:
            ValueError: as for ``encode``, or wrong keys.
        """
        if encoded.keys() != self.modalities.keys():
            raise ValueError(f"{caller}: observations has keys {sorted(encoded)}, expected {sorted(self.modalities)}")
        checked = {}
        for name, modality in self.modalities.items():
            array = np.asarray(encoded[name])
            if array.shape != (steps, *modality.shape):
                raise ValueError(
                    f"{caller}: observations[{name!r}] has shape {array.shape}, expected {(steps, *modality.shape)}"
                )
            try:
                check_values(name, modality, array)
            except ValueError as error:
                raise ValueError(f"{caller}: {error}") from error
            if modality.dtype not in ("float32", array.dtype) and (array.astype(modality.dtype) != array).any():
                raise ValueError(f"{caller}: observations[{name!r}] has values that {modality.dtype} does not hold")
            checked[name] = array.astype(modality.dtype)
        return checked

    def zeros(self, *batch: int) -> dict[str, np.ndarray]:
        return {name: np.zeros((*batch, *modality.shape), modality.dtype) for name, modality in self.modalities.items()}

    def to_tensors(
        self, encoded: Mapping[str, np.ndarray], device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """As tensors, which share the arrays' memory on the CPU."""
        return {name: torch.as_tensor(encoded[name], device=device) for name in self.modalities}

    def description(self, changeable: bool = True) -> list[str]:
        """A line per modality: how it is read, and if ``changeable`` how to change that."""
        lines = []
        for name, modality in self.modalities.items():
            change = (
                f"; --kinds {name}=KIND reads it otherwise" if changeable and len(modality.env_shape or ()) > 1 else ""
            )
            lines.append(f"{name}: {modality.description}{change}")
        return lines + [f"{name}: text, which is left out" for name in self.dropped]

    def differences(self, now: "ObservationSpec") -> list[str]:
        """A line per difference of ``now`` from this saved spec; what an earlier release did not save is none."""
        saved, here = self.to_json(), now.to_json()
        for name, modality in saved["modalities"].items():
            if modality["env_shape"] is None and name in here["modalities"]:
                modality |= {field: here["modalities"][name][field] for field in ("env_shape", "env_dtype", "layout")}
        return differences(saved, here)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, fields: Any) -> "ObservationSpec":
        """Raises ConfigurationError for fields of other types, or out of bounds."""
        return from_json(cls, fields, "spaces.observation")


@dataclasses.dataclass(frozen=True)
class ActionSpec(Checked):
    """Actions: class indices for Discrete, MultiDiscrete and MultiBinary, numbers in [-1, 1] for a Box.

    Attributes:
        shape: () for Discrete, else (entries,).
        sizes: classes per entry.
        starts: environment value of class 0 per entry.
        low: environment value of -1 per entry.
        high: environment value of 1 per entry.
        env_shape: shape of the environment's actions, as ``env_dtype`` their dtype.

    Example:
        >>> from gymnasium import spaces
        >>> spec = ActionSpec.from_space(spaces.Box(-2, 2, (1,)))
        >>> spec.to_env(np.array([0.5], np.float32))
        array([1.], dtype=float32)
    """

    kind: Literal["discrete", "continuous"]
    shape: Annotated[Extents, Bounds(0, 1)]
    dtype: Literal["int64", "float32"]
    sizes: tuple[Annotated[int, Bounds(1, 2**31)], ...] = ()
    starts: tuple[Whole, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    env_shape: Extents = ()
    env_dtype: Text = "int64"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "discrete":
            entries, others, dtype = len(self.sizes), (len(self.starts),), "int64"
        else:
            entries, others, dtype = len(self.low), (len(self.high),), "float32"
        shapes = [(entries,), ()] if self.kind == "discrete" and entries == 1 else [(entries,)]
        fits = math.prod(self.env_shape) == entries == others[0] and self.shape in shapes and self.dtype == dtype
        if not (fits and is_number_type(self.env_dtype)):
            raise ConfigurationError(
                f"ActionSpec: {self.kind} actions of shape {self.shape}, {self.dtype}, from {self.env_shape}, "
                f"{shown(self.env_dtype)}, do not fit {entries} entries with bounds"
            )

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> "ActionSpec":
        """Raises ValueError for an unsupported space or an unbounded Box."""
        if isinstance(space, spaces.Discrete):
            return cls("discrete", (), "int64", (int(space.n),), (int(space.start),))
        if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
            sizes, starts = _classes(space)
            dtype = str(np.dtype(space.dtype))
            return cls("discrete", (len(sizes),), "int64", sizes, starts, env_shape=space.shape, env_dtype=dtype)
        if isinstance(space, spaces.Box):
            if not (np.isfinite(space.low).all() and np.isfinite(space.high).all() and (space.low < space.high).all()):
                raise ValueError(
                    f"ActionSpec: {one_line(space)} has no finite bounds, expected low < high for every entry; a "
                    "gymnasium.ActionWrapper with a bounded action_space gives it some"
                )
            low, high = (tuple(float(x) for x in bound.ravel()) for bound in (space.low, space.high))
            dtype = str(np.dtype(space.dtype))
            return cls("continuous", (len(low),), "float32", low=low, high=high, env_shape=space.shape, env_dtype=dtype)
        raise ValueError(
            f"ActionSpec: {one_line(space)} is not supported, expected Discrete, MultiDiscrete, MultiBinary or Box; a "
            "gymnasium.ActionWrapper with one of these as its action_space can turn its actions into the environment's"
        )

    @property
    def width(self) -> int:
        """Entries of an encoded action."""
        return sum(self.sizes) if self.kind == "discrete" else self.shape[0]

    def encode(self, actions: Tensor) -> Tensor:
        """(..., *shape) -> (..., width); one-hot if discrete, in the default dtype."""
        if self.kind == "continuous":
            return actions
        entries = actions[..., None] if self.shape == () else actions
        return torch.cat([F.one_hot(entry, n) for entry, n in zip(entries.unbind(-1), self.sizes, strict=True)], -1).to(
            torch.get_default_dtype()
        )

    def decode(self, encoded: Tensor) -> Tensor:
        """(..., width) -> (..., *shape) in ``dtype``."""
        if self.kind == "continuous":
            return encoded.float()
        entries = torch.stack([part.argmax(-1) for part in encoded.split(self.sizes, -1)], -1)
        return entries if self.shape else entries.squeeze(-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """(..., *shape) -> the environment's form, a Box's clipped to its bounds."""
        batch = actions.shape[: actions.ndim - len(self.shape)]
        if self.kind == "discrete":
            values = actions + np.reshape(self.starts, self.shape)
        else:
            low, high = np.array(self.low), np.array(self.high)
            values = low + (np.clip(actions, -1, 1) + 1) / 2 * (high - low)
            if np.issubdtype(np.dtype(self.env_dtype), np.integer):
                values = np.rint(values)
        return np.asarray(values).reshape(*batch, *self.env_shape).astype(self.env_dtype)

    def sample(self, random: np.random.Generator, *batch: int) -> np.ndarray:
        """Uniformly random actions, (*batch, *shape)."""
        size = (*batch, *self.shape)
        if self.kind == "continuous":
            return random.uniform(-1, 1, size).astype(self.dtype)
        return random.integers(0, np.reshape(self.sizes, self.shape), size, dtype=self.dtype)

    def check(self, actions: np.ndarray, count: int, caller: str) -> np.ndarray:
        """Validates and casts (count, *shape); ``caller`` prefixes errors.

        Raises:
            ValueError: wrong shape, class out of range, numbers outside [-1, 1], NaN.
        """
        array = np.asarray(actions)
        if array.shape != (count, *self.shape):
            raise ValueError(f"{caller}: actions has shape {array.shape}, expected {(count, *self.shape)}")
        span = f"values from {array.min()} to {array.max()}"
        if self.kind == "discrete":
            sizes = np.reshape(self.sizes, self.shape)
            if not np.issubdtype(array.dtype, np.integer) or (array < 0).any() or (array >= sizes).any():
                raise ValueError(
                    f"{caller}: actions has dtype {array.dtype} and {span}, expected integers from 0 and below "
                    f"{self.sizes}"
                )
        elif not (np.abs(array) <= 1).all():
            raise ValueError(f"{caller}: actions has {span}, expected numbers in [-1, 1]")
        return array.astype(self.dtype)

    def zeros(self, *batch: int) -> np.ndarray:
        return np.zeros((*batch, *self.shape), self.dtype)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, fields: Any) -> "ActionSpec":
        """Raises ConfigurationError for fields of other types, out of bounds, or that do not fit each other."""
        return from_json(cls, fields, "spaces.action")


def _parts(space: spaces.Space[Any], path: Path) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _parts(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _parts(part, (*path, index))
    else:
        yield path, space


def _is_text(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Text) or (space.dtype is not None and np.dtype(space.dtype).kind == "U")


def _classes(space: spaces.MultiDiscrete | spaces.MultiBinary) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel()), tuple(int(n) for n in space.start.ravel())
    entries = int(np.prod(space.shape))
    return (2,) * entries, (0,) * entries


def _follow(observation: Any, path: Path) -> Any:
    for key in path:
        observation = observation[key]
    return observation


def _part(name: str, modality: Modality, observation: Any) -> Any:
    try:
        return _follow(observation, modality.path)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"observation has no part {name!r} ({type(error).__name__}: {error}), expected {modality.expected} there"
        ) from error
