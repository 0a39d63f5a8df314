"""Action specs from gymnasium spaces, and masks of legal actions."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.data.kinds import Extents, Path, Whole, is_number_type, one_line
from worldmodel.runs.configuration import from_json, to_json
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Text
from worldmodel.runs.files import shown
from worldmodel.runs.optional_dependencies import missing

try:
    from gymnasium import spaces
except ImportError as error:
    raise missing(error, "describe what is seen and done") from error

MASK = "action_mask"  # in an environment's info or observation, in encoded observations and in a state

Numbers = tuple[Annotated[float, Bounds(-sys.float_info.max, sys.float_info.max)], ...]

_KINDS = ("discrete", "continuous")
_ACTIONS = 2  # stream of random numbers


def action_generator(seed: int) -> np.random.Generator:
    """For random actions in an episode of ``seed``, whose environment draws by another stream of the same seed.

    Example:
        >>> action_generator(3).random() == np.random.default_rng(3).random()
        False
    """
    return np.random.default_rng(np.random.SeedSequence((seed, _ACTIONS)))


@dataclasses.dataclass(frozen=True)
class ActionPart(Checked):
    """A Discrete, MultiDiscrete, MultiBinary or Box in a Tuple or Dict.

    Attributes:
        path: keys of Dicts and indices of Tuples.
        kind: "discrete" or "continuous".
        entries: class indices, or numbers.
        env_shape: of the environment's array.
        env_dtype: of the environment's array.
    """

    path: Annotated[tuple[Text | int, ...], Bounds(1, 64)]
    kind: Literal["discrete", "continuous"]
    entries: Annotated[int, Bounds(1, 2**31)]
    env_shape: Extents
    env_dtype: Text

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.prod(self.env_shape) != self.entries or not is_number_type(self.env_dtype):
            raise ConfigurationError(
                f"ActionPart: {self.entries} entries of shape {self.env_shape}, {shown(self.env_dtype)}, do not fit"
            )


@dataclasses.dataclass(frozen=True)
class ActionSpec(Checked):
    """Actions: class indices for Discrete, MultiDiscrete and MultiBinary, numbers in [-1, 1] for a Box.

    A Tuple or Dict of these has the entries of all its parts, class indices before numbers.

    Attributes:
        kind: "mixed" has class indices and numbers.
        shape: () for Discrete, else (entries,).
        sizes: classes per entry.
        starts: environment value of class 0 per entry.
        low: environment value of -1 per entry.
        high: environment value of 1 per entry.
        env_shape: shape of the environment's actions, as ``env_dtype`` their dtype; not of a Tuple or Dict.
        parts: of a Tuple or Dict, else none.

    Example:
        >>> from gymnasium import spaces
        >>> spec = ActionSpec.from_space(spaces.Box(-2, 2, (1,)))
        >>> spec.to_env(np.array([0.5], np.float32))
        array([1.], dtype=float32)
        >>> spec = ActionSpec.from_space(spaces.Dict(keys=spaces.MultiBinary(2), push=spaces.Box(-2, 2, (1,))))
        >>> spec.rows_to_env(np.array([[1, 0, 0.5]], np.float32))
        [{'keys': array([1, 0], dtype=int8), 'push': array([1.], dtype=float32)}]
    """

    kind: Literal["discrete", "continuous", "mixed"]
    shape: Annotated[Extents, Bounds(0, 1)]
    dtype: Literal["int64", "float32"]
    sizes: tuple[Annotated[int, Bounds(1, 2**31)], ...] = ()
    starts: tuple[Whole, ...] = ()
    low: Numbers = ()
    high: Numbers = ()
    env_shape: Extents = ()
    env_dtype: Text = "int64"
    parts: Annotated[tuple[ActionPart, ...], Bounds(0, 4096)] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        classes, numbers = len(self.sizes), len(self.low)
        entries = classes + numbers
        kind = "mixed" if classes and numbers else "continuous" if numbers else "discrete"
        fits = kind == self.kind and len(self.starts) == classes and len(self.high) == numbers
        fits = fits and self.dtype == ("float32" if numbers else "int64")
        fits = fits and (self.shape == (entries,) or (self.shape == () and (classes, entries) == (1, 1)))
        if self.parts:
            of_kind = [sum(part.entries for part in self.parts if part.kind == kind) for kind in _KINDS]
            fits = fits and of_kind == [classes, numbers] and _can_be_nested([part.path for part in self.parts])
        else:
            fits = fits and kind != "mixed" and math.prod(self.env_shape) == entries and is_number_type(self.env_dtype)
        if not fits:
            raise ConfigurationError(
                f"ActionSpec: {self.kind} actions of shape {self.shape}, {self.dtype}, from {self.env_shape}, "
                f"{shown(self.env_dtype)}, and {len(self.parts)} parts do not fit {entries} entries with bounds"
            )

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> "ActionSpec":
        """Raises ValueError for an unsupported space or an unbounded Box."""
        if not isinstance(space, spaces.Dict | spaces.Tuple):
            return cls._of_leaf(space)
        leaves = [(path, cls._of_leaf(leaf)) for path, leaf in _leaves(space, ())]
        leaves.sort(key=lambda leaf: leaf[1].kind != "discrete")
        joined: dict[str, Any] = {
            name: tuple(value for _, leaf in leaves for value in getattr(leaf, name))
            for name in ("sizes", "starts", "low", "high")
        }
        kinds = {leaf.kind for _, leaf in leaves}
        kind = "mixed" if len(kinds) == 2 else leaves[0][1].kind
        parts = tuple(
            ActionPart(path, leaf.kind, len(leaf.sizes or leaf.low), leaf.env_shape, leaf.env_dtype)  # type: ignore[arg-type]
            for path, leaf in leaves
        )
        entries = sum(part.entries for part in parts)
        return cls(kind, (entries,), "int64" if kind == "discrete" else "float32", **joined, parts=parts)

    @classmethod
    def _of_leaf(cls, space: spaces.Space[Any]) -> "ActionSpec":
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
            f"ActionSpec: {one_line(space)} is not supported, expected Discrete, MultiDiscrete, MultiBinary, Box, or a "
            "Tuple or Dict of them; a gymnasium.ActionWrapper with one of these as its action_space can turn its "
            "actions into the environment's"
        )

    @property
    def classes(self) -> int:
        """Classes of all entries together: entries of a mask."""
        return sum(self.sizes)

    @property
    def width(self) -> int:
        """Entries of an encoded action."""
        return self.classes + len(self.low)

    def encode(self, actions: Tensor) -> Tensor:
        """(..., *shape) -> (..., width); classes one-hot, in the default dtype."""
        if self.kind == "continuous":
            return actions
        entries = actions[..., None] if self.shape == () else actions
        chosen = entries[..., : len(self.sizes)].long().unbind(-1)
        dtype = torch.get_default_dtype()
        hot = torch.cat([F.one_hot(entry, n) for entry, n in zip(chosen, self.sizes, strict=True)], -1).to(dtype)
        return torch.cat([hot, entries[..., len(self.sizes) :].to(dtype)], -1) if self.low else hot

    def decode(self, encoded: Tensor) -> Tensor:
        """(..., width) -> (..., *shape) in ``dtype``."""
        if self.kind == "continuous":
            return encoded.float()
        hot = encoded[..., : self.classes].split(self.sizes, -1)
        entries = torch.stack([part.argmax(-1) for part in hot], -1)
        if self.low:
            return torch.cat([entries.float(), encoded[..., self.classes :].float()], -1)
        return entries if self.shape else entries.squeeze(-1)

    def to_env(self, actions: np.ndarray) -> Any:
        """(..., *shape) -> the environment's form, a Box's clipped to its bounds; a Tuple or Dict of such arrays."""
        batch = actions.shape[: actions.ndim - len(self.shape)]
        if not self.parts:
            values = self._classes_to_env(actions) if self.kind == "discrete" else self._numbers_to_env(actions)
            return _as(values, (*batch, *self.env_shape), self.env_dtype)
        first = len(self.sizes)
        classes = self._classes_to_env(actions[..., :first].astype(np.int64)) if first else actions[..., :0]
        values = np.concatenate([classes, self._numbers_to_env(actions[..., first:])], -1) if self.low else classes
        ends = np.cumsum([part.entries for part in self.parts])
        arrays = [
            _as(values[..., end - part.entries : end], (*batch, *part.env_shape), part.env_dtype)
            for part, end in zip(self.parts, ends, strict=True)
        ]
        return _nested([(part.path, array) for part, array in zip(self.parts, arrays, strict=True)])

    def rows_to_env(self, actions: np.ndarray) -> list[Any]:
        """(batch, *shape) -> the environment's form of each."""
        values = self.to_env(actions)
        return [_row(values, index) for index in range(len(actions))] if self.parts else list(values)

    def from_env(self, action: Any) -> np.ndarray:
        """An action in the environment's form, encoded: (*shape).

        Raises:
            ValueError: another shape, values outside the space, or actions of a Tuple or Dict.
        """
        if self.parts:
            raise ValueError("ActionSpec.from_env: actions are a Tuple or Dict, expected a Box or a discrete space")
        array = np.asarray(action)
        if array.shape != self.env_shape:
            raise ValueError(f"ActionSpec.from_env: an action has shape {array.shape}, expected {self.env_shape}")
        if self.kind == "discrete":
            encoded = np.reshape(array, self.shape) - np.reshape(self.starts, self.shape)
        else:
            low, high = np.array(self.low), np.array(self.high)
            encoded = 2 * (array.reshape(self.shape) - low) / (high - low) - 1
            slack = np.abs(encoded) <= 1 + 1e-6  # of rounding
            encoded = np.where(slack, encoded.clip(-1, 1), encoded)
        return self.check(encoded[None], 1, "ActionSpec.from_env")[0]

    def _classes_to_env(self, entries: np.ndarray) -> np.ndarray:
        return np.asarray(entries + np.reshape(self.starts, self.shape if not self.parts else (-1,)))

    def _numbers_to_env(self, entries: np.ndarray) -> np.ndarray:
        low, high = np.array(self.low), np.array(self.high)
        return np.asarray(low + (np.clip(entries, -1, 1) + 1) / 2 * (high - low))

    def sample(self, random: np.random.Generator, *batch: int, mask: np.ndarray | None = None) -> np.ndarray:
        """Uniformly random actions, (*batch, *shape); of those in ``mask``, bool (*batch, classes), if it is given."""
        numbers = (*batch, len(self.low))
        if self.kind == "continuous":
            return random.uniform(-1, 1, numbers).astype(self.dtype)
        if mask is None:
            size = (*batch, len(self.sizes)) if self.low else (*batch, *self.shape)
            classes = random.integers(0, np.reshape(self.sizes, size[len(batch) :]), size, dtype=np.int64)
        else:
            order = np.where(mask, random.random((*batch, self.classes)), -1.0)
            parts = np.split(order, np.cumsum(self.sizes)[:-1], -1)
            classes = np.stack([part.argmax(-1) for part in parts], -1).reshape(*batch, *self._shape_of_classes)
        if not self.low:
            return classes
        return np.concatenate([classes, random.uniform(-1, 1, numbers)], -1).astype(self.dtype)

    @property
    def _shape_of_classes(self) -> tuple[int, ...]:
        return (len(self.sizes),) if self.shape else ()

    def encode_mask(self, given: Any) -> np.ndarray:
        """Legal classes, bool (classes,), from a mask as for ``sample`` of the space, or flat; None: all are legal.

        Raises:
            ValueError: another shape or type, or other values than 0 and 1.

        Example:
            >>> from gymnasium import spaces
            >>> spec = ActionSpec.from_space(spaces.MultiDiscrete([2, 3]))
            >>> spec.encode_mask((np.array([1, 0], np.int8), np.array([0, 1, 1], np.int8)))
            array([ True, False, False,  True,  True])
        """
        if not self.sizes:
            raise ValueError(f"{MASK} is given, and the actions have no classes that it could be for")
        if given is None:
            return np.ones(self.classes, bool)
        if not self.parts or not isinstance(given, dict | tuple | list):
            return _mask(given, self.sizes, self.env_dtype)
        masks, start = [], 0
        for part in self.parts:
            if part.kind == "continuous":
                break
            sizes = self.sizes[start : start + part.entries]
            start += part.entries
            value: Any = given
            for key in part.path:
                try:
                    value = value[key]
                except (KeyError, IndexError, TypeError) as error:
                    name = "/".join(map(str, part.path))
                    raise ValueError(f"{MASK} has no part {name!r}, expected one as the action's") from error
            masks.append(np.ones(sum(sizes), bool) if value is None else _mask(value, sizes, part.env_dtype))
        return np.concatenate(masks)

    def has_legal(self, mask: np.ndarray) -> np.ndarray:
        """Whether every entry has a legal class, (..., classes) -> bool (...)."""
        entries = np.split(mask != 0, np.cumsum(self.sizes)[:-1], -1)
        return np.all([entry.any(-1) for entry in entries], 0)

    def check(self, actions: np.ndarray, count: int, caller: str) -> np.ndarray:
        """Validates and casts (count, *shape); ``caller`` prefixes errors.

        Raises:
            ValueError: wrong shape, class out of range, numbers outside [-1, 1], NaN.
        """
        array = np.asarray(actions)
        if array.shape != (count, *self.shape):
            raise ValueError(f"{caller}: actions has shape {array.shape}, expected {(count, *self.shape)}")
        span = f"values from {array.min()} to {array.max()}"
        if self.sizes:
            classes = array[:, : len(self.sizes)] if self.shape else array
            sizes = np.reshape(self.sizes, self._shape_of_classes)
            whole = np.issubdtype(array.dtype, np.integer) or (self.low and (classes == np.rint(classes)).all())
            if not whole or (classes < 0).any() or (classes >= sizes).any():
                raise ValueError(
                    f"{caller}: actions has dtype {array.dtype} and {span}, expected integers from 0 and below "
                    f"{self.sizes}"
                )
        if self.low and not (np.abs(array[:, len(self.sizes) :]) <= 1).all():
            raise ValueError(f"{caller}: actions has {span}, expected numbers in [-1, 1]")
        return array.astype(self.dtype)

    def zeros(self, *batch: int) -> np.ndarray:
        return np.zeros((*batch, *self.shape), self.dtype)

    def to_json(self) -> dict[str, Any]:
        return to_json(self)

    @classmethod
    def from_json(cls, fields: Any) -> "ActionSpec":
        """Raises ConfigurationError for fields of other types, or out of bounds."""
        return from_json(cls, fields, "spaces.action")


