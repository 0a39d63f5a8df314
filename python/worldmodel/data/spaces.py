"""Observation specs from gymnasium spaces.

An observation is a flat dict of *modalities*, of the kinds in ``kinds.py``. Text is dropped.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldmodel.data.actions import MASK, ActionSpec
from worldmodel.data.kinds import (
    Kind,
    Modality,
    Path,
    check_values,
    encode_part,
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
        action_mask: where the environment gives the mask of legal actions, which is the modality ``MASK``; empty
            without one.

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
    action_mask: Literal["", "info", "observation"] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.modalities:
            if not _PART_NAME.fullmatch(name) or not name.isprintable() or ".." in name.split("/"):
                raise ConfigurationError(
                    f"ObservationSpec: a part is named {shown(name)!r}, expected 1 to 256 printable characters and "
                    "no path to somewhere else (../, /); a gymnasium.ObservationWrapper can rename it"
                )
        if self.action_mask:
            mask = self.modalities.get(MASK)
            if mask is None or mask.kind != "categorical" or set(mask.sizes) != {2}:
                raise ConfigurationError(
                    f"ObservationSpec: masks are in {self.action_mask}, and no part {MASK!r} is one"
                )

    @classmethod
    def from_space(
        cls,
        space: spaces.Space[Any],
        kinds: "Mapping[str, str] | ObservationSpec | None" = None,
        example: Callable[[], Any] | None = None,
        actions: ActionSpec | None = None,
        info: Mapping[str, Any] | None = None,
        image_size: int | None = None,
    ) -> "ObservationSpec":
        """The spec of a space; ``kinds.py`` has the rules.

        Args:
            space: of the environment's observations.
            kinds: by modality name, ``KIND`` or ``KIND:LAYOUT``; or a spec whose parts are to be read as they were.
            example: returns first observations, one or a batch; called where the space alone does not tell.
            actions: of the environment; a part ``MASK`` of the observation with an entry per class is their mask.
            info: of the first reset, which may hold a mask.
            image_size: most pixels per side; larger images and maps are resized.

        Raises:
            ConfigurationError: an unsupported space, text alone, or kinds that do not fit.
        """
        saved = kinds.modalities if isinstance(kinds, ObservationSpec) else {}
        masks = ("", kinds.action_mask) if isinstance(kinds, ObservationSpec) else ("", "info", "observation")
        classes = actions.classes if actions is not None else 0
        action_mask: Any = ""
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
            if path == (MASK,) and "observation" in masks and _is_mask(part, classes) and not isinstance(wanted, str):
                action_mask, modalities[name] = "observation", _mask_modality(path, classes, part)
                continue
            look = functools.partial(values, path) if example is not None else None
            modalities[name] = _shrunk(modality_of(name, part, path, wanted, look), image_size)
        if asked:
            raise ConfigurationError(
                f"ObservationSpec: kinds names {sorted(asked)}, expected names among {sorted(modalities)}"
            )
        if not modalities:
            raise ConfigurationError(f"ObservationSpec: the space {one_line(space)} holds nothing but text")
        if classes and not action_mask and "info" in masks and (MASK in (info or {}) or MASK in saved):
            if MASK in modalities:
                raise ConfigurationError(
                    f"ObservationSpec: info and the observation have an {MASK!r} each, and that of the observation is "
                    f"none of {classes} classes; a gymnasium.ObservationWrapper can give it another name"
                )
            action_mask, modalities[MASK] = "info", _mask_modality((), classes)
        return cls(modalities, tuple(dropped), action_mask)

    @property
    def _seen(self) -> dict[str, Modality]:
        """The modalities in the environment's observations."""
        apart = MASK if self.action_mask == "info" else None
        return {name: modality for name, modality in self.modalities.items() if name != apart}

    def encode(self, observation: Any, action_mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Arrays (*modality.shape) by modality name.

        Args:
            observation: in the environment's form.
            action_mask: (classes,), of ``ActionSpec.encode_mask``, where masks are no part of the observation; None if
                all actions are legal.

        Raises:
            ValueError: another shape, type or range than the space's, NaN, infinity, a missing part.
        """
        encoded = {
            name: encode_part(name, modality, _part(name, modality, observation), ())
            for name, modality in self._seen.items()
        }
        return encoded | self._masks(action_mask)

    def encode_batch(self, observations: Any, action_masks: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """``encode`` for a vector environment's observations: (batch, *modality.shape)."""
        encoded = {}
        batch: tuple[int, ...] = ()
        for name, modality in self._seen.items():
            value = np.asarray(_part(name, modality, observations))
            batch = value.shape[:1]
            encoded[name] = encode_part(name, modality, value, batch)
        return encoded | self._masks(action_masks, *batch)

    def _masks(self, given: np.ndarray | None, *batch: int) -> dict[str, np.ndarray]:
        if self.action_mask != "info":
            return {}
        modality = self.modalities[MASK]
        mask = np.ones((*batch, *modality.shape), bool) if given is None else np.asarray(given)
        return {MASK: encode_part(MASK, modality, mask, batch)}

    def legal(self, encoded: Mapping[str, Any]) -> Any:
        """The mask of legal actions among encoded arrays or tensors, bool (..., classes); None without masks."""
        return encoded[MASK] != 0 if self.action_mask else None

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
        if self.action_mask:
            change = f"; --kinds {MASK}=vector reads it as numbers" if changeable and self.action_mask != "info" else ""
            lines[list(self.modalities).index(MASK)] = (
                f"{MASK}: from {self.action_mask}; only legal actions are chosen, the world model predicts them{change}"
            )
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


def _parts(space: spaces.Space[Any], path: Path) -> Iterator[tuple[Path, spaces.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _parts(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _parts(part, (*path, index))
    else:
        yield path, space


def _shrunk(modality: Modality, size: int | None) -> Modality:
    if size is None or modality.kind not in ("image", "map"):
        return modality
    height, width, channels = modality.shape
    return dataclasses.replace(modality, shape=(min(height, size), min(width, size), channels))


def _is_text(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Text) or (space.dtype is not None and np.dtype(space.dtype).kind == "U")


def _is_mask(space: spaces.Space[Any], classes: int) -> bool:
    if isinstance(space, spaces.Box):
        return space.shape == (classes,) and bool((space.low == 0).all() and (space.high == 1).all())
    return isinstance(space, spaces.MultiBinary) and space.shape == (classes,)


def _mask_modality(path: Path, classes: int, space: spaces.Space[Any] | None = None) -> Modality:
    dtype = "bool" if space is None else str(np.dtype(space.dtype))
    sizes, starts = (2,) * classes, (0,) * classes
    return Modality("categorical", (classes,), "uint8", path, sizes, starts, env_shape=(classes,), env_dtype=dtype)


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
