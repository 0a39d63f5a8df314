"""Calls an emulated program, a separate process, with PyTorch tensors."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

DIMENSIONS = 4
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=87:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class EmulatorError(RuntimeError):
    """The emulator's or sanitizer's report; it ended the program, which the next call starts again."""


@dataclass(frozen=True)
class Result:
    """A call's result."""

    value: int
    kernels: tuple[str, ...]
    blocks: int
    switches: int
    barriers: frozenset[str]  # passed, as file:line


class Emulator:
    """A program made by ``build``.

    Args:
        program: its path.

    Example:
        >>> emulator = Emulator(build("sample", [Path("sample.cu")]))     # doctest: +SKIP
        >>> emulator.call("sample_scale", [x, x.numel()], seed=3)      # doctest: +SKIP
    """

    def __init__(self, program: Path):
        self.program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def call(
        self,
        name: str,
        words: Sequence[int | Tensor],
        *,
        seed: int = 0,
        multiprocessors: int = 4,
        disabled_barrier: str = "",
        read_only: Sequence[Tensor] = (),
        returns_int: bool = True,
    ) -> Result:
        """Calls ``int name(const int64_t* words)``; tensors become addresses.

        Args:
            name: an ``extern "C"`` function.
            words: arguments; tensors, of up to four dimensions, are updated in place.
            seed: of the thread order.
            multiprocessors: reported to kernels.
            disabled_barrier: ``file:line`` of a barrier to skip.
            read_only: tensors that must not change.
            returns_int: false if the function returns int64_t.

        Raises:
            EmulatorError: the program ended with a report.
        """
        tensors: list[Tensor] = []
        indices: dict[tuple[object, ...], int] = {}
        flat: list[int] = []
        for word in words:
            if isinstance(word, Tensor):
                key = (word.data_ptr(), word.stride(), word.shape, word.dtype)
                if key not in indices:
                    indices[key] = len(tensors)
                    tensors.append(word)
                flat += (indices[key], 0)
            else:
                flat += (-1, word)
        request = [_text(name), struct.pack("=3q", int(returns_int), seed, multiprocessors), _text(disabled_barrier)]
        request.append(struct.pack("=q", len(tensors)))
        request += map(_packed, tensors)
        request.append(struct.pack(f"={len(flat) + 1}q", len(words), *flat))
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(b"".join(request))
            process.stdin.flush()
        except BrokenPipeError:
            self._raise_report()
        value, blocks, switches, kernel_count = self._words(4)
        kernels = tuple(self._received_text() for _ in range(kernel_count))
        barriers = frozenset(self._received_text() for _ in range(self._words(1)[0]))
        changed = [self._bytes(x.numel() * x.element_size()) if self._words(1)[0] else None for x in tensors]
        self._words(1)  # sent once the gaps between elements have been checked
        protected = {x.data_ptr() for x in read_only}
        for x, data in zip(tensors, changed, strict=True):
            if data is None:
                continue
            if x.data_ptr() in protected:
                raise EmulatorError(f"{name} wrote into an input of shape {tuple(x.shape)}")
            x.copy_(torch.frombuffer(bytearray(data), dtype=x.dtype).view(x.shape))
        return Result(value, kernels, blocks, switches, barriers)

    def close(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                if stream is not None:
                    stream.close()
            self._process.wait()
        self._process = self._errors = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            self._process = subprocess.Popen(
                [self.program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **ENVIRONMENT},
            )
        return self._process

    def _bytes(self, count: int) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) != count:
            self._raise_report()
        return data

    def _words(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"={count}q", self._bytes(8 * count))

    def _received_text(self) -> str:
        return self._bytes(self._words(1)[0]).decode()

    def _raise_report(self) -> None:
        assert self._process is not None and self._errors is not None
        self._process.wait()
        self._errors.seek(0)
        report = self._errors.read().decode(errors="replace")
        status = self._process.returncode
        self.close()
        raise EmulatorError(report or f"the emulated program ended with status {status} and said nothing")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("=q", len(encoded)) + encoded


def _packed(x: Tensor) -> bytes:
    """Item size, address modulo 256, four sizes and strides, elements."""
    missing = DIMENSIONS - x.dim()
    sizes, strides = (*(1,) * missing, *x.shape), (*(0,) * missing, *x.stride())
    header = struct.pack(f"={2 + 2 * DIMENSIONS}q", x.element_size(), x.data_ptr() % 256, *sizes, *strides)
    contents = x.detach().clone(memory_format=torch.contiguous_format).view(-1)
    return header + (contents.view(torch.uint8).numpy().tobytes() if contents.numel() else b"")
