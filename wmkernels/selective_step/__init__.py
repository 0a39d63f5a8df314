"""The selective step."""

from wmkernels.selective_step.spec import SPEC

__all__ = ["SPEC"]
