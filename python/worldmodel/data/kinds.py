"""How a part of an observation is read: its kind, layout and range.

A part's kind follows from its space, by these rules in order, unless ``kinds`` names one (``KIND`` or ``KIND:LAYOUT``):

1. Discrete, MultiDiscrete, MultiBinary: ``categorical``; with two or three dimensions of equal sizes, as a board.
2. A Box of other than 2 to 4 dimensions: ``vector``.
3. Whole numbers of at most ``MOST_CLASSES`` values: ``grid`` from 2 to ``LARGEST_BOARD`` cells per side, larger ones
   ``image``.
4. Other uint8, or whole numbers from 0 to 255: ``image`` where both sides have at least ``SMALLEST_IMAGE``. Smaller
   ones are an ``image`` if the first observation has a value of ``GRID_CLASSES`` or more, else a ``grid`` of that many
   classes, as MiniGrid's.
5. Floating point in 0..1, -1..1 or 0..255: ``image``, of two dimensions only with ``SMALLEST_IMAGE`` per side. Smaller
   ones whose first observation is whole numbers, not all equal, are a ``grid`` (one-hot planes, boards).
6. Other numbers: ``map`` with three or four dimensions and sides of at least ``SMALLEST_MAP``, else ``vector``.

Layouts: H height, W width, C channels, F stacked frames, which become channels. Of three dimensions, the two equal
ones are height and width; if none or all are, channels are the smaller of the first and the last, the last if equal.
Of four, the first are frames.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import numpy as np

from worldmodel.data.resizing import resized
from worldmodel.runs.fields import Bounds, Checked, ConfigurationError, Text
from worldmodel.runs.files import shown
from worldmodel.runs.optional_dependencies import missing

try:
    from gymnasium import spaces
except ImportError as error:
    raise missing(error, "describe what is seen and done") from error

Kind = Literal["categorical", "vector", "image", "grid", "map"]
Layout = Literal["", "HW", "HWC", "CHW", "FHWC", "FCHW"]
Path = tuple[str | int, ...]
Extents = Annotated[tuple[Annotated[int, Bounds(0, 2**31)], ...], Bounds(0, 64)]
Whole = Annotated[int, Bounds(-(2**63), 2**63)]

SMALLEST_IMAGE = 16  # pixels per side
SMALLEST_MAP = 4
LARGEST_BOARD = 32  # cells per side; a grid's codec is dense
MOST_CLASSES = 64  # declared by the space
GRID_CLASSES = 16  # where the space declares 256; MiniGrid has 11 objects
MOST_GRID_CLASSES = 4096  # where kinds asks for a grid
_PIXELS = ((0, 1), (-1, 1), (0, 255))
_WORDS = {
    "HW": "",
    "HWC": ", channels last",
    "CHW": ", channels first",
    "FHWC": ", stacked frames first, channels last",
    "FCHW": ", stacked frames first, then channels",
}

Example = Callable[[], Any]  # first observations of the part, of any batch shape


@dataclasses.dataclass(frozen=True)
class Modality(Checked):
    """One array of an observation.

    Attributes:
        kind: categorical: class indices. vector: real numbers. image: pixels. grid: class indices on a grid. map: real
            numbers on a grid.
        shape: of the encoded array: (entries,), or (height, width, channels), after resizing.
        dtype: of the encoded array.
        path: keys and indices into an observation.
        sizes: classes per entry (categorical) or channel (grid).
        starts: value of class 0 per categorical entry or grid channel.
        layout: of the environment's array; empty for categorical and vector.
        env_shape: of the environment's array; None for runs of an earlier release.
        env_dtype: of the environment's array; empty for runs of an earlier release.
        low: the environment's value of pixel 0.
        high: the environment's value of pixel 255.
    """

    kind: Kind
    shape: Extents
    dtype: Literal["uint8", "int32", "int64", "float32"]
    path: tuple[Text | int, ...] = ()
    sizes: tuple[Annotated[int, Bounds(1, 2**63)], ...] = ()
    starts: tuple[Whole, ...] = ()
    layout: Layout = ""
    env_shape: Extents | None = None
    env_dtype: Text = ""
    low: Annotated[float, Bounds(-1e9, 1e9)] = 0
    high: Annotated[float, Bounds(-1e9, 1e9)] = 255

    def __post_init__(self) -> None:
        super().__post_init__()
        dimensions = 1 if self.kind in ("categorical", "vector") else 3
        classes = self.shape[-1] if self.shape and self.kind in ("categorical", "grid") else 0
        if not (
            len(self.shape) == dimensions
            and (dimensions == 1 or all(self.shape))
            and len(self.sizes) == classes
            and len(self.starts) in (0, classes)
            and bool(self.layout) <= (dimensions == 3)
            and math.prod(self.shape if self.env_shape is None else self.env_shape) == math.prod(self.arranged_shape)
            and all(size <= before for size, before in zip(self.shape, self.arranged_shape, strict=True))
            and (self.kind != "image" or self.low < self.high)
            and (not self.env_dtype or is_number_type(self.env_dtype))
        ):
            raise ConfigurationError(
                f"Modality: {self.kind} of shape {self.shape} from {self.env_shape} with {len(self.sizes)} sizes and "
                f"{len(self.starts)} starts, layout {self.layout!r}, from {self.low} to {self.high} in "
                f"{shown(self.env_dtype)!r}: these do not fit each other"
            )

    @property
    def whole(self) -> bool:
        """Whether the environment's values are whole numbers in an integer type."""
        if self.env_dtype:
            return np.dtype(self.env_dtype).kind in "iub"
        return self.kind in ("categorical", "image", "grid")

    @property
    def env_shapes(self) -> list[tuple[int, ...]]:
        """Accepted shapes of the environment's array; none is listed where any of that size is."""
        if self.env_shape is not None:
            return [self.env_shape]
        if not self.layout:
            return []
        height, width, channels = self.shape
        shapes = [(channels, height, width) if self.layout == "CHW" else (height, width, channels)]
        return shapes + ([(height, width)] if channels == 1 else [])

    @property
    def arranged_shape(self) -> tuple[int, ...]:
        """``shape`` before resizing."""
        layout, env_shape = self.layout, self.env_shape
        if env_shape is None or self.kind not in ("image", "map") or len(layout) != len(env_shape):
            return self.shape
        return (*(env_shape[layout.index(side)] for side in "HW"), self.shape[2])

    @property
    def description(self) -> str:
        """In words, for the start of a run."""
        if self.kind == "categorical":
            text = f"categorical, {_classes_text(self.sizes)}"
            text += f" in {self.shape[0]} entries" if self.shape[0] > 1 else ""
        elif self.kind == "vector":
            text = f"vector of {self.shape[0]:,}"
        else:
            height, width, channels = self.shape
            plural = "" if channels == 1 else "s"
            text = f"{self.kind} {height}x{width}, {channels} channel{plural}{_WORDS[self.layout]}"
            text += f", {_classes_text(self.sizes)}" if self.sizes else ""
            text += ", resized" if self.arranged_shape != self.shape else ""
        return f"{text} (from {self.expected})"

    @property
    def expected(self) -> str:
        """What the environment's array has to be."""
        shapes = " or ".join(map(str, self.env_shapes)) or f"of {math.prod(self.shape)} entries"
        if self.kind == "image":
            span = f" from {self.low:g} to {self.high:g}"
        elif self.sizes:
            start = min(self.starts, default=0)
            span = f" from {start} to {start + max(self.sizes) - 1}"
        else:
            span = ", finite"
        dtype = self.env_dtype or ("integers" if self.whole else "numbers")
        return f"shape {shapes}, {dtype}{span}"


