"""Observation and action specs from gymnasium spaces.

An observation is a flat dict of *modalities* of four kinds. Text is dropped with a warning.

    categorical   class indices: Discrete, MultiDiscrete, MultiBinary
    vector        real numbers: Box
    image         uint8 pixels (height, width, channels)
    grid          class indices (height, width, channels): uint8 Box with a side below ``SMALLEST_IMAGE``
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.runs.optional_dependencies import missing

try:
    from gymnasium import spaces
except ImportError as error:
    raise missing(error, "describe what is seen and done") from error

Kind = Literal["categorical", "vector", "image", "grid"]
Path = tuple[str | int, ...]

SMALLEST_IMAGE = 16  # pixels, for strided convolutions
GRID_CLASSES = 16  # upper limit; MiniGrid has 11 objects
ROOT = "observation"  # name of a space without keys

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Modality:
    """One array of an observation.

    Attributes:
        kind: as listed above.
        shape: (entries,), or (height, width, channels).
        dtype: of the encoded array.
        path: keys and indices into an observation.
        sizes: classes per entry (categorical) or channel (grid).
        starts: value of class 0 per categorical entry.
        channels_first: of environment images.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    path: Path = ()
    sizes: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    channels_first: bool = False


@dataclasses.dataclass(frozen=True)
class ObservationSpec:
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

    modalities: dict[str, Modality]
    dropped: tuple[str, ...] = ()

    @classmethod
    def from_space(cls, space: spaces.Space[Any], kinds: Mapping[str, Kind] | None = None) -> "ObservationSpec":
        """``kinds``, by modality name, overrides the kinds of Boxes.

        Raises:
            ValueError: unsupported space, or text alone.
        """
        kinds = dict(kinds or {})
        modalities, dropped = {}, []
        for path, part in _parts(space, ()):
            name = "/".join(map(str, path)) or ROOT
            if _is_text(part):
                dropped.append(name)
                _log.warning("observation %r is text, which the world model does not read: it is left out", name)
                continue
            if name in modalities:
                raise ValueError(f"ObservationSpec: two parts of the space {space} are named {name!r}")
            modalities[name] = _modality(name, part, path, kinds.pop(name, None))
        if kinds:
            raise ValueError(f"ObservationSpec: kinds names {sorted(kinds)}, expected names among {sorted(modalities)}")
        if not modalities:
            raise ValueError(f"ObservationSpec: the space {space} holds nothing but text")
        return cls(modalities, tuple(dropped))

    def encode(self, observation: Any) -> dict[str, np.ndarray]:
        """Arrays (*modality.shape) by modality name.

        Raises:
            ValueError: NaN, infinity, class out of range, wrong shape.
        """
        return {
            name: _encode(name, modality, _follow(observation, modality.path), ())
            for name, modality in self.modalities.items()
        }

    def encode_batch(self, observations: Any) -> dict[str, np.ndarray]:
        """``encode`` for a vector environment's observations: (batch, *modality.shape)."""
        encoded = {}
        for name, modality in self.modalities.items():
            value = np.asarray(_follow(observations, modality.path))
            encoded[name] = _encode(name, modality, value, value.shape[:1])
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
                _check_values(name, modality, array)
            except ValueError as error:
                raise ValueError(f"{caller}: {error}") from error
            if modality.kind != "vector" and (array.astype(modality.dtype) != array).any():
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

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ObservationSpec":
        return cls(
            {name: Modality(**_with_tuples(modality)) for name, modality in fields["modalities"].items()},
            tuple(fields["dropped"]),
        )


@dataclasses.dataclass(frozen=True)
class ActionSpec:
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
    shape: tuple[int, ...]
    dtype: str
    sizes: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    env_shape: tuple[int, ...] = ()
    env_dtype: str = "int64"

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
                raise ValueError(f"ActionSpec: {space} has no finite bounds, expected low < high for every entry")
            low, high = (tuple(float(x) for x in bound.ravel()) for bound in (space.low, space.high))
            dtype = str(np.dtype(space.dtype))
            return cls("continuous", (len(low),), "float32", low=low, high=high, env_shape=space.shape, env_dtype=dtype)
        raise ValueError(f"ActionSpec: {space} is not supported, expected Discrete, MultiDiscrete, MultiBinary or Box")

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
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ActionSpec":
        return cls(**_with_tuples(fields))


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


def _modality(name: str, space: spaces.Space[Any], path: Path, kind: Kind | None) -> Modality:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        sizes, starts = _classes(space)
        return Modality("categorical", (len(sizes),), _smallest_dtype(max(sizes)), path, sizes, starts)
    if not isinstance(space, spaces.Box):
        raise ValueError(
            f"ObservationSpec: {name!r} is a {type(space).__name__} ({space}), which is not supported; expected "
            "Discrete, MultiDiscrete, MultiBinary, Box, or a Tuple or Dict of them"
        )
    pixels = space.dtype == np.uint8 and len(space.shape) in (2, 3)
    if kind is None:
        kind = "vector"
        if pixels:
            height, width, _ = _height_width_channels(space.shape)
            kind = "grid" if min(height, width) < SMALLEST_IMAGE else "image"
    if kind == "vector":
        return Modality("vector", (int(np.prod(space.shape)),), "float32", path)
    if kind in ("image", "grid") and pixels:
        shape = _height_width_channels(space.shape)
        sizes = (min(GRID_CLASSES, int(space.high.max()) + 1),) * shape[2] if kind == "grid" else ()
        first = len(space.shape) == 3 and shape != space.shape
        return Modality(kind, shape, "uint8", path, sizes, channels_first=first)
    raise ValueError(f"ObservationSpec: {name!r} is {space}, which cannot be read as {kind!r}")


def _height_width_channels(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels are first only if that axis alone has 1, 3 or 4 entries."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2]


def _classes(space: spaces.Space[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), (int(space.start),)
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel()), tuple(int(n) for n in space.start.ravel())
    entries = int(np.prod(space.shape))  # type: ignore[arg-type]
    return (2,) * entries, (0,) * entries


def _smallest_dtype(classes: int) -> str:
    return "uint8" if classes <= 2**8 else "int32" if classes <= 2**31 else "int64"


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _follow(observation: Any, path: Path) -> Any:
    for key in path:
        observation = observation[key]
    return observation


def _encode(name: str, modality: Modality, value: Any, batch: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(value)
    if modality.channels_first:
        array = np.moveaxis(array, -3, -1)
    if array.size != int(np.prod((*batch, *modality.shape))):
        raise ValueError(f"observation {name!r} has shape {array.shape}, expected {modality.shape} after {batch}")
    array = array.reshape(*batch, *modality.shape)
    if modality.kind == "vector":
        array = array.astype(modality.dtype)
    elif modality.starts:
        array = array - np.array(modality.starts)
    _check_values(name, modality, array)
    return array.astype(modality.dtype)


def _check_values(name: str, modality: Modality, array: np.ndarray) -> None:
    if modality.kind == "vector":
        if not np.isfinite(array).all():
            raise ValueError(f"observation {name!r} holds NaN or infinity, expected finite numbers")
    elif modality.sizes and ((array < 0).any() or (array >= np.array(modality.sizes)).any()):
        hint = "; kinds={...: 'image'} reads it as pixels" if modality.kind == "grid" else ""
        span = f"values from {array.min()} to {array.max()}"
        raise ValueError(f"observation {name!r} has {span}, expected classes below {modality.sizes}{hint}")
