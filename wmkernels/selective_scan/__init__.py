"""The selective scan."""

from wmkernels.selective_scan.spec import SPEC

__all__ = ["SPEC"]
