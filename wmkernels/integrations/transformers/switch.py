"""The switch: which models of the installed version are known, and which run on these kernels."""

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

from wmkernels.integrations.transformers.functions import replacement
from wmkernels.integrations.transformers.mixer_call import calls, with_mixer_call, with_packing
from wmkernels.integrations.transformers.mixers import mixer_forward
from wmkernels.integrations.transformers.models import MODELS, Mixer
from wmkernels.integrations.transformers.patching import (
    INHERITED,
    Patch,
    Unknown,
    own_class,
    own_function,
    require_arguments,
)

_MIXERS = ((4, 57), (5, 14))  # versions whose mixers are replaced as a whole
_FUNCTIONS = tuple((5, minor) for minor in range(15, 25))  # versions whose mixers call functions that are replaced
_FORWARD = tuple(f"self hidden_states {cache} attention_mask kwargs" for cache in ("cache", "cache_params"))
_FORWARD_BEFORE = ("cache_params", "cache_position", "attention_mask", "seq_idx", "kwargs")

_patches: dict[str, list[Patch]] = {}
_left_alone: dict[str, str] = {}
_said: set[str] = set()


@dataclass(frozen=True)
class Report:
    """What runs on these kernels.

    Attributes:
        version: of transformers.
        enabled: models on these kernels.
        left_alone: models as they were, with the reason.
        calls: since ``enable()``, of our functions by name; ``original``: calls that stayed with the library's.
    """

    version: str
    enabled: tuple[str, ...]
    left_alone: Mapping[str, str]
    calls: Mapping[str, int]

    def __str__(self) -> str:
        lines = [f"transformers {self.version}: {', '.join(self.enabled) or 'no model'} on wmkernels"]
        lines += [f"  left alone: {model}: {why}" for model, why in self.left_alone.items()]
        lines += [f"  {count} calls of {name}" for name, count in sorted(self.calls.items())]
        return "\n".join(lines)


def enable(*models: str) -> None:
    """Runs known models on these kernels, in this process: those that exist and those to come.

    A model, version or function that is not known is left alone, with one warning. Calls that a kernel cannot run, and
    calls that ``torch.export`` or ``torch.jit.trace`` records, run the library's own code.

    Args:
        models: names of folders in ``transformers.models``; all known ones if none are named.

    Raises:
        ImportError: transformers is not installed.
        ValueError: not a known model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("wmkernels.integrations.transformers: the package transformers is not installed")
    for name in models:
        if name not in MODELS:
            raise ValueError(f"enable: {name!r} is not a known model, expected one of {', '.join(MODELS)}")
    version = _version()
    if _numbers(version) not in _MIXERS + _FUNCTIONS:
        known = ", ".join(f"{major}.{minor}" for major, minor in _MIXERS + _FUNCTIONS)
        _say(f"transformers {version} is not known, expected one of {known}: all models are left alone")
        return
    if not _patches:
        calls.clear()
    for name in models or MODELS:
        if name not in _patches and importlib.util.find_spec(f"transformers.models.{name}") is not None:
            _enable(name, MODELS[name], _numbers(version) in _MIXERS)


def _enable(name: str, mixer: Mixer, before: bool) -> None:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    try:
        patches = [*(_whole_mixer if before else _functions)(module, mixer), _packing(module, mixer)]
    except Unknown as unknown:
        _left_alone[name] = str(unknown)
        _say(f"{name} is left alone: {unknown}")
        return
    _left_alone.pop(name, None)
    for patch in patches:
        patch.apply()
    _patches[name] = patches


def _functions(module: ModuleType, mixer: Mixer) -> Iterator[Patch]:
    for name, use in mixer.uses.items():
        original, arguments = own_function(module, module, name)
        require_arguments(name, arguments, use.arguments)
        yield Patch(module, name, original, replacement(original, use.op, use.ours))
    owner = own_class(module, mixer.name)
    forward, arguments = own_function(owner, module, "forward")
    require_arguments(f"{mixer.name}.forward", arguments, *_FORWARD)
    yield Patch(owner, "forward", forward, with_mixer_call(forward, mixer.passes_state))


def _whole_mixer(module: ModuleType, mixer: Mixer) -> Iterator[Patch]:
    if mixer.before is None:
        raise Unknown("its layers run on these kernels from transformers 5.15 on")
    owner = own_class(module, mixer.name)
    forward, (_, _, *names) = own_function(owner, module, "forward")
    if not set(names) <= set(_FORWARD_BEFORE):
        raise Unknown(f"{mixer.name}.forward has the arguments ({', '.join(names)}), expected of {_FORWARD_BEFORE}")
    yield Patch(owner, "forward", forward, mixer_forward(forward, *mixer.before, tuple(names)))


def _packing(module: ModuleType, mixer: Mixer) -> Patch:
    owner = own_class(module, f"{mixer.prefix}PreTrainedModel")
    if "__call__" in vars(owner):
        raise Unknown(f"{owner.__name__}.__call__ is not that of a module")
    return Patch(owner, "__call__", INHERITED, with_packing(owner.__call__))


def disable() -> None:
    """Puts the library's own code back; what another package replaced since ``enable()`` stays, with a warning."""
    for name, patches in _patches.items():
        for patch in patches:
            if not patch.undo():
                _say(f"{name}: {patch.name} was replaced after enable() and stays so")
    _patches.clear()
    _left_alone.clear()
    _said.clear()


def report() -> Report:
    """Models that run on these kernels, models left alone, and calls so far."""
    return Report(_version(), tuple(_patches), dict(_left_alone), dict(calls))


def _version() -> str:
    return importlib.metadata.version("transformers")


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(f"wmkernels: {text}", stacklevel=3)
