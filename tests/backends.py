"""Where tests run: every backend that this machine can run, on the device it runs on."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from wmkernels import dispatch


class Place(NamedTuple):
    """A backend and the device whose tensors it takes."""

    backend: str
    device: str


def _candidates() -> list[Place]:
    places = [Place("reference", "cpu"), Place("chunked", "cpu"), Place("cpu", "cpu")]
    if torch.cuda.is_available():
        places += [Place("chunked", "cuda"), Place("triton", "cuda"), Place("cuda", "cuda")]
    return places


def places(op: str, kernels_only: bool = False, without: Sequence[str] = ()) -> list[Place]:
    """The places where ``op`` runs ``without`` some backends; ``kernels_only``: without plain PyTorch."""
    left_out = dispatch.PYTORCH_BACKENDS if kernels_only else without
    found = [p for p in _candidates() if p.backend not in left_out]
    return [p for p in found if not dispatch.reasons(op, p.backend, torch.device(p.device))]


def everywhere(op: str, kernels_only: bool = False, without: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Runs a test once per place, as the argument ``place``."""
    found = places(op, kernels_only, without)
    return pytest.mark.parametrize("place", found, ids=["-".join(p[: 1 + (p == ("chunked", "cuda"))]) for p in found])


def instruction_sets() -> list[str]:
    """The instruction-set levels of the CPU kernels that run here."""
    native = dispatch.load_native()
    return [] if native is None else [name for name in native.cpu_isa_available().split(",") if name]
