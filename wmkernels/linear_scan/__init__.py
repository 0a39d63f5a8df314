"""The linear scan."""

from wmkernels.linear_scan.spec import SPEC

__all__ = ["SPEC"]
