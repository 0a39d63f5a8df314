"""Long-memory recurrent cores for world models, as kernels."""

# torch first: the extension uses its OpenMP runtime.
import torch as _torch  # noqa: F401

from wmkernels import nn as nn
from wmkernels.causal_conv1d.function import causal_conv1d as causal_conv1d
from wmkernels.causal_conv1d.function import causal_conv1d_step as causal_conv1d_step
from wmkernels.conv_lstm.function import conv_lstm as conv_lstm
from wmkernels.conv_lstm.function import conv_lstm_step as conv_lstm_step
from wmkernels.gated_delta_rule.function import gated_delta_rule as gated_delta_rule
from wmkernels.gated_delta_rule.function import gated_delta_rule_step as gated_delta_rule_step
from wmkernels.linear_scan.function import linear_scan as linear_scan
from wmkernels.place_memory.function import place_memory as place_memory
from wmkernels.registry import OPS as _OPS
from wmkernels.selective_scan.function import selective_scan as selective_scan
from wmkernels.selective_step.function import selective_state_update as selective_state_update
from wmkernels.selective_step.function import selective_step as selective_step
from wmkernels.ssd_scan.function import ssd_scan as ssd_scan
from wmkernels.ssd_scan.function import ssd_step as ssd_step
from wmkernels.ssd_scan.meta import SSDState as SSDState

__version__ = "0.1.0"
__all__ = ["SSDState", "nn", *sorted(function for spec in _OPS.values() for function in spec.functions)]
