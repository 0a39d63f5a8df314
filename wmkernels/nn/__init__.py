"""torch.nn modules with ``init_state``, ``forward`` over (batch, time, features) and ``step``.

States are dicts of tensors. ``ConvLSTM`` takes maps, (time, batch, ...) by default, and a state (h, c) as
``nn.LSTM``.
"""

from wmkernels.nn import convert
from wmkernels.nn.block_scan import BlockScan
from wmkernels.nn.causal_conv1d import CausalConv1d
from wmkernels.nn.conv_lstm import ConvLSTM, ConvLSTMCell
from wmkernels.nn.frequencies import lattice
from wmkernels.nn.gated_delta_net import GatedDeltaNet
from wmkernels.nn.gated_rms_norm import GatedRMSNorm
from wmkernels.nn.local_attention import LocalAttention
from wmkernels.nn.mamba import Mamba
from wmkernels.nn.mamba2 import Mamba2
from wmkernels.nn.mamba3 import Mamba3
from wmkernels.nn.memory_attention import MemoryAttention
from wmkernels.nn.memory_module import no_decay_parameters
from wmkernels.nn.place_memory import PlaceMemory
from wmkernels.nn.rotary_mamba import RotaryMamba, renamed

__all__ = [
    "BlockScan",
    "CausalConv1d",
    "ConvLSTM",
    "ConvLSTMCell",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "LocalAttention",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MemoryAttention",
    "PlaceMemory",
    "RotaryMamba",
    "convert",
    "lattice",
    "no_decay_parameters",
]


def __getattr__(name: str) -> type[RotaryMamba]:
    return renamed(__name__, name)
