"""The registry of ops: dispatch, ``info``, the tests and the tables read what an op is from its ``OpSpec``.

Each op's folder has a ``spec.py`` that registers its spec, and the same file names as the others: ``function``,
``validation``, ``reference``, ``chunked``, ``autograd``, ``meta``, ``native``, ``triton_kernels``. A new op adds its
folder and the import of its public functions in ``wmkernels/__init__.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OpSpec:
    """An op.

    Attributes:
        name: of its folder and of its kernels.
        functions: its public functions.
        verified: for each GPU backend, the compute capabilities (90 for sm_90) of the GPUs on which its kernels were
            held against the reference. Automatic dispatch chooses a GPU backend only where there is one.
        max_state: most states per channel that the compiled kernels take; None for no limit.
    """

    name: str
    functions: tuple[str, ...]
    verified: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_state: int | None = None


OPS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Adds an op."""
    OPS[spec.name] = spec
    return spec


def op_names() -> tuple[str, ...]:
    """The registered ops, sorted."""
    return tuple(sorted(OPS))
