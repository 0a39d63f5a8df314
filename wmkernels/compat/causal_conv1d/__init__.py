"""causal_conv1d 1.6.1, on ``wmkernels.causal_conv1d``."""

from wmkernels.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn as causal_conv1d_fn
from wmkernels.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_update as causal_conv1d_update

__version__ = "1.6.1+wmkernels"
