"""Every backend this machine can run, with its device."""

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from wmkernels import dispatch


class Target(NamedTuple):
    backend: str
    device: str


def _candidates() -> list[Target]:
    targets = [Target("reference", "cpu"), Target("chunked", "cpu"), Target("cpu", "cpu")]
    if torch.cuda.is_available():
        targets += [Target("chunked", "cuda"), Target("triton", "cuda"), Target("cuda", "cuda")]
    return targets


def targets(op: str, kernels_only: bool = False, without: Sequence[str] = ()) -> list[Target]:
    """The op's targets except ``without``; ``kernels_only`` excludes the PyTorch backends.

    An op without a chunked form runs its reference under that name, which would be the same test again.
    """
    left_out = set(dispatch.PYTORCH_BACKENDS if kernels_only else without)
    if importlib.util.find_spec(f"wmkernels.{op}.chunked") is None:
        left_out.add("chunked")
    found = [p for p in _candidates() if p.backend not in left_out]
    return [p for p in found if not dispatch.reasons(op, p.backend, torch.device(p.device))]


def on_every_target(op: str, kernels_only: bool = False, without: Sequence[str] = ()) -> pytest.MarkDecorator:
    found = targets(op, kernels_only, without)
    return pytest.mark.parametrize("target", found, ids=["-".join(p[: 1 + (p == ("chunked", "cuda"))]) for p in found])


def instruction_sets() -> list[str]:
    native = dispatch.load_native()
    return [] if native is None else [name for name in native.cpu_isa_available().split(",") if name]
