"""The op registry. A new op needs a folder with ``spec.py`` and an import in ``wmkernels/__init__.py``."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OpSpec:
    """Describes an op.

    Attributes:
        name: of folder and kernels.
        functions: public functions.
        verified: per GPU backend, compute capabilities (90 for sm_90) checked against the reference; one enables
            automatic dispatch.
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
