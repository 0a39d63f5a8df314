"""The op registry; importing an op's ``spec.py`` registers it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OpSpec:
    """Describes an op.

    Attributes:
        name: of folder and kernels.
        functions: public functions.
        verified: per GPU backend, compute capabilities (90 for sm_90) checked against the reference.
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
    """Sorted names."""
    return tuple(sorted(OPS))