def is_number_type(name: str) -> bool:
    """Whether NumPy knows ``name`` as a type of whole or real numbers."""
    try:
        return np.dtype(name).kind in "biuf"
    except (TypeError, ValueError):
        return False


def modality_of(
    name: str, space: spaces.Space[Any], path: Path, wanted: str | Modality | None, example: Example | None
) -> Modality:
    """The modality of a part; ``wanted`` is a kind as text, or a saved modality to be read as then.

    Raises:
        ConfigurationError: an unsupported space, an unknown kind, or one that does not fit the space.
    """
    part = _Part(name, space, path)
    if isinstance(wanted, Modality):
        known = not wanted.layout or len(wanted.layout) == len(part.shape)
        most = max(wanted.sizes, default=2) if wanted.kind == "grid" else MOST_GRID_CLASSES
        return part.read(wanted.kind, wanted.layout if known else guess_layout(part), most)
    if wanted is None:
        kind, layout = part.guess(example)
        return part.read(kind, layout, GRID_CLASSES if part.range == (0, 255) else MOST_GRID_CLASSES)
    kind, colon, asked = wanted.partition(":")
    layouts = [layout for layout in get_args(Layout) if len(layout) == len(part.shape)]
    if kind not in get_args(Kind) or (colon and asked not in layouts):
        raise ConfigurationError(
            f"kinds: {name} is {wanted!r}, expected {', '.join(get_args(Kind))}, or KIND:LAYOUT with a layout for its "
            f"{len(part.shape)} dimensions, {' or '.join(layouts) or 'which has none'}"
        )
    if kind in ("categorical", "vector") and colon:
        raise ConfigurationError(f"kinds: {name} is {wanted!r}, expected no layout: a {kind} has none")
    return part.read(kind, asked or guess_layout(part))