def _leaves(space: spaces.Space[Any], path: Path) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield path, space
        return
    inner: list[tuple[Any, spaces.Space[Any]]] = list(
        space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
    )
    if not inner or (isinstance(space, spaces.Dict) and not all(isinstance(key, str) for key, _ in inner)):
        raise ValueError(
            f"ActionSpec: {one_line(space)} is not supported, expected parts, in a Dict with text as keys; a "
            "gymnasium.ActionWrapper with such an action_space can turn its actions into the environment's"
        )
    for key, part in inner:
        yield from _leaves(part, (*path, key))


def _nested(leaves: list[tuple[Path, Any]]) -> Any:
    """Tuples and dicts with the leaves at their paths."""
    if leaves[0][0] == ():
        return leaves[0][1]
    inner: dict[str | int, list[tuple[Path, Any]]] = {}
    for path, value in leaves:
        inner.setdefault(path[0], []).append((path[1:], value))
    built = {key: _nested(below) for key, below in inner.items()}
    return tuple(built[key] for key in sorted(built)) if isinstance(leaves[0][0][0], int) else built


def _can_be_nested(paths: list[tuple[str | int, ...]]) -> bool:
    """Whether the paths are those of the leaves of nested tuples and dicts."""
    if len(paths) == 1 and not paths[0]:
        return True
    if not all(paths) or len({type(path[0]) for path in paths}) != 1:
        return False
    inner: dict[str | int, list[tuple[str | int, ...]]] = {}
    for path in paths:
        inner.setdefault(path[0], []).append(path[1:])
    complete = isinstance(paths[0][0], str) or set(inner) == set(range(len(inner)))
    return complete and all(_can_be_nested(below) for below in inner.values())


