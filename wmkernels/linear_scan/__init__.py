"""The first-order linear recurrence."""

from wmkernels.linear_scan.spec import SPEC

__all__ = ["SPEC"]
