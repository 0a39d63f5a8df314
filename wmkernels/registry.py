"""The op registry, read by dispatch, ``info``, tests and tables.

An op folder has ``spec.py``, ``function``, ``validation``, ``reference``, ``chunked``, ``autograd``, ``meta``,
``native`` and ``triton_kernels``. To add an op, add its folder and import its functions in ``wmkernels/__init__.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OpSpec:
    """Describes an op.

    Attributes:
        name: of folder and kernels.
        functions: public functions.
        verified: per GPU backend, compute capabilities (90 for sm_90) checked against the reference; automatic
            dispatch needs at least one.
        max_state: maximum states per channel of compiled kernels; None: unlimited.
    """

    name: str
    functions: tuple[str, ...]
    verified: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_state: int | None = None


OPS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Registers an op."""
    OPS[spec.name] = spec
    return spec


def op_names() -> tuple[str, ...]:
    """Sorted op names."""
    return tuple(sorted(OPS))
