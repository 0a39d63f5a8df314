"""accelerated_scan 0.3.1, on ``wmkernels.linear_scan``."""

__version__ = "0.3.1+wmkernels"
