"""Runs CUDA kernels on CPU tensors through the GPU backend's Python code."""

import contextlib
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from wmkernels import dispatch, native_call
from wmkernels.conv_lstm import native as conv_lstm_native

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from emulator.build import build  # noqa: E402
from emulator.client import Emulator, Result  # noqa: E402

FORWARD_OUTPUTS = {"out", "last_state", "chunk_states", "residual", "residuals"}
CONV_LSTM_OUTPUTS = {"out", "h", "c", "gates", "cn", "cells", "barrier_counter"}  # gates are an input of linear_scan
STEP_OUTPUTS = {"out", "state_out"}
BACKWARD_INPUTS = {"grad_out", "grad_last_state", "grad_h"}


CUDA = ROOT / "csrc" / "cuda"


def op_of(name: str) -> str:
    return next(path.name for path in sorted(CUDA.iterdir()) if name.startswith(path.name))


@functools.cache
def program(op: str, races: bool = False) -> Path:
    """Compiled for the emulator, with sanitizers or race detection."""
    sources = sorted((CUDA / op).glob("*.cu"))
    return build(f"cuda_{op}{'_races' if races else ''}", sources, ["-DWMK_EMULATE", f"-I{ROOT / 'csrc'}"], races=races)


def writes(name: str, member: str) -> bool:
    if name == "selective_step":
        return member in STEP_OUTPUTS
    if name.endswith("backward"):
        return member.startswith("grad_") and member not in BACKWARD_INPUTS
    return member in (CONV_LSTM_OUTPUTS if name.startswith("conv_lstm") else FORWARD_OUTPUTS)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for x in (a, b)))


def _workspace(size: int) -> torch.Tensor | int:
    """Poisoned, aligned to 256 bytes."""
    scratch = torch.empty(size + 256, dtype=torch.uint8)
    offset = -scratch.data_ptr() % 256
    return scratch[offset : offset + size].fill_(0xFF) if size else 0


@dataclass(frozen=True)
class EmulatedCall:
    """The extension's prepared call; the emulator allocates the workspace."""

    emulated: "EmulatedCuda"
    name: str
    members: dict[str, list]
    workspace_bytes = 0

    def run(self):
        self.emulated.run(self.name, self.members)


class EmulatedCuda:
    """The extension's ``cuda_`` functions, compiled at first call.

    ``seeds``: thread orders, with bitwise equal results. ``races``: detect shared-memory races instead of running
    sanitizers. ``disabled_barrier``: a barrier that does nothing.
    """

    def __init__(self, seeds: tuple[int, ...] = (0,), multiprocessors: int = 4, races: bool = False):
        self.emulators: dict[str, Emulator] = {}
        self.races = races
        self.seeds = seeds
        self.multiprocessors = multiprocessors
        self.disabled_barrier = ""
        self.ran: list[Result] = []  # cleared by tests
        self.launches = 0  # counted for the first seed only

    @contextlib.contextmanager
    def installed(self):
        dispatch._device_reasons.cache_clear()
        with (
            mock.patch.object(dispatch, "_cuda_reasons", lambda *_: ()),
            mock.patch.object(native_call, "pack_args", self._pack_args),
            mock.patch.object(native_call, "stream_args", lambda _: {}),
            mock.patch.object(conv_lstm_native, "runs_on_gpu", lambda _: True),
        ):
            yield self
        dispatch._device_reasons.cache_clear()

    def emulator(self, op: str) -> Emulator:
        if op not in self.emulators:
            self.emulators[op] = Emulator(program(op, self.races))
        return self.emulators[op]

    def close(self) -> None:
        for emulator in self.emulators.values():
            emulator.close()

    @property
    def kernels(self) -> set[str]:
        """Without template arguments."""
        return {name.strip("()").split("<")[0] for result in self.ran for name in result.kernels}

    def _pack_args(self, name, members, device):
        """Checked by the extension; holds tensors instead of addresses."""
        prepared = native_call.native.prepare(f"cuda_{name}", members, device)
        flat = iter(prepared.words)
        named = {}
        for member, size in prepared.layout:
            values = [next(flat) for _ in range(size)]
            given = members.get(member)
            if isinstance(given, tuple) and values[0]:
                values[0] = given[0]
            named[member] = values
        return EmulatedCall(self, name, named)

    def run(self, name, named):
        words = [value for values in named.values() for value in values]
        emulator = self.emulator(op_of(name))
        call = functools.partial(emulator.call, f"wmk_cuda_{name}", multiprocessors=self.multiprocessors)
        if "workspace" in named:
            # sizes must not depend on addresses
            sizes = [0 if isinstance(word, torch.Tensor) else word for word in words]
            size = emulator.call(
                f"wmk_cuda_{name}_workspace", sizes, multiprocessors=self.multiprocessors, returns_int=False
            ).value
            named["workspace"] = [_workspace(size)]
            words = [value for values in named.values() for value in values]
        tensors = {key: values[0] for key, values in named.items() if isinstance(values[0], torch.Tensor)}
        outputs = {key: tensor for key, tensor in tensors.items() if writes(name, key)}
        written = {tensor.data_ptr() for tensor in outputs.values()}
        inputs = [t for key, t in tensors.items() if key != "workspace" and t.data_ptr() not in written]
        before = {key: tensor.clone() for key, tensor in outputs.items()}
        first: dict[str, torch.Tensor] = {}
        for seed in self.seeds:
            for key, tensor in outputs.items():
                tensor.copy_(before[key])
            if "workspace" in tensors:
                tensors["workspace"].fill_(0xFF)
            result = call(words, seed=seed, read_only=inputs, disabled_barrier=self.disabled_barrier)
            if result.value:
                raise ValueError(f"{name}: the kernel answered {result.value}")
            self.ran.append(result)
            self.launches += len(result.kernels) if seed == self.seeds[0] else 0
            for key, tensor in outputs.items():
                if seed == self.seeds[0]:
                    first[key] = tensor.clone()
                assert same_bits(tensor, first[key]), (
                    f"{name}: {key} depends on the order of the threads (seeds {self.seeds[0]} and {seed})"
                )
