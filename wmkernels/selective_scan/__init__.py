"""The selective scan (Mamba's S6)."""

from wmkernels.selective_scan.spec import SPEC

__all__ = ["SPEC"]