def guess_layout(part: "_Part") -> str:
    """As the module's head says.

    Example:
        >>> boxes = [(84, 84, 4), (4, 84, 84), (210, 160, 3), (3, 210, 160), (8, 8, 119), (4, 64, 64, 3)]
        >>> [guess_layout(_Part("", spaces.Box(0, 255, shape, np.uint8), ())) for shape in boxes]
        ['HWC', 'CHW', 'HWC', 'CHW', 'HWC', 'FHWC']
    """
    shape = part.shape
    if len(shape) == 2:
        return "HW"
    if len(shape) not in (3, 4):
        return ""
    first, middle, last = shape[-3:]
    chw = first != last and (middle == last or (first != middle and first < last))
    return ("F" if len(shape) == 4 else "") + ("CHW" if chw else "HWC")


class _Part:
    """A part's space as arrays of bounds."""

    def __init__(self, name: str, space: spaces.Space[Any], path: Path) -> None:
        self.name, self.space, self.path = name, space, path
        if isinstance(space, spaces.Discrete):
            low, high = np.asarray(int(space.start)), np.asarray(int(space.start) + int(space.n) - 1)
        elif isinstance(space, spaces.MultiDiscrete):
            low, high = np.asarray(space.start), np.asarray(space.start) + np.asarray(space.nvec) - 1
        elif isinstance(space, spaces.MultiBinary):
            low, high = np.zeros(space.shape, np.int8), np.ones(space.shape, np.int8)
        elif isinstance(space, spaces.Box):
            low, high = (bound.astype(np.int8) if bound.dtype == bool else bound for bound in (space.low, space.high))
        else:
            raise ConfigurationError(
                f"ObservationSpec: {name!r} is a {type(space).__name__} ({one_line(space)}), which is not supported; "
                "expected Discrete, MultiDiscrete, MultiBinary, Box, or a Tuple or Dict of them"
            )
        self.low, self.high = low, high
        self.shape = tuple(int(n) for n in space.shape or ())
        self.dtype = np.dtype(space.dtype)
        self.whole = self.dtype.kind in "iub"
        self.range: tuple[int, int] | tuple[float, float] | None = None
        if low.size and np.isfinite(low).all() and np.isfinite(high).all():
            smallest, largest = low.min().item(), high.max().item()
            limits = np.iinfo(self.dtype) if self.dtype.kind == "i" else None
            if limits is None or smallest > limits.min or largest < limits.max or self.dtype == np.int8:
                self.range = (smallest, largest)

    @property
    def classes(self) -> int | None:
        """How many values there are; None if not whole numbers with bounds."""
        if self.range is None or any(bound != int(bound) for bound in self.range):
            return None
        return int(self.range[1]) - int(self.range[0]) + 1

    def sides(self, layout: str) -> tuple[int, int]:
        return self.shape[layout.index("H")], self.shape[layout.index("W")]

    def guess(self, example: Example | None) -> tuple[str, str]:
        """Kind and layout, by the rules of the module's head."""
        listed = isinstance(self.space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)
        layout = guess_layout(self)
        if not layout or not min(self.shape, default=0):
            return ("categorical" if listed else "vector"), ""
        sides = self.sides(layout)
        large = min(sides) >= SMALLEST_IMAGE
        board = min(sides) >= 2 and max(sides) <= LARGEST_BOARD
        few = self.classes is not None and self.classes <= MOST_CLASSES
        if listed:
            equal = bool((self.low == self.low.flat[0]).all() and (self.high == self.high.flat[0]).all())
            return ("grid", layout) if few and equal and board and min(sides) > 2 else ("categorical", "")
        flat = len(self.shape) == 2
        if self.whole:
            if few and (board or large):
                return ("grid" if board else "image"), layout
            if self.dtype == np.uint8 or self.range == (0, 255):
                if not large and min(sides) < 2:
                    return "vector", ""
                bright = not large and example is not None and _values(example).max(initial=0) >= GRID_CLASSES
                return ("image" if large or bright else "grid"), layout
        elif self.range in _PIXELS and (large or not flat or board):
            values = _values(example) if board and not large and example is not None else np.zeros(0)
            if np.unique(values).size > 1 and (values == np.rint(values)).all() and self.range != (0, 255):
                return "grid", layout
            if large or not flat:
                return "image", layout
        return ("map", layout) if not flat and min(sides) >= SMALLEST_MAP else ("vector", "")

    def read(self, kind: str, layout: str, most: int = MOST_GRID_CLASSES) -> Modality:
        """The modality of this part as ``kind`` in ``layout``; a grid's with at most ``most`` classes."""
        common: dict[str, Any] = {"path": self.path, "env_shape": self.shape, "env_dtype": str(self.dtype)}
        entries = int(np.prod(self.shape))
        if kind == "vector":
            return Modality("vector", (entries,), "float32", **common)
        if kind == "categorical":
            if self.range is None or not self.whole:
                raise self._unfit(kind, "its values are not whole numbers within bounds")
            starts = tuple(int(n) for n in self.low.ravel())
            sizes = tuple(int(n) + 1 - start for n, start in zip(self.high.ravel(), starts, strict=True))
            return Modality(
                "categorical", (entries,), _smallest_dtype(max(sizes)), sizes=sizes, starts=starts, **common
            )
        if not layout or not entries:
            raise self._unfit(kind, "it needs 2 to 4 dimensions")
        height, width = self.sides(layout)
        shape = (height, width, entries // (height * width))
        common["layout"] = layout
        if kind == "map":
            return Modality("map", shape, "float32", **common)
        if kind == "image":
            low, high = (0, 255) if self.dtype == np.uint8 else self.range or (0, 0)
            if self.dtype == np.uint8 and self.classes is not None and self.classes <= GRID_CLASSES:
                low, high = self.range or (0, 0)
            if not low < high:
                raise self._unfit(kind, "it has no bounds that could be black and white; map reads it")
            return Modality("image", shape, "uint8", low=low, high=high, **common)
        if self.classes is None or self.range is None or not 2 <= self.classes <= MOST_GRID_CLASSES:
            raise self._unfit(kind, f"its values are not 2 to {MOST_GRID_CLASSES:,} whole numbers")
        classes = min(self.classes, most)
        sizes = (classes,) * shape[2]
        starts = (int(self.range[0]),) * shape[2] if self.range[0] else ()
        return Modality("grid", shape, _smallest_dtype(classes), sizes=sizes, starts=starts, **common)

    def _unfit(self, kind: str, why: str) -> ConfigurationError:
        return ConfigurationError(
            f"ObservationSpec: {self.name!r} is {one_line(self.space)}, which cannot be read as {kind!r}: {why}"
        )


def encode_part(name: str, modality: Modality, value: Any, batch: tuple[int, ...]) -> np.ndarray:
    """The environment's array (*batch, *env_shape) -> (*batch, *shape).

    Raises:
        ValueError: another shape, type or range than the world model's.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"observation {name!r} is a {type(value).__name__}: {error}, {_wanted(modality)}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"observation {name!r} has dtype {array.dtype}, {_wanted(modality)}")
    array = _arranged(name, modality, array, batch)
    if modality.kind in ("vector", "map"):
        with np.errstate(over="ignore"):
            array = array.astype(modality.dtype)
    elif array.dtype.kind == "f" and modality.whole:
        raise ValueError(f"observation {name!r} has dtype {array.dtype}{_span(array)}, {_wanted(modality)}")
    if modality.kind == "image" and (array.dtype != np.uint8 or (modality.low, modality.high) != (0, 255)):
        if not ((array >= modality.low) & (array <= modality.high)).all():
            raise ValueError(f"observation {name!r} has dtype {array.dtype}{_span(array)}, {_wanted(modality)}")
        array = np.rint((array.astype(np.float32) - modality.low) * (255 / (modality.high - modality.low)))
    if modality.arranged_shape != modality.shape:
        array = resized(array, *modality.shape[:2])
        array = np.rint(array) if modality.kind == "image" else array
    if modality.sizes and array.dtype.kind == "f" and not (array == np.rint(array)).all():
        raise ValueError(f"observation {name!r} has fractions or NaN{_span(array)}, {_wanted(modality)}{_hint(name)}")
    if modality.starts and any(modality.starts):
        array = array.astype(np.int64) - np.array(modality.starts)
    check_values(name, modality, array)
    return array.astype(modality.dtype, copy=False)


def check_values(name: str, modality: Modality, array: np.ndarray) -> None:
    """Raises ValueError for encoded values outside the modality's."""
    if modality.dtype == "float32":
        if not np.isfinite(array).all():
            raise ValueError(f"observation {name!r} holds NaN or infinity, expected finite numbers")
    elif modality.sizes and ((array < 0).any() or (array >= np.array(modality.sizes)).any()):
        hint, span = _hint(name) if modality.kind == "grid" else "", f"values from {array.min():g} to {array.max():g}"
        raise ValueError(f"observation {name!r} has {span}, expected classes below {max(modality.sizes)}{hint}")


def _arranged(name: str, modality: Modality, array: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    shapes = modality.env_shapes
    fits = array.shape in [(*batch, *shape) for shape in shapes]
    if not fits and (not shapes or math.prod(modality.arranged_shape) == 1):  # one entry has one meaning in any shape
        fits = array.shape[: len(batch)] == batch and array.size == math.prod((*batch, *modality.shape))
    if not fits:
        raise ValueError(f"observation {name!r} has shape {array.shape}, {_wanted(modality, batch)}")
    lead = len(batch)
    own = array.ndim - lead
    if own == 3 and modality.layout == "CHW":
        array = np.moveaxis(array, lead, -1)
    elif modality.layout == "FHWC":
        array = np.moveaxis(array, lead, -2)
    elif modality.layout == "FCHW":
        array = np.moveaxis(array, (lead, lead + 1), (-2, -1))
    return array.reshape(*batch, *modality.arranged_shape)


def _wanted(modality: Modality, batch: tuple[int, ...] = ()) -> str:
    return f"expected {modality.expected}" + (f" after {batch}" if batch else "")


def _span(array: np.ndarray) -> str:
    return f" and values from {array.min():g} to {array.max():g}" if array.size else ""


def _hint(name: str) -> str:
    return f"; --kinds {name}=image reads it as pixels, {name}=grid as more classes, {name}=map as numbers"


def _values(example: Example) -> np.ndarray:
    values = np.asarray(example())
    return values if values.dtype.kind in "biuf" else np.zeros(0)  # refused when it is encoded


def one_line(space: spaces.Space[Any]) -> str:
    """A space for an error message; large ones are cut."""
    text = " ".join(str(space).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _classes_text(sizes: tuple[int, ...]) -> str:
    return f"{min(sizes):,} classes" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,} classes"


def _smallest_dtype(classes: int) -> Literal["uint8", "int32", "int64"]:
    return "uint8" if classes <= 2**8 else "int32" if classes <= 2**31 else "int64"
