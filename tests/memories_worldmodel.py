"""The memories of the world model, for the laws of tests/test_laws.py. Its rotated blocks are in memories_nn.py."""

import torch
from memories import ModuleMemory, register

from worldmodel.memory import GRU, MemoryConfig, ScanlessBlock, build_memory


class StackMemory(ModuleMemory):
    """Blocks between layer norms, which make large numbers of small differences: float64 shows the laws."""

    dtypes = (torch.float64,)


# They have no op of their own, and are checked on the devices of any.
register(ModuleMemory("ScanlessBlock", "linear_scan", lambda width: ScanlessBlock(width, 3, 2), widths=(2, 5)))
register(ModuleMemory("GRU", "linear_scan", GRU, widths=(2, 5)))
register(
    StackMemory(
        "MemoryStack", "linear_scan", lambda width: build_memory(MemoryConfig(width=width, layers=2, scan=False)), (6,)
    )
)
