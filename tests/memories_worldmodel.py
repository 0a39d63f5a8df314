"""The memories of the world model, for the laws of tests/test_laws.py. Its rotated blocks are in memories_nn.py."""

import torch
from memories import ModuleMemory, register

from worldmodel.memory import GRU, ConvLSTMBlock, MemoryConfig, ScanlessBlock, build_memory


class StackMemory(ModuleMemory):
    """Blocks between layer norms, which make large numbers of small differences: float64 shows the laws."""

    dtypes = (torch.float64,)


# Those without an op of their own are checked on the devices of any.
register(ModuleMemory("ScanlessBlock", "linear_scan", lambda width: ScanlessBlock(width, 3, 2), widths=(2, 5)))
register(ModuleMemory("ConvLSTMBlock", "conv_lstm", lambda width: ConvLSTMBlock(width, (2, 3), 3), widths=(6, 12)))
register(ModuleMemory("GRU", "linear_scan", GRU, widths=(2, 5)))
register(
    StackMemory(
        "MemoryStack", "linear_scan", lambda width: build_memory(MemoryConfig(width=width, layers=2, scan=False)), (6,)
    )
)
