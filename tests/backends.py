"""Where tests run: every backend that this machine can run, on the device it runs on."""

from typing import NamedTuple

import pytest
import torch

from wmkernels import dispatch


class Place(NamedTuple):
    """A backend and the device whose tensors it takes."""

    backend: str
    device: str


def _candidates() -> list[Place]:
    places = [Place("reference", "cpu"), Place("cpu", "cpu")]
    if torch.cuda.is_available():
        places += [Place("triton", "cuda"), Place("cuda", "cuda")]
    return places


def places(op: str, kernels_only: bool = False) -> list[Place]:
    """The places where ``op`` runs, the reference among them unless ``kernels_only``."""
    found = [p for p in _candidates() if not dispatch.reasons(op, p.backend, torch.device(p.device))]
    return [p for p in found if p.backend != "reference"] if kernels_only else found


def everywhere(op: str, kernels_only: bool = False) -> pytest.MarkDecorator:
    """Runs a test once a place, as the argument ``place``."""
    found = places(op, kernels_only)
    return pytest.mark.parametrize("place", found, ids=[p.backend for p in found])


def instruction_sets() -> list[str]:
    """The instruction-set levels of the CPU kernels that run here."""
    native = dispatch.load_native()
    return [] if native is None else [name for name in native.cpu_isa_available().split(",") if name]
