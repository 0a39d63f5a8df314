"""torch.nn modules with one interface.

``init_state(batch_size)``; ``forward(inputs, state=None, reset=None) -> (outputs, state)``, (batch, time, features);
``step(input, state, reset=None) -> (output, state)``, (batch, features). States are dicts of tensors. ``ConvLSTM``
follows ``torch.nn.LSTM``; ``convert`` imports weights.
"""

from wmkernels.nn import convert
from wmkernels.nn.causal_conv1d import CausalConv1d
from wmkernels.nn.conv_lstm import ConvLSTM, ConvLSTMCell
from wmkernels.nn.mamba import Mamba
from wmkernels.nn.rotary_mamba import RotaryMamba, renamed

__all__ = ["CausalConv1d", "ConvLSTM", "ConvLSTMCell", "Mamba", "RotaryMamba", "convert"]


def __getattr__(name: str) -> type[RotaryMamba]:
    return renamed(__name__, name)
