"""Mamba-2's and Mamba-3's scan: one decay per head."""

from wmkernels.ssd_scan.spec import SPEC

__all__ = ["SPEC"]
