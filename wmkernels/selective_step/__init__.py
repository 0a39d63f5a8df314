"""One step of the selective scan."""

from wmkernels.selective_step.spec import SPEC

__all__ = ["SPEC"]
