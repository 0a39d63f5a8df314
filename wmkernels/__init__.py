"""wmkernels: long-memory recurrent cores for world models, as kernels."""

# torch comes before the extension, which then uses the OpenMP runtime that torch has loaded.
import torch as _torch  # noqa: F401

from wmkernels import nn
from wmkernels.conv_lstm.function import conv_lstm, conv_lstm_step
from wmkernels.linear_scan.function import linear_scan
from wmkernels.selective_scan.function import selective_scan
from wmkernels.selective_step.function import selective_state_update, selective_step

__version__ = "0.1.0"
__all__ = [
    "conv_lstm",
    "conv_lstm_step",
    "linear_scan",
    "nn",
    "selective_scan",
    "selective_state_update",
    "selective_step",
]