def _row(values: Any, index: int) -> Any:
    if isinstance(values, dict):
        return {key: _row(value, index) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_row(value, index) for value in values)
    return values[index, ...] if values.dtype.kind == "f" else values[index]  # an array for a Box, an int for Discrete


def _as(values: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    whole = np.issubdtype(np.dtype(dtype), np.integer)
    return (np.rint(values) if whole and values.dtype.kind == "f" else values).reshape(shape).astype(dtype)


def _mask(given: Any, sizes: tuple[int, ...], env_dtype: str) -> np.ndarray:
    array = _joined(given)
    binary = env_dtype == "int8" and set(sizes) == {2} and array.size == len(sizes)  # of MultiBinary: 2 is either
    most = 2 if binary else 1
    if array.size != (len(sizes) if binary else sum(sizes)) or array.dtype.kind not in "biu":
        shape = np.shape(given) if isinstance(given, np.ndarray) else (array.size,)
        raise ValueError(
            f"{MASK} has shape {shape} and dtype {array.dtype}, expected ({sum(sizes)},) and bool or int8: 1 for legal "
            "actions, 0 for others"
        )
    if (array < 0).any() or (array > most).any():
        raise ValueError(f"{MASK} has values from {array.min()} to {array.max()}, expected 0 to {most}")
    return np.stack([array != 1, array != 0], -1).ravel() if binary else array != 0


def _joined(given: Any) -> np.ndarray:
    if isinstance(given, tuple | list) and given:
        return np.concatenate([_joined(part) for part in given])
    return np.asarray(given).ravel()


def _classes(space: spaces.MultiDiscrete | spaces.MultiBinary) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.ravel()), tuple(int(n) for n in space.start.ravel())
    entries = int(np.prod(space.shape))
    return (2,) * entries, (0,) * entries
