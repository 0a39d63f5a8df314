"""torch.nn modules built on the ops, all speaking one language.

``init_state(batch_size)``; ``forward(inputs, state=None, reset=None) -> (outputs, state)`` on (batch, time, features);
``step(input, state, reset=None) -> (output, state)`` on (batch, features). The state is a plain dict of tensors.
"""

from wmkernels.nn.causal_conv1d import CausalConv1d
from wmkernels.nn.mamba import Mamba
from wmkernels.nn.rotated_mamba import RotatedMamba

__all__ = ["CausalConv1d", "Mamba", "RotatedMamba"]
